"""Imports a bridge of other software as a workdir, to score, export or continue training it.

    python -m jaxfusion.runs.adopt SRC WORKDIR [--encoder NAME] [--decoder NAME]

SRC is a directory or a hub id: LangBridge's layout (`lb.enc.*`, `lb.lm.*`, `lb.alignment.*`), a
directory that export.py wrote, or MindMerger's mapping. Convert pickles with `jaxfusion.hf.convert`
first. Whatever SRC lacks comes from the backbones: config and tokenizer for LangBridge, everything
but the mapping for MindMerger.
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxfusion import config as configs
from jaxfusion.cli import set_up_logging, typed
from jaxfusion.config import CONFIG_FILE
from jaxfusion.data.tokenizers import LANGBRIDGE_WHITESPACE, load_tokenizer
from jaxfusion.errors import InputError, listed
from jaxfusion.fields import (
    ROLES,
    Config,
    DataConfig,
    DecoderSettings,
    EncoderSettings,
    FusionConfig,
    ProjectorConfig,
)
from jaxfusion.files import new_directory
from jaxfusion.hf.decoders import decoder_config
from jaxfusion.hf.encoders import encoder_config
from jaxfusion.hf.hub import NOT_WEIGHTS, find_files, resolve
from jaxfusion.hf.load import TensorFiles, open_tensors, read_config
from jaxfusion.hf.save import copy_tower, usual_names, write_tokenizer
from jaxfusion.hf.tables import (
    ALIGNMENTS,
    Table,
    langbridge_names,
    langbridge_table,
    mindmerger_table,
    tower_table,
)
from jaxfusion.runs.exported import (
    MODEL_TYPE,
    backbones,
    fitting_shapes,
    read_export,
    read_params,
    with_trained,
)
from jaxfusion.training.checkpoint import Checkpoints
from jaxfusion.training.state import Flat, State

logger = logging.getLogger(__name__)


def adopt(
    source: str, workdir: Path, encoder: str | None = None, decoder: str | None = None
) -> None:
    """Writes a workdir with the bridge `source` as its checkpoint at step 0.

    Args:
      encoder, decoder: directory or hub id of the backbones; default: those named in `source`.

    Raises:
      InputError: unknown layout, or a backbone without a name.
    """
    path, _ = resolve(source, also=("encoder/*", "decoder/*", "encoder_tokenizer/*"))
    path, workdir = path.resolve(), workdir.absolute()
    named = {"encoder": encoder, "decoder": decoder}
    described = read_config(path) if (path / "config.json").is_file() else {}
    with new_directory(workdir) as partial:
        if described.get("model_type") == MODEL_TYPE:
            config, trained = read_export(path, described, named)
        else:
            config, trained = _of_others(path, described, named, partial, workdir)
        configs.save(config, partial / CONFIG_FILE)
        checkpoints = Checkpoints(partial)
        flat = {name: jnp.asarray(x, jnp.float32) for name, x in trained.items()}
        checkpoints.save(State(jnp.array(0), flat, ()), {}, None)
        checkpoints.close()


def _of_others(
    path: Path, described: dict[str, Any], named, partial: Path, workdir: Path
) -> tuple[Config, Flat]:
    """Reads LangBridge's layout or MindMerger's mapping.

    Raises:
      InputError: it is neither, or the projector's widths differ from those of the backbones.
    """
    tensors = open_tensors(path)
    names = set(tensors.files)
    if any(name.startswith("lb.alignment.") for name in names):
        config, trained = _langbridge(path, described, tensors, named, partial, workdir)
        paths = {role: partial / role for role in ROLES}
    elif ends := [name for name in names if name.endswith("end_boundary")]:
        config, trained = _mindmerger(tensors, named, ends[0].removesuffix("end_boundary"))
        paths = {role: find_files(getattr(config, role).checkpoint, NOT_WEIGHTS)
                 for role in ROLES}
    else:
        raise InputError(f"{path} is not a bridge: expected tensors lb.alignment.* "
                         "(LangBridge), end_boundary (MindMerger), or a directory that "
                         "export.py wrote")
    fitting_shapes(config, trained, paths)
    return with_trained(config, trained), trained


def _langbridge(
    path: Path, described: dict[str, Any], tensors: TensorFiles, named, partial: Path,
    workdir: Path,
) -> tuple[Config, Flat]:
    """Reads LangBridge's layout; writes its two backbones to directories in the workdir."""
    kind = described.get("alignments", "linear")
    if kind not in ALIGNMENTS:
        raise InputError(f"{path}/config.json: alignments is '{kind}', expected one of "
                         f"{', '.join(ALIGNMENTS)}")
    names = backbones(named, {"encoder": described.get("enc"), "decoder": described.get("lm")})
    for role, name in names.items():
        _write_backbone(role, name, path, tensors, partial / role)
    table = langbridge_table(ALIGNMENTS[kind])
    _say_unread(tensors, table, "lb.alignment.")
    trained = read_params(table, tensors)
    latents = len(trained["projector/latents"]) if kind == "latent" else 64
    d_ff = len(trained["projector/hidden/bias"]) if kind == "ffn" else None
    config = Config(
        encoder=EncoderSettings(str(workdir / "encoder")),
        decoder=DecoderSettings(str(workdir / "decoder")),
        fusion=FusionConfig("last"),
        projector=ProjectorConfig(ALIGNMENTS[kind], d_ff, latents, end_std=1.0),
        data=DataConfig(target_eos=False),
    )
    return config, trained


