"""Bridges that others trained, as a workdir: scored, exported and trained on like one of ours.

    python -m jaxfusion.training.adopt SRC WORKDIR [--encoder NAME] [--decoder NAME]

SRC is a directory or a hub id: LangBridge's layout (`lb.enc.*`, `lb.lm.*`, `lb.alignment.*`), a
directory that export.py wrote, or MindMerger's mapping. Pickles go through `jaxfusion.hf.convert`
first. What SRC does not hold comes from the backbones: config and tokenizer of LangBridge's, all of
MindMerger's.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxfusion import config as configs
from jaxfusion.data.tokenizers import load_tokenizer
from jaxfusion.errors import InputError
from jaxfusion.fields import (
    Config,
    DecoderConfig,
    EncoderConfig,
    FusionConfig,
    GroupConfig,
    OptimizerConfig,
    ProjectorConfig,
)
from jaxfusion.files import new_directory
from jaxfusion.hf.configs import decoder_config, encoder_config
from jaxfusion.hf.hub import NOT_WEIGHTS, find_files, resolve
from jaxfusion.hf.load import TensorFiles, open_tensors, read_config
from jaxfusion.hf.save import copy_tower, tower_names, write_tokenizer
from jaxfusion.hf.tables import (
    Table,
    bridge_table,
    langbridge_table,
    mindmerger_table,
    table,
)
from jaxfusion.training.checkpoint import Checkpoints
from jaxfusion.training.loop import CONFIG_FILE
from jaxfusion.training.state import Flat, State

# LangBridge's names of the projectors, and what its authors add to the encoder's tokenizer.
ALIGNMENTS = {"linear": "linear", "ffn": "ffn", "latent": "resampler"}
WHITESPACE = ("\n", "\t", "\r", "\x0b", "\x0c", "  ", "   ", "    ")


def adopt(
    source: str, workdir: Path, encoder: str | None = None, decoder: str | None = None
) -> None:
    """Writes a workdir with the bridge `source` as its checkpoint of step 0.

    Args:
      encoder, decoder: directory or hub id of the backbones; default to what `source` names.

    Raises:
      InputError: an unknown layout, or a backbone that is named nowhere.
    """
    path, _ = resolve(source)
    tensors = open_tensors(path)
    names = set(tensors.files)
    named = {"encoder": encoder, "decoder": decoder}
    described = read_config(path) if (path / "config.json").is_file() else {}
    with new_directory(workdir) as partial:
        if described.get("model_type") == "jaxfusion_bridge":
            config, trained = _ours(path, described, tensors, named)
        elif any(name.startswith("lb.alignment.") for name in names):
            config, trained = _langbridge(path, described, tensors, named, partial, workdir)
        elif ends := [name for name in names if name.endswith("end_boundary")]:
            start = ends[0].removesuffix("end_boundary")
            config, trained = _mindmerger(tensors, named, start)
        else:
            raise InputError(f"{path} is no bridge: wanted tensors lb.alignment.* (LangBridge), "
                             "end_boundary (MindMerger), or a directory that export.py wrote")
        patterns = tuple(sorted(trained))
        groups = {"bridge": GroupConfig(patterns)}
        config = replace(config, optimizer=OptimizerConfig(groups=groups))
        configs.save(config, partial / CONFIG_FILE)
        checkpoints = Checkpoints(partial)
        flat = {name: jnp.asarray(x, jnp.float32) for name, x in trained.items()}
        checkpoints.save(State(jnp.array(0), flat, ()), {}, None)
        checkpoints.close()


def _read(rows: Table, tensors: TensorFiles) -> Flat:
    """Parameters of ours that none of their axes splits.

    Raises:
      InputError: tensors are missing, named.
    """
    missing = [row.theirs for row in rows.rows if row.theirs not in tensors.files]
    if missing:
        raise InputError(f"{tensors.path} lacks {', '.join(missing)}")
    found = {}
    for row in rows.rows:
        x = tensors.read(row.theirs)
        found[row.ours] = {"linear_in": x.T, "vector": x.reshape(-1)}.get(row.transform, x)
    return found


def _backbones(named: dict[str, str | None], default: dict[str, str | None]) -> dict[str, str]:
    found = {role: named[role] or default.get(role) for role in named}
    missing = [f"--{role}" for role, name in found.items() if name is None]
    if missing:
        raise InputError(f"the backbones are named nowhere; give {' and '.join(missing)}")
    return found


def _ours(path: Path, described, tensors: TensorFiles, named) -> tuple[Config, Flat]:
    """A directory that export.py wrote."""
    fusion, projector = described["fusion"], described["projector"]
    parts = {"encoder": described["reader"], "decoder": described["writer"]}
    names = _backbones(named, {
        role: str(path / part["checkpoint"]) if part["inside"] else part["checkpoint"]
        for role, part in parts.items()
    })
    trained = _read(bridge_table(fusion["name"], projector["name"]), tensors)
    for role, name in names.items():
        trained |= _tower_parts(role, Path(name), tensors)
    config = Config(
        encoder=EncoderConfig(names["encoder"], parts["encoder"]["revision"],
                              added_tokens=tuple(described["added_tokens"])),
        decoder=DecoderConfig(names["decoder"], parts["decoder"]["revision"]),
        fusion=FusionConfig(fusion["name"], fusion["layer"], d_ff=fusion["d_ff"]),
        projector=ProjectorConfig(projector["name"], projector["d_ff"], projector["latents"]),
    )
    return config, trained


def _tower_parts(role: str, path: Path, tensors: TensorFiles) -> Flat:
    """Parameters of a tower that were trained and exported without the rest of it."""
    start = f"{role}."
    held = {name.removeprefix(start): name for name in tensors.files if name.startswith(start)}
    if not held:
        return {}
    raise InputError(f"{tensors.path} holds trained tensors of the {role} ({next(iter(held))}, …); "
                     "export it with --merge to take it in again")


def _langbridge(
    path: Path, described: dict[str, Any], tensors: TensorFiles, named, partial: Path,
    workdir: Path,
) -> tuple[Config, Flat]:
    """LangBridge's layout: its two backbones become directories of their own in the workdir."""
    kind = described.get("alignments", "linear")
    if kind not in ALIGNMENTS:
        raise InputError(f"{path}/config.json: alignments is '{kind}', known are "
                         f"{', '.join(ALIGNMENTS)}")
    names = _backbones(named, {"encoder": described.get("enc"), "decoder": described.get("lm")})
    starts = {"encoder": ("lb.enc.", ""), "decoder": ("lb.lm.", "model.")}
    for role, (theirs, ours) in starts.items():
        held = {ours + name.removeprefix(theirs): name for name in tensors.files
                if name.startswith(theirs)}
        if role == "decoder":
            held |= {"lm_head.weight": "lb.lm_head.weight"} if (
                "lb.lm_head.weight" in tensors.files) else {}
        _write_backbone(role, names[role], path, held, tensors, partial / role)
    trained = _read(langbridge_table(ALIGNMENTS[kind]), tensors)
    latents = len(trained["projector/latents"]) if kind == "latent" else 64
    config = Config(
        encoder=EncoderConfig(str(workdir / "encoder")),
        decoder=DecoderConfig(str(workdir / "decoder")),
        fusion=FusionConfig("last"),
        projector=ProjectorConfig(ALIGNMENTS[kind], latents=latents, end_std=1.0),
    )
    return config, trained


