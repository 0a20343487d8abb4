"""Imports a bridge of other software as a workdir, to score, export or continue training it.

    python -m jaxfusion.runs.adopt SRC WORKDIR [--encoder NAME] [--decoder NAME]

SRC is a directory or a hub id: LangBridge's layout (`lb.enc.*`, `lb.lm.*`, `lb.alignment.*`), a
directory that export.py wrote, or MindMerger's mapping. Convert pickles with `jaxfusion.hf.convert`
first. Whatever SRC lacks comes from the backbones: config and tokenizer for LangBridge, everything
but the mapping for MindMerger.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxfusion import config as configs
from jaxfusion.cli import typed
from jaxfusion.config import CONFIG_FILE
from jaxfusion.data.tokenizers import LANGBRIDGE_WHITESPACE, load_tokenizer
from jaxfusion.errors import InputError
from jaxfusion.fields import (
    ROLES,
    AlignerConfig,
    Config,
    DataConfig,
    DecoderSettings,
    EncoderSettings,
    FusionConfig,
    GroupConfig,
    OptimizerConfig,
    ProjectorConfig,
)
from jaxfusion.files import new_directory
from jaxfusion.hf.decoders import decoder_config
from jaxfusion.hf.encoders import encoder_config
from jaxfusion.hf.hub import NOT_WEIGHTS, find_files, resolve
from jaxfusion.hf.load import TensorFiles, load_params, open_tensors, read_config
from jaxfusion.hf.save import copy_tower, usual_names, write_tokenizer
from jaxfusion.hf.tables import (
    ALIGNMENTS,
    Table,
    bridge_table,
    langbridge_names,
    langbridge_table,
    mindmerger_table,
    tower_table,
)
from jaxfusion.nn.bridge import OWN
from jaxfusion.nn.decoder import DecoderConfig
from jaxfusion.nn.encoder import EncoderConfig
from jaxfusion.sharding.mesh import make_mesh
from jaxfusion.training.build import describe, make_bridge
from jaxfusion.training.checkpoint import Checkpoints
from jaxfusion.training.load import read_shapes
from jaxfusion.training.state import Flat, State


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
    tensors = open_tensors(path)
    names = set(tensors.files)
    named = {"encoder": encoder, "decoder": decoder}
    described = read_config(path) if (path / "config.json").is_file() else {}
    with new_directory(workdir) as partial:
        if described.get("model_type") == "jaxfusion_bridge":
            try:
                config, trained = _ours(path, described, tensors, named)
            except (KeyError, TypeError, AttributeError) as error:
                raise InputError(f"{path}/config.json: a field is missing or has the wrong type "
                                 f"({error!r}); export the bridge again") from None
        elif any(name.startswith("lb.alignment.") for name in names):
            config, trained = _langbridge(path, described, tensors, named, partial, workdir)
        elif ends := [name for name in names if name.endswith("end_boundary")]:
            start = ends[0].removesuffix("end_boundary")
            config, trained = _mindmerger(tensors, named, start)
        else:
            raise InputError(f"{path} is not a bridge: expected tensors lb.alignment.* "
                             "(LangBridge), end_boundary (MindMerger), or a directory that "
                             "export.py wrote")
        shapes = _check_widths(config, trained, partial, workdir)
        if described.get("model_type") == "jaxfusion_bridge":
            trained |= _of_towers(config, shapes, tensors)
        patterns = tuple(sorted(trained))
        groups = {"bridge": GroupConfig(patterns)}
        config = replace(config, optimizer=OptimizerConfig(groups=groups))
        configs.save(config, partial / CONFIG_FILE)
        checkpoints = Checkpoints(partial)
        flat = {name: jnp.asarray(x, jnp.float32) for name, x in trained.items()}
        checkpoints.save(State(jnp.array(0), flat, ()), {}, None)
        checkpoints.close()


def _read(rows: Table, tensors: TensorFiles) -> Flat:
    """Reads parameters whose axes are not split.

    Raises:
      InputError: tensors are missing; the message lists all.
    """
    missing = [row.theirs for row in rows.rows if row.theirs not in tensors.files]
    if missing:
        raise InputError(f"{tensors.path} lacks {', '.join(missing)}")
    params = {}
    for row in rows.rows:
        x = tensors.read(row.theirs)
        params[row.ours] = {"same": x, "linear_in": x.T, "vector": x.reshape(-1)}[row.transform]
    if "fusion/t" in params:  # a vector of size 1 in earlier exports
        params["fusion/t"] = params["fusion/t"].reshape(())
    return params


def _backbones(named: dict[str, str | None], default: dict[str, str | None]) -> dict[str, str]:
    names = {role: named[role] or default.get(role) for role in named}
    missing = [f"--{role}" for role, name in names.items() if name is None]
    if missing:
        raise InputError(f"the source does not name its backbones; give {' and '.join(missing)}")
    return names


def _ours(path: Path, described, tensors: TensorFiles, named) -> tuple[Config, Flat]:
    """Reads a directory that export.py wrote."""
    fusion, projector = described["fusion"], described["projector"]
    aligner = described.get("aligner", {"name": "none"})
    parts = {"encoder": described["reader"], "decoder": described["writer"]}
    names = _backbones(named, {
        role: str(path / part["checkpoint"]) if part["inside"] else part["checkpoint"]
        for role, part in parts.items()
    })
    trained = _read(bridge_table(fusion["name"], projector["name"], aligner["name"]), tensors)
    revisions = {role: None if named[role] else part["revision"] for role, part in parts.items()}
    config = Config(
        encoder=EncoderSettings(names["encoder"], revisions["encoder"],
                                added_tokens=tuple(described["added_tokens"]),
                                prefix=described.get("query_prefix", "")),
        decoder=DecoderSettings(names["decoder"], revisions["decoder"]),
        fusion=FusionConfig(fusion["name"], fusion["layer"], d_ff=fusion["d_ff"]),
        projector=ProjectorConfig(projector["name"], projector["d_ff"], projector["latents"]),
        aligner=AlignerConfig(
            aligner["name"], "paper_code" if aligner.get("padding") else "default"),
        data=DataConfig(text_prompt=described.get("text_prompt", ""),
                        chat_template=described.get("chat_template", False)),
    )
    return config, trained


def _of_towers(
    config: Config, shapes: dict[str, EncoderConfig | DecoderConfig], tensors: TensorFiles
) -> Flat:
    """The trained parameters of the backbones, from an export without `--merge`."""
    bridge = make_bridge(config, shapes["encoder"], shapes["decoder"])
    places = describe(lambda: bridge.init(jax.random.key(0), ROLES), make_mesh())
    rows = tuple(
        replace(row, theirs=f"{role}.{row.theirs}", ours=f"{role}/{row.ours}", also=())
        for role in ROLES for row in tower_table(shapes[role]).rows
        if f"{role}.{row.theirs.format(i=row.first)}" in tensors.files
    )
    specs = {row.ours: places[row.ours].update(dtype=jnp.float32) for row in rows}
    # The bridge's own parts are read elsewhere.
    return load_params(tensors.path, Table(rows, (rf"({'|'.join(OWN)})\..*",)), specs)


def _check_widths(
    config: Config, trained: Flat, partial: Path, workdir: Path
) -> dict[str, EncoderConfig | DecoderConfig]:
    """The backbones' shapes.

    Raises:
      InputError: the projector's widths differ from theirs.
    """
    paths = {}
    for role in ROLES:
        name = getattr(config, role).checkpoint
        inside = Path(name).is_absolute() and Path(name).is_relative_to(workdir)
        paths[role] = (partial / Path(name).relative_to(workdir) if inside
                       else find_files(name, NOT_WEIGHTS, getattr(config, role).revision))
    shapes = read_shapes(paths)
    first = {"linear": "out", "resampler": "q"}.get(config.projector.name, "hidden")
    widths = {"encoder": trained[f"projector/{first}/kernel"].shape[0],
             "decoder": trained["projector/end"].shape[0]}
    for role, shape in shapes.items():
        if widths[role] != shape.d_model:
            raise InputError(f"the projector expects an {role} of width {widths[role]}, but "
                             f"{getattr(config, role).checkpoint} has {shape.d_model}")
    return shapes


def _langbridge(
    path: Path, described: dict[str, Any], tensors: TensorFiles, named, partial: Path,
    workdir: Path,
) -> tuple[Config, Flat]:
    """Reads LangBridge's layout; writes its two backbones to directories in the workdir."""
    kind = described.get("alignments", "linear")
    if kind not in ALIGNMENTS:
        raise InputError(f"{path}/config.json: alignments is '{kind}', expected one of "
                         f"{', '.join(ALIGNMENTS)}")
    names = _backbones(named, {"encoder": described.get("enc"), "decoder": described.get("lm")})
    for role, name in names.items():
        _write_backbone(role, name, path, tensors, partial / role)
    trained = _read(langbridge_table(ALIGNMENTS[kind]), tensors)
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


def _mindmerger(tensors: TensorFiles, named, start: str) -> tuple[Config, Flat]:
    """Reads MindMerger's mapping; the command line names its backbones."""
    names = _backbones(named, {})
    trained = _read(mindmerger_table(start), tensors)
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
    try:
        adopt(args.source, args.workdir, args.encoder, args.decoder)
    except (InputError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"done: {args.workdir}; score it with: {typed('eval')} --workdir {args.workdir}")


if __name__ == "__main__":
    main()