def _write_backbone(role: str, name: str, source: Path, tensors: TensorFiles, out: Path) -> None:
    """Writes a tower of LangBridge's checkpoint with config and tokenizer of the backbone `name`.
    """
    place = find_files(name, NOT_WEIGHTS)
    config, shapes = read_config(place), tensors.shapes()
    read, embed = {"encoder": (encoder_config, "shared.weight"),
                   "decoder": (decoder_config, "model.embed_tokens.weight")}[role]
    embed_name = langbridge_names(role, [embed])[embed]
    if embed_name in shapes:
        config["vocab_size"] = shapes[embed_name][0]  # added tokens extend the table
    shape = read(config, f"{place}/config.json")
    usual = usual_names(tower_table(shape), shape.num_layers)
    stored = {name: next((x for x in langbridge_names(role, names).values() if x in shapes), None)
            for name, names in usual.items()}
    missing = [name for name, x in stored.items() if x is None]
    if missing:
        raise InputError(f"{source} lacks tensors of {place}: {', '.join(missing)}")
    copy_tower(source, out, config, stored, {}, None)
    added = LANGBRIDGE_WHITESPACE if role == "encoder" else ()
    write_tokenizer(out, load_tokenizer(place, shape.vocab_size, role, added))


def _say_unread(tensors: TensorFiles, table: Table, start: str) -> None:
    """Warns of tensors, of those whose names begin with `start`, that are not read."""
    unread = {x for x in tensors.files if x.startswith(start)} - {row.theirs for row in table.rows}
    if unread:
        logger.warning("%s has tensors that are not read, as the bridge has no place for them: %s",
                       tensors.path, listed(sorted(unread)))


def _mindmerger(tensors: TensorFiles, named, start: str) -> tuple[Config, Flat]:
    """Reads MindMerger's mapping; the command line names its backbones."""
    names = backbones(named, {})
    _say_unread(tensors, mindmerger_table(start), "")
    trained = read_params(mindmerger_table(start), tensors)
    config = Config(
        encoder=EncoderSettings(names["encoder"]), decoder=DecoderSettings(names["decoder"]),
        fusion=FusionConfig("last"),
        projector=ProjectorConfig("mapping", d_ff=len(trained["projector/hidden/bias"])),
    )
    return config, trained


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", metavar="SRC", help="directory or hub id")
    parser.add_argument("workdir", metavar="WORKDIR", type=Path, help="directory to write")
    parser.add_argument("--encoder", help="directory or hub id of the encoder")
    parser.add_argument("--decoder", help="directory or hub id of the LLM")
    args = parser.parse_args()
    set_up_logging()
    try:
        adopt(args.source, args.workdir, args.encoder, args.decoder)
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"done: {args.workdir}; score it with: {typed('eval')} --workdir {args.workdir}")


if __name__ == "__main__":
    main()
