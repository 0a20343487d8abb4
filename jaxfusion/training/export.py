"""A trained bridge as a Hugging Face directory that plain PyTorch loads."""

import json
import logging
import re
from collections.abc import Iterator
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from jaxfusion.errors import InputError, choose
from jaxfusion.fields import DTYPES, ROLES, Config
from jaxfusion.files import new_directory
from jaxfusion.hf.load import open_tensors, read_config
from jaxfusion.hf.save import (
    copy_tower,
    to_tensors,
    tower_names,
    write_shards,
    write_tokenizer,
)
from jaxfusion.hf.tables import Table, bridge_table, table
from jaxfusion.nn.mt5 import MT5Config
from jaxfusion.training.checkpoint import trained_part
from jaxfusion.training.evaluate import load_config
from jaxfusion.training.state import Flat, find_towers, load_tokenizers, read_shapes

MODELING = "modeling_jaxfusion.py"
logger = logging.getLogger(__name__)


def export(
    workdir: Path, out: Path, *, dtype: str | None = None, merge: bool = False,
    overwrite: bool = False,
) -> None:
    """Writes a workdir's best checkpoint as a directory for `AutoModelForCausalLM`.

    It holds the trained part and names its two backbones, or with `merge` has them in `encoder/`
    and `decoder/`, each an ordinary checkpoint of its own family.

    Args:
      dtype: of the backbones that are written; None keeps each tensor's. The trained part stays
        float32.

    Raises:
      InputError: no trained bridge in `workdir`, or `out` is not empty.
    """
    if dtype is not None:
        choose("dtype", dtype, DTYPES)
        if not merge:
            raise InputError("--dtype is that of the backbones, which only --merge writes")
    config = load_config(workdir)
    step, trained = trained_part(workdir)
    paths, config = find_towers(config)
    shapes = read_shapes(paths)
    tables = {role: table(shapes[role]) for role in ROLES}
    own = bridge_table(config.fusion.name, config.projector.name)
    _check_trained(trained, own, tables, workdir)
    tokenizers = load_tokenizers(config, paths, shapes)
    described = _describe(config, shapes, tokenizers, merge)
    with new_directory(out, overwrite) as partial:
        tensors = dict(to_tensors(own, traverse_util.unflatten_dict(trained, sep="/")))
        for role in ROLES:
            replaced = dict(_trained_tensors(role, trained, tables[role]))
            if merge:
                (partial / role).mkdir()
                copy_tower(paths[role], partial / role, read_config(paths[role]),
                           tower_names(tables[role], open_tensors(paths[role]).files,
                                       shapes[role].num_layers), replaced, dtype)
                write_tokenizer(partial / role, getattr(tokenizers, role))
            else:
                tensors |= {f"{role}.{name}": x for name, x in replaced.items()}
        write_shards(partial, tensors.items())
        (partial / "config.json").write_text(json.dumps(described, indent=2) + "\n", "utf-8")
        source = resources.files("jaxfusion.hf").joinpath(MODELING)
        (partial / MODELING).write_text(source.read_text("utf-8"), "utf-8")
        write_tokenizer(partial, tokenizers.decoder)
        write_tokenizer(partial / "encoder_tokenizer", tokenizers.encoder)
        card = _card(config, described, paths, workdir, step)
        (partial / "README.md").write_text(card, "utf-8")


def _check_trained(trained: Flat, own: Table, tables: dict[str, Table], workdir: Path) -> None:
    """Raises InputError where the checkpoint and the config disagree on what is trained."""
    wanted = {row.ours for row in own.rows}
    towers = {f"{role}/{row.ours}" for role in ROLES for row in tables[role].rows}
    missing, unknown = wanted - set(trained), set(trained) - wanted - towers
    if missing or unknown:
        raise InputError(f"{workdir}: its checkpoint does not fit its config; missing "
                         f"{sorted(missing)}, unknown {sorted(unknown)}")


def _trained_tensors(role: str, trained: Flat, rows: Table) -> Iterator[tuple[str, np.ndarray]]:
    """Hugging Face tensors of what was trained in a tower.

    Raises:
      InputError: only a part of a tensor was trained (Phi-3's fused ones).
    """
    flat = {row.ours: trained[f"{role}/{row.ours}"] for row in rows.rows
            if f"{role}/{row.ours}" in trained}
    chosen = tuple(row for row in rows.rows if row.ours in flat)
    fused = {row.theirs for row in chosen if row.part}
    left_out = [row.ours for row in rows.rows if row.theirs in fused and row.ours not in flat]
    if left_out:
        raise InputError(f"{', '.join(left_out)} share a tensor with what is trained but are "
                         "frozen; train all of it")
    yield from to_tensors(Table(chosen), traverse_util.unflatten_dict(flat, sep="/"))


