"""Exports a bridge in LangBridge's layout (github.com/kaistAI/LangBridge), with backbones."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jaxfusion.errors import InputError
from jaxfusion.fields import ROLES, Config
from jaxfusion.files import new_directory
from jaxfusion.hf.save import tower_tensors, write_shards, write_tokenizer
from jaxfusion.hf.tables import ALIGNMENTS, langbridge_names, langbridge_table
from jaxfusion.runs.export.bridge import Trained, check_dtype, collect, write_bridge_card

logger = logging.getLogger(__name__)


def export_langbridge(
    workdir: Path, out: Path, *, dtype: str | None = None, overwrite: bool = False,
    enc: str | None = None, lm: str | None = None, hub_name: str | None = None,
) -> None:
    """Writes a bridge in the layout of github.com/kaistAI/LangBridge, with its backbones.

    Args:
      dtype: of all tensors; None keeps the dtype of each.
      enc, lm: LangBridge's names of encoder and LLM; default: the run's names. LangBridge builds
        both from the config with that name before it reads the weights.
      hub_name: where the export will be on the hub, for the model card.

    Raises:
      InputError: LangBridge has no such fusion, projector or aligner, or as in `export`.
    """
    check_dtype(dtype)
    bridge = collect(workdir, out)
    config, tokenizers = bridge.config, bridge.tokenizers
    kind = _kind_of(config, workdir)
    if prompt := config.data.text_prompt:
        logger.warning("LangBridge's layout has no place for data.text_prompt: who asks the export "
                       "has to give the LLM %r after the prefix", prompt)
    described = {
        "architectures": ["LangBridgeModel"], "alignments": kind,
        "num_latents": config.projector.latents, "enc": _langbridge_enc(bridge, enc),
        "lm": _langbridge_lm(bridge, lm), "dim_enc": bridge.shapes["encoder"].d_model,
        "dim_lm": bridge.shapes["decoder"].d_model, "freeze_encoder": True,
        "freeze_language_model": True,
    }

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for role in ROLES:
            names = bridge.names(role)
            theirs = langbridge_names(role, names)
            for name, tensor in tower_tensors(bridge.paths[role], names, bridge.replaced(role),
                                              dtype):
                yield theirs[name], tensor
                if name == "model.embed_tokens.weight":  # stored under several names
                    yield "lb.embeddings.weight", tensor
                    if "lm_head.weight" not in names:
                        yield "lb.lm_head.weight", tensor
        for name, tensor in bridge.own(langbridge_table(config.projector.name)).items():
            yield name, tensor.astype(jnp.dtype(dtype) if dtype else tensor.dtype)

    with new_directory(out, overwrite) as partial:
        write_shards(partial, tensors())
        (partial / "config.json").write_text(json.dumps(described, indent=2) + "\n", "utf-8")
        write_tokenizer(partial, tokenizers.decoder)
        write_tokenizer(partial / "encoder_tokenizer", tokenizers.encoder)
        write_bridge_card(partial, bridge, described, hub_name, USAGE)


def _kind_of(config: Config, workdir: Path) -> str:
    """LangBridge's name of the projector.

    Raises:
      InputError: LangBridge lacks a part of the bridge.
    """
    kinds = {ours: theirs for theirs, ours in ALIGNMENTS.items()}
    if config.fusion.name != "last" or config.projector.name not in kinds:
        raise InputError(f"LangBridge supports fusion 'last' with {', '.join(kinds)}; {workdir} "
                         f"has '{config.fusion.name}' with '{config.projector.name}'")
    if config.aligner.name != "none":
        raise InputError(f"LangBridge has no aligner; {workdir} has '{config.aligner.name}': use "
                         "--format jaxfusion")
    if config.data.chat_template:
        raise InputError(f"LangBridge does not support chat templates; {workdir} was trained with "
                         "one: use --format jaxfusion")
    return kinds[config.projector.name]


USAGE = """\
The layout is that of [LangBridge](https://github.com/kaistAI/LangBridge), whose code loads it:

```python
from langbridge import LangBridgeModel

model = LangBridgeModel.from_pretrained({place})
```
"""
# LangBridge recognises an LLM by these prefixes of its name, by family (modeling_langbridge.py).
LANGBRIDGE_LMS = {
    "llama": ("EleutherAI/llemma", "codellama/CodeLlama", "microsoft/Orca-2", "meta-math/MetaMath",
              "meta-llama/Llama-2-7b-hf"),
    "mistral": ("mistralai/Mistral-7B-v0.1",),
}


def _langbridge_lm(bridge: Trained, name: str | None) -> str:
    """LangBridge's name of the LLM.

    Raises:
      InputError: LangBridge does not support the family, or does not recognise the name.
    """
    family, name = bridge.shapes["decoder"].family, name or bridge.config.decoder.checkpoint
    if family not in LANGBRIDGE_LMS:
        raise InputError(f"LangBridge supports {' and '.join(LANGBRIDGE_LMS)}, but {name} is a "
                         f"{family}: use --format jaxfusion")
    if not name.startswith(LANGBRIDGE_LMS[family]):
        raise InputError(f"LangBridge expects a {family} whose name begins with "
                         f"{', '.join(LANGBRIDGE_LMS[family])}, got {name}; set --lm to the one "
                         "with this LLM's config.json")
    return name


def _langbridge_enc(bridge: Trained, name: str | None) -> str:
    """LangBridge's name of the encoder, from which it infers the family.

    Raises:
      InputError: it would infer another family.
    """
    own, expected = bridge.config.encoder.checkpoint, bridge.shapes["encoder"].family
    local = name is None and Path(own).expanduser().is_dir()
    name = name or (Path(own).name if local else own)
    if expected not in ("mt5", "umt5") or bridge.config.encoder.prefix:
        raise InputError(f"LangBridge supports mT5 and umT5 without encoder.prefix, but {name} is "
                         f"a {expected}{' with one' if bridge.config.encoder.prefix else ''}: use "
                         "--format jaxfusion")
    inferred = next((x for x in ("umt5", "mt5") if x in name.lower()), "none")
    if local:
        raise InputError(f"LangBridge loads the encoder by its name on the hub, and '{name}' is "
                         "a local directory; set --enc to the one with this encoder's config.json")
    if inferred != expected:
        raise InputError(f"LangBridge expects '{expected}' in this encoder's name, got {name}; set "
                         "--enc to the one with this encoder's config.json")
    return name
