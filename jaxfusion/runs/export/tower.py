"""Exports a pretrained tower, or the LLM of a Lens run, as an ordinary Hugging Face checkpoint."""

import re
import shutil
from pathlib import Path

from huggingface_hub import ModelCardData

from jaxfusion import config as configs
from jaxfusion.config import CONFIG_FILE
from jaxfusion.data.languages import iso_of
from jaxfusion.data.pocket.lexicon import ABOUT_FILE
from jaxfusion.data.tokenizers import load_tokenizer
from jaxfusion.errors import InputError
from jaxfusion.fields import LensRunConfig, PretrainConfig
from jaxfusion.files import new_directory, read_object
from jaxfusion.hf.hub import HUB_ID, resolve
from jaxfusion.hf.load import open_tensors, read_config, read_shape
from jaxfusion.hf.save import copy_tower, tower_names, write_tokenizer
from jaxfusion.hf.tables import tower_table
from jaxfusion.pretraining.job import CHECKPOINT
from jaxfusion.runs.export.bridge import check_dtype, check_out, trained_tensors
from jaxfusion.runs.export.card import base_of, listed_fields, write_card
from jaxfusion.runs.open_llm import check_trained
from jaxfusion.training.checkpoint import trained_part
from jaxfusion.training.origin import check_origin, origin_of


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
        _write_tower_card(partial, config, read_object(source / ABOUT_FILE).get("world"))


def export_lens(
    workdir: Path, out: Path, *, dtype: str | None = None, overwrite: bool = False
) -> None:
    """Writes the LLM of a Lens run as an ordinary causal LM of its own family.

    Args:
      workdir: of one run of a sweep, such as `runs/lens/Lens`.
      dtype: of all tensors; None keeps the dtype of each.

    Raises:
      InputError: `workdir` is a sweep, nothing was trained, it was trained on another LLM than is
        there now, or `out` is not empty.
    """
    check_dtype(dtype)
    config = configs.load(workdir / CONFIG_FILE)
    check_trained(workdir)
    step, trained = trained_part(workdir)
    source, _ = resolve(config.decoder.checkpoint, config.decoder.revision)
    check_out(out, workdir, source)
    shape = read_shape("decoder", source)
    tokenizer = load_tokenizer(source, shape.vocab_size, "decoder")
    # Of the LLM alone, where it was behind a bridge too.
    check_origin(workdir, origin_of({"decoder": (source, tokenizer)}, config.decoder.checkpoint))
    rows, first = tower_table(shape), shape.num_layers - config.lens.blocks
    replaced = {  # the checkpoint numbers blocks from the first trained one
        re.sub(r"(?<=layers\.)\d+", lambda match: str(int(match[0]) + first), name): x
        for name, x in trained_tensors("decoder", trained, rows)
    }
    names = tower_names(rows, shape.num_layers, open_tensors(source).files)
    with new_directory(out, overwrite) as partial:
        copy_tower(source, partial, read_config(source), names, replaced, dtype)
        write_tokenizer(partial, tokenizer)
        _write_lens_card(partial, config, source, step)


def _write_tower_card(folder: Path, config: PretrainConfig, world: dict | None) -> None:
    """The card of a tower that was trained from nothing; `world` is the pocket world's, if its
    text is from there."""
    tags = {"encoder": "feature-extraction", "decoder": "text-generation"}
    languages = (*config.data.languages, config.data.pivot)
    write_card(folder, ModelCardData(
        library_name="transformers", pipeline_tag=tags[config.tower.role],
        tags=["jaxfusion", "multilingual"], **listed_fields(language=map(iso_of, languages))),
        TOWER_CARD.format(role=config.tower.role, objective=config.objective.name,
                          text=POCKET_TEXT if world else "text files", about=ABOUT_FILE))


def _write_lens_card(folder: Path, config: LensRunConfig, source: Path, step: int) -> None:
    """The card of a Lens run's LLM."""
    base, data = base_of("LLM", config.decoder.checkpoint, source), config.data
    languages = [iso_of(data.codes.get(x, x)) for x in (data.central, *data.targets)]
    on_hub = HUB_ID.fullmatch(data.path) and not Path(data.path).exists()
    write_card(folder, ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", **base.licence,
        tags=["jaxfusion", "lens", "multilingual"],
        **listed_fields(base_model=[base.name] * base.on_hub, language=languages,
                        datasets=[data.path] if on_hub else [])),
        LENS_CARD.format(line=base.line(), name=base.name, step=step, method=config.lens.method,
                         blocks=config.lens.blocks, central=data.central,
                         targets=", ".join(data.targets)))


POCKET_TEXT = "text of jaxfusion's made-up pocket world, most of it in made-up languages"
TOWER_CARD = """\
# A small {role}

This {role} was trained from nothing with jaxfusion (objective `{objective}`) on {text}. It is an
ordinary checkpoint of its family; `{about}` has its config and development scores.
"""
LENS_CARD = """\
# {name}, its languages moved

The top {blocks} blocks of `{name}`, trained for {step} steps by `{method}` (Lens, arXiv:2410.04407)
with jaxfusion: central language {central}, targets {targets}. An ordinary checkpoint of its family,
under the terms of the original LLM.

{line}
"""
