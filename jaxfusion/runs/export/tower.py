"""Exports a pretrained tower, or the LLM of a Lens run, as an ordinary Hugging Face checkpoint."""

import re
import shutil
from pathlib import Path

from jaxfusion import config as configs
from jaxfusion.config import CONFIG_FILE
from jaxfusion.data.pocket.lexicon import ABOUT_FILE
from jaxfusion.data.tokenizers import load_tokenizer
from jaxfusion.errors import InputError
from jaxfusion.files import new_directory
from jaxfusion.hf.hub import resolve
from jaxfusion.hf.load import open_tensors, read_config, read_shape
from jaxfusion.hf.save import copy_tower, tower_names, write_tokenizer
from jaxfusion.hf.tables import tower_table
from jaxfusion.pretraining.job import CHECKPOINT
from jaxfusion.runs.export.bridge import check_dtype, check_out, licence_of, trained_tensors
from jaxfusion.training.checkpoint import trained_part


def export_tower(
    workdir: Path, out: Path, *, dtype: str | None = None, overwrite: bool = False
) -> None:
    """Writes the tower of a pretraining run as an ordinary checkpoint of its own family.

    Args:
      dtype: of all tensors; None keeps the dtype of each.

    Raises:
      InputError: the run is not finished, or `out` is not empty.
    """
    check_dtype(dtype)
    config, source = configs.load(workdir / CONFIG_FILE), workdir / CHECKPOINT
    check_out(out, workdir, source)
    if not source.is_dir():
        raise InputError(f"{workdir} is not finished: {source} is missing; run its train.py "
                         "command again")
    role = config.tower.role
    shape = read_shape(role, source)
    names = tower_names(tower_table(shape), shape.num_layers, open_tensors(source).files)
    with new_directory(out, overwrite) as partial:
        copy_tower(source, partial, read_config(source), names, {}, dtype)
        write_tokenizer(partial, load_tokenizer(source, shape.vocab_size, role))
        shutil.copyfile(source / ABOUT_FILE, partial / ABOUT_FILE)


def export_lens(
    workdir: Path, out: Path, *, dtype: str | None = None, overwrite: bool = False
) -> None:
    """Writes the LLM of a Lens run as an ordinary causal LM of its own family.

    Args:
      workdir: of one run of a sweep, such as `runs/lens/Lens`.
      dtype: of all tensors; None keeps the dtype of each.

    Raises:
      InputError: `workdir` is a sweep, nothing was trained, or `out` is not empty.
    """
    check_dtype(dtype)
    config = configs.load(workdir / CONFIG_FILE)
    if not (workdir / "checkpoints").is_dir():
        inside = sorted(str(file.parent) for file in workdir.glob("*/checkpoints"))
        raise InputError(f"{workdir} has no trained LLM; give one of: {', '.join(inside) or '-'}")
    step, trained = trained_part(workdir)
    source, _ = resolve(config.decoder.checkpoint, config.decoder.revision)
    check_out(out, workdir, source)
    shape = read_shape("decoder", source)
    rows, first = tower_table(shape), shape.num_layers - config.lens.blocks
    replaced = {  # the checkpoint numbers blocks from the first trained one
        re.sub(r"(?<=layers\.)\d+", lambda match: str(int(match[0]) + first), name): x
        for name, x in trained_tensors("decoder", trained, rows)
    }
    names = tower_names(rows, shape.num_layers, open_tensors(source).files)
    with new_directory(out, overwrite) as partial:
        copy_tower(source, partial, read_config(source), names, replaced, dtype)
        write_tokenizer(partial, load_tokenizer(source, shape.vocab_size, "decoder"))
        (partial / "README.md").write_text(LENS_CARD.format(
            checkpoint=config.decoder.checkpoint, licence=licence_of(source), step=step,
            method=config.lens.method, blocks=config.lens.blocks, central=config.data.central,
            targets=", ".join(config.data.targets)), "utf-8")


LENS_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [jaxfusion, lens, multilingual]
---

# {checkpoint}, its languages moved

The top {blocks} blocks of `{checkpoint}` (licence: {licence}), trained for {step} steps by
`{method}` (Lens, arXiv:2410.04407) with jaxfusion: central language {central}, targets {targets}.
An ordinary checkpoint of its family, under the terms of the original LLM.
"""
