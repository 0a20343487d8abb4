"""Writes the tables of docs/choosing.md: `python benchmarks/choosing.py`.

Sizes come from shapes alone, accuracies from benchmarks/results/real_topics.json: the result is the
same on every machine.
"""

import json
from pathlib import Path

from jaxfusion.config import default_config, from_config_dict
from jaxfusion.costs.chips import GIB
from jaxfusion.hf.known_shapes import BACKBONES, backbone_shape
from jaxfusion.sharding.mesh import make_mesh
from jaxfusion.training.build import plan_model

MEASURED = Path(__file__).parent / "results" / "real_topics.json"
PAGE = Path(__file__).parent.parent / "docs" / "choosing.md"
ENCODERS = tuple(name for name in BACKBONES if name.startswith("google/"))
LLMS = ("meta-llama/Llama-3.2-1B-Instruct", "microsoft/Phi-3.5-mini-instruct",
        "meta-llama/Llama-2-7b-hf", "Qwen/Qwen2.5-7B-Instruct",
        "meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-2-13b-hf")
TRAINED = {"last, linear projector": ("last", "linear"), "last, ffn": ("last", "ffn"),
           "transformer_softmax, linear": ("transformer_softmax", "linear")}


def sizes(encoder: str, llm: str, fusion: str = "last", projector: str = "linear") -> dict:
    """Number of parameters of each part of a bridge, and of the trained ones."""
    config = default_config()
    config.fusion.name, config.projector.name = fusion, projector
    shapes = {"encoder": backbone_shape("encoder", encoder),
              "decoder": backbone_shape("decoder", llm)}
    plan = plan_model(from_config_dict(config), shapes, make_mesh())
    count = {"trained": sum(x.size for x in plan.trainable.values())}
    for part in ("encoder", "decoder"):
        count[part] = sum(x.size for path, x in plan.params.items()
                          if path.startswith(f"{part}/"))
    return count


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def weights() -> str:
    """Parameters of each tower, and their bytes."""
    rows = []
    for part, names in (("encoder", ENCODERS), ("decoder", LLMS)):
        for name in names:
            pair = (name, LLMS[0]) if part == "encoder" else (ENCODERS[0], name)
            n = sizes(*pair)[part]
            rows.append([f"`{name}`", {"encoder": "encoder", "decoder": "LLM"}[part],
                         f"{n / 1e9:.2f}", f"{2 * n / GIB:.1f} GiB", f"{4 * n / GIB:.1f} GiB"])
    return table(["checkpoint", "", "parameters, 10⁹", "bfloat16", "float32"], rows)


def trained() -> str:
    """Trained parameters in millions, for pairs of towers."""
    pairs = [("google/mt5-large", LLMS[0]), ("google/mt5-xl", "meta-llama/Llama-2-7b-hf"),
             ("google/mt5-xxl", "meta-llama/Llama-2-13b-hf")]
    rows = [[f"`{encoder}`, `{llm}`",
             *(f"{sizes(encoder, llm, *kind)['trained'] / 1e6:.1f}" for kind in TRAINED.values())]
            for encoder, llm in pairs]
    return table(["towers", *(f"{name}, 10⁶" for name in TRAINED)], rows)


def measured() -> str:
    """Accuracy on real topics in English and over languages, and the difference to the encoder
    alone."""
    found = json.loads(MEASURED.read_text("utf-8"))
    rows = []
    for name, by in found["groups"].items():
        every, english = by["all groups"], found["languages"][name]["eng_Latn"]["accuracy"]
        less = found["differences"].get(name, {}).get("all groups")
        low, high = (100 * x for x in less["ci95"]) if less else (0, 0)
        difference = f"{100 * less['accuracy']:+.1f} [{low:+.0f}, {high:+.0f}]" if less else ""
        rows.append([name, f"{100 * english:.1f}", f"{100 * every['accuracy']:.1f}", difference])
    return table(["", "English", "other languages", f"minus {found['reference']}"], rows)


def main() -> None:
    page = PAGE.read_text("utf-8")
    for mark, made in (("measured", measured()), ("weights", weights()),
                       ("trained", trained())):
        head, rest = page.split(f"<!-- {mark} -->\n")
        page = f"{head}<!-- {mark} -->\n{made}<!-- /{mark} -->\n" + rest.split(
            f"<!-- /{mark} -->\n")[1]
    PAGE.write_text(page, "utf-8")


if __name__ == "__main__":
    main()