def _describe(config: Config, shapes, tokenizers, merge: bool) -> dict[str, Any]:
    """`config.json` of the bridge; fields named encoder and decoder mean more to transformers."""
    def backbone(role: str) -> dict[str, Any]:
        tower = getattr(config, role)
        local = Path(tower.checkpoint).expanduser()
        name = role if merge else str(local.resolve()) if local.is_dir() else tower.checkpoint
        return {"checkpoint": name, "inside": merge, "width": shapes[role].d_model,
                "revision": None if merge else tower.revision}

    encoder, decoder = shapes["encoder"], tokenizers.decoder
    family = "umt5" if isinstance(encoder, MT5Config) and encoder.bias_per_layer else "mt5"
    hidden = config.projector.d_ff or 2 * encoder.d_model
    return {
        "model_type": "jaxfusion_bridge", "architectures": ["BridgeForCausalLM"],
        "auto_map": {"AutoConfig": "modeling_jaxfusion.BridgeConfig",
                     "AutoModelForCausalLM": "modeling_jaxfusion.BridgeForCausalLM"},
        "reader": {**backbone("encoder"), "layers": encoder.num_layers, "family": family},
        "writer": {**backbone("decoder"), "capped": shapes["decoder"].attn_cap is not None},
        "fusion": {"name": config.fusion.name, "layer": config.fusion.layer,
                   "d_ff": config.fusion.d_ff},
        "projector": {"name": config.projector.name, "d_ff": hidden,
                      "latents": config.projector.latents},
        "added_tokens": list(config.encoder.added_tokens),
        "bos_token_id": decoder.bos_token_id, "eos_token_id": decoder.eos_token_id,
        "jaxfusion_version": version("jaxfusion"),
    }


def _card(config: Config, described, paths: dict[str, Path], workdir: Path, step: int) -> str:
    """The model card: what it is, how to use it, its scores, its parts and their licences."""
    results = workdir / "eval" / "results.json"
    scores = ["Not scored yet (`eval.py`)."]
    if results.is_file():
        scores = ["| task | language | scoring | accuracy | 95% interval | rows |",
                  "|---|---|---|---|---|---|"]
        for task, languages in json.loads(results.read_text("utf-8")).items():
            scores += [
                f"| {task} | {language} | {scoring} | {100 * x['accuracy']:.1f} | "
                f"{100 * x['ci95'][0]:.1f} to {100 * x['ci95'][1]:.1f} | {x['n']} |"
                for language, by in languages.items() for scoring, x in by.items()
            ]
    parts = [f"- {role}: `{getattr(config, role).checkpoint}`, licence: {_licence(paths[role])}"
             for role in ROLES]
    return CARD.format(
        fusion=config.fusion.name, projector=config.projector.name, task=config.data.task,
        language=config.data.language, step=step, prompt=config.data.text_prompt or "none",
        parts="\n".join(parts), scores="\n".join(scores),
        config=json.dumps(described, indent=2),
    )


def _licence(path: Path) -> str:
    card = path / "README.md"
    found = card.is_file() and re.search(r"^license:\s*(\S+)", card.read_text("utf-8"), re.M)
    return found[1] if found else "see its own page"


CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [jaxfusion, langbridge, multilingual]
---

# A multilingual bridge

A frozen multilingual encoder in front of a frozen LLM, joined by a small part (fusion
`{fusion}`, projector `{projector}`) that was trained on `{task}` in `{language}` alone,
{step} steps, with jaxfusion.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)
queries = AutoTokenizer.from_pretrained(DIR, subfolder="encoder_tokenizer")
answers = AutoTokenizer.from_pretrained(DIR)
inputs = queries(["..."], padding=True, return_tensors="pt")
tokens = model.generate(inputs.input_ids, inputs.attention_mask, max_new_tokens=32)
print(answers.batch_decode(tokens, skip_special_tokens=True))
```

Text prompt after the prefix in training: {prompt}.

## Parts

{parts}

The trained part is under the terms of both.

## Scores

{scores}

## Config

```json
{config}
```
"""