def _write_backbone(
    role: str, name: str, source: Path, held: dict[str, str], tensors: TensorFiles, out: Path
) -> None:
    """A tower out of a larger checkpoint, with the config and tokenizer of the backbone `name`."""
    place = find_files(name, NOT_WEIGHTS)
    read, embed = {"encoder": (encoder_config, "shared.weight"),
                   "decoder": (decoder_config, "model.embed_tokens.weight")}[role]
    json_config = read_config(place)
    rows = tensors.shapes()[held[embed]][0] if embed in held else json_config["vocab_size"]
    json_config["vocab_size"] = rows  # added tokens make the table longer
    shape = read(json_config, f"{place}/config.json")
    out.mkdir()
    usual = tower_names(table(shape), held, shape.num_layers)
    copy_tower(source, out, json_config, {ours: held[there] for ours, there in usual.items()},
               {}, None)
    added = WHITESPACE if role == "encoder" else ()
    write_tokenizer(out, load_tokenizer(place, rows, role, added))


def _mindmerger(tensors: TensorFiles, named, start: str) -> tuple[Config, Flat]:
    """MindMerger's mapping; its two backbones are those of the command line."""
    names = _backbones(named, {})
    trained = _read(mindmerger_table(start), tensors)
    config = Config(
        encoder=EncoderConfig(names["encoder"]), decoder=DecoderConfig(names["decoder"]),
        fusion=FusionConfig("last"),
        projector=ProjectorConfig("mapping", d_ff=len(trained["projector/hidden/bias"])),
    )
    return config, trained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", metavar="SRC", help="directory or hub id")
    parser.add_argument("workdir", metavar="WORKDIR", type=Path, help="directory to write")
    parser.add_argument("--encoder", help="directory or hub id of the encoder")
    parser.add_argument("--decoder", help="directory or hub id of the LLM")
    args = parser.parse_args()
    try:
        adopt(args.source, args.workdir, args.encoder, args.decoder)
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"done: {args.workdir}; score it with: python eval.py --workdir {args.workdir}")


if __name__ == "__main__":
    main()
