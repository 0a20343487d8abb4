"""Fields of a `config.json`, read with their types and ranges.

Each function raises InputError, with the file and the field, for another value.
"""

from typing import Any

from jaxfusion.errors import InputError

FAMILIES = {  # `model_type` of what each role takes
    "encoder": ("mt5", "umt5", "t5", "bert", "xlm-roberta", "m2m_100", "modernbert"),
    "decoder": ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text"),
}
MOST_LAYERS = 1000
LARGEST = 10_000_000  # of any count: a larger one is damage and would exhaust memory
MOST = 1e30  # of any other number: fits float32


def required_count(json: dict[str, Any], name: str, where: str) -> int:
    """A required count."""
    if json.get(name) is None:
        raise InputError(f"{where}: field '{name}' is missing")
    return count(json, name, None, where)


def count(
    json: dict[str, Any], name: str, default: int | None, where: str, least: int = 1
) -> int | None:
    """A count from `least` to `LARGEST`; the default if it is missing."""
    value = json.get(name)
    if value is None:
        return default
    if type(value) is not int or not least <= value <= LARGEST:
        raise InputError(f"{where}: {name} is {value!r:.80}, expected an integer from {least} to "
                         f"{LARGEST:,}")
    return value


def number(
    json: dict[str, Any], name: str, where: str, default: float | None = None
) -> float:
    """A number above 0; the default, if there is one, if it is missing."""
    value = json.get(name)
    if value is None and default is not None:
        return default
    if type(value) not in (int, float) or not 0 < value <= MOST:
        raise InputError(f"{where}: {name} is {value!r:.80}, expected a number above 0, at most "
                         f"{MOST:.0e}")
    return float(value)


def flag(json: dict[str, Any], name: str, where: str, default: bool = False) -> bool:
    """A boolean; the default if it is missing."""
    value = json.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise InputError(f"{where}: {name} is {value!r:.80}, expected true or false")
    return value


def group(json: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    """A group of fields; empty if it is missing."""
    value = json.get(name)
    if value is not None and not isinstance(value, dict):
        raise InputError(f"{where}: {name} is {value!r:.80}, expected a JSON object")
    return value or {}


def check_family(json: dict[str, Any], role: str, where: str) -> None:
    """Raises InputError for a family that the role does not take, or a quantized checkpoint."""
    family, known = json.get("model_type"), ", ".join(FAMILIES[role])
    other = "decoder" if role == "encoder" else "encoder"
    if role == "encoder" and flag(json, "is_decoder", where):
        raise InputError(f"{where}: is_decoder is true, expected an encoder")
    if family in FAMILIES[other]:
        kinds = {"encoder": "an encoder", "decoder": "a decoder-only LLM"}
        raise InputError(f"{where}: model_type {family!r} is {kinds[other]}, expected "
                         f"{kinds[role]}: {known}")
    if family not in FAMILIES[role]:
        raise InputError(f"{where}: model_type {family!r:.80} is not supported as {role}; "
                         f"known: {known}")
    if quantized := json.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise InputError(f"{where}: the checkpoint is quantized ({method!r:.80}), which is not "
                         "supported; use the original in float32, bfloat16 or float16")


def check_shape(shape, where: str, kv_heads: int | None = None) -> None:
    """Raises InputError if a tower's heads do not divide, or it has too many layers."""
    if kv_heads and shape.num_heads % kv_heads:
        raise InputError(f"{where}: {shape.num_heads} attention heads are not divisible by "
                         f"{kv_heads} key and value heads")
    if shape.num_layers > MOST_LAYERS:
        raise InputError(f"{where}: {shape.num_layers:,} layers, expected at most {MOST_LAYERS:,}")


def chosen(
    json: dict[str, Any], name: str, choices: dict[str, str], where: str,
    default: str | None = None,
) -> str:
    """The entry of `choices` that a field names; if it is missing, of the default or the first."""
    value = json.get(name)
    if value is None:
        value = default or next(iter(choices))
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"{where}: {name} is {value!r:.80}, expected {' or '.join(choices)}")
    return choices[value]


def local_layers(json: dict[str, Any], layers: int, where: str) -> list[bool] | None:
    """Which layers have a window, by `layer_types`; None if it is missing."""
    kinds, known = json.get("layer_types"), ("sliding_attention", "full_attention")
    if kinds is None:
        return None
    if not isinstance(kinds, list) or len(kinds) != layers or any(x not in known for x in kinds):
        raise InputError(f"{where}: layer_types is {kinds!r:.80}, expected a list of {layers} "
                         f"entries, each {' or '.join(known)}")
    return [kind == "sliding_attention" for kind in kinds]
