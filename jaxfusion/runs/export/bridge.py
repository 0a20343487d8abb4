"""Exports a trained bridge as a Hugging Face directory that plain PyTorch loads."""

import copy
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from jaxfusion.config import CONFIG_FILE
from jaxfusion.data.languages import by_every_code
from jaxfusion.data.tasks.catalogue import get_task
from jaxfusion.data.tokenizers import Tokenizers
from jaxfusion.errors import InputError, choose
from jaxfusion.evaluation.scoring import answering, for_task
from jaxfusion.fields import DTYPES, JOBS, ROLES, Config
from jaxfusion.files import new_directory
from jaxfusion.hf.encoders import encoder_json
from jaxfusion.hf.load import open_tensors, read_config
from jaxfusion.hf.save import copy_tower, to_tensors, tower_names, write_shards, write_tokenizer
from jaxfusion.hf.tables import Table, bridge_table, tower_table
from jaxfusion.runs.export.card import (
    CARD,
    TOLD,
    USAGE,
    base_of,
    learned,
    metadata,
    read_scores,
    stages,
    trained_in,
    write_card,
)
from jaxfusion.runs.open_run import open_run
from jaxfusion.sharding.mesh import make_mesh
from jaxfusion.training.build import initialise_own, plan_model
from jaxfusion.training.checkpoint import read_notes
from jaxfusion.training.frozen import frozen_part
from jaxfusion.training.load import open_towers
from jaxfusion.training.origin import check_origin
from jaxfusion.training.state import Flat

CODE = ("modeling_jaxfusion.py", "tokenization_jaxfusion.py")
# Of the run's `eval`, besides the limits that transformers has fields for.
ASKED = ("max_decoder_tokens", "stop", "temperature", "top_p")
QUERY = "{query}"  # in a text prompt
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """A workdir's best checkpoint, with config, backbones and tokenizers."""

    workdir: Path
    step: int
    config: Config
    trained: Flat
    paths: dict[str, Path]
    shapes: dict[str, Any]
    tokenizers: Tokenizers

    def own(self, rows: Table) -> dict[str, np.ndarray]:
        """The bridge's own parts, with a table's names."""
        return dict(to_tensors(rows, traverse_util.unflatten_dict(self.trained, sep="/")))

    def replaced(self, role: str) -> dict[str, np.ndarray]:
        """The trained tensors of a tower."""
        return dict(trained_tensors(role, self.trained, tower_table(self.shapes[role])))

    def json(self, role: str) -> dict[str, Any]:
        """A tower's `config.json`; an encoder-decoder's is reduced to its encoder."""
        config = read_config(self.paths[role])
        if role == "decoder":
            return config
        return {**config, "architectures": encoder_json(self.shapes[role])["architectures"],
                "is_encoder_decoder": False}

    def dtype(self, role: str) -> str:
        """The stored dtype of a tower's embedding table."""
        files = open_tensors(self.paths[role])
        table_name = next(iter(self.names(role).values()))
        return str(files.read(table_name, (slice(0, 1), slice(0, 1))).dtype)

    def is_alone(self, role: str) -> bool:
        """Whether a tower's files have its tensors by their usual names: for M2M100, an encoder
        without its decoder."""
        return all(usual == stored for usual, stored in self.names(role).items())

    def names(self, role: str) -> dict[str, str]:
        """The tensors of a tower: usual name -> name in its files."""
        files = open_tensors(self.paths[role]).files
        return tower_names(tower_table(self.shapes[role]), self.shapes[role].num_layers, files)


def collect(workdir: Path, out: Path) -> Trained:
    """Reads the workdir; raises InputError if `out` would overwrite it or its backbones, or if they
    are not those that it was trained on."""
    run = open_run(workdir)
    check_out(out, workdir)
    step, trained = run.trained()
    towers = open_towers(run.config)
    check_origin(workdir, towers.origin)
    check_out(out, *towers.paths.values())
    config, shapes = towers.config, towers.shapes
    own = bridge_table(config.fusion.name, config.projector.name, config.aligner.name)
    trained = _with_frozen(config, workdir, trained, shapes, own)
    _check_trained(trained, own, {role: tower_table(shapes[role]) for role in ROLES}, workdir)
    return Trained(workdir, step, config, trained, towers.paths, shapes, towers.tokenizers)


def _with_frozen(
    config: Config, workdir: Path, trained: Flat, shapes: dict[str, Any], own: Table
) -> Flat:
    """The trained parameters, and frozen ones of the bridge's own parts."""
    required = {row.ours for row in own.rows}
    available = frozen_part(workdir, config, complete=required <= set(trained)) | trained
    if required <= set(available):
        return available
    # Earlier releases did not save them; they equal the initialisation with the run's seed.
    fresh = initialise_own(plan_model(config, shapes, make_mesh()), config.train.seed)
    return {path: np.asarray(fresh[path]) for path in required & set(fresh)} | available


def check_out(out: Path, *inputs: Path) -> None:
    """Raises InputError if writing to `out` would change the inputs, or any workdir."""
    place = out.resolve()
    for path in inputs:
        if path.resolve().is_relative_to(place):
            raise InputError(f"{out} contains {path}, an input; give another directory")
        if place.is_relative_to(path.resolve()):
            raise InputError(f"{out} is inside {path}, an input; give a directory outside")
    for path in place.parents:
        if _is_workdir(path):
            raise InputError(f"{out} is inside the workdir {path}; give a directory outside")
    for file in [place / CONFIG_FILE, *place.rglob(f"*/{CONFIG_FILE}")]:
        if _is_workdir(file.parent):
            raise InputError(f"{out} contains the workdir {file.parent}; give another directory")


def _is_workdir(path: Path) -> bool:
    """Whether train.py started a run in this directory."""
    try:
        config = json.loads((path / CONFIG_FILE).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("job") in JOBS


def check_dtype(dtype: str | None) -> None:
    """Raises InputError for an unsupported dtype."""
    if dtype is not None:
        choose("dtype", dtype, DTYPES)


def export(
    workdir: Path, out: Path, *, dtype: str | None = None, merge: bool = False,
    overwrite: bool = False, hub_name: str | None = None,
) -> None:
    """Writes a workdir's best checkpoint as a directory for `AutoModelForCausalLM`.

    It has the trained part and the names of its two backbones; with `merge`, it includes them in
    `encoder/` and `decoder/`, each an ordinary checkpoint of its own family.

    Args:
      dtype: of the written backbones; None keeps the dtype of each tensor, trained or not. Fusion
        and projector stay float32.
      hub_name: where the export will be on the hub, for the model card.

    Raises:
      InputError: no trained bridge in `workdir`, `out` is not empty, or the export is for the hub
        and refers to directories of this machine.
    """
    check_dtype(dtype)
    if dtype is not None and not merge:
        raise InputError("--dtype applies to the backbones, which only --merge writes")
    bridge = collect(workdir, out)
    config, tokenizers = bridge.config, bridge.tokenizers
    replaced = {role: bridge.replaced(role) for role in ROLES}
    described = {**_describe(bridge, merge, dtype),
                 "unfrozen": [f"{role}.{name}" for role in ROLES for name in replaced[role]]}
    _check_local(described, out, hub_name)
    with new_directory(out, overwrite) as partial:
        tensors = bridge.own(bridge_table(config.fusion.name, config.projector.name,
                                          config.aligner.name))
        for role in ROLES:
            if merge:
                copy_tower(bridge.paths[role], partial / role, bridge.json(role),
                           bridge.names(role), replaced[role], dtype)
                write_tokenizer(partial / role, getattr(tokenizers, role))
            else:
                tensors |= {f"{role}.{name}": x for name, x in replaced[role].items()}
        write_shards(partial, tensors.items())
        (partial / "config.json").write_text(json.dumps(described, indent=2) + "\n", "utf-8")
        for name in CODE:
            source = resources.files("jaxfusion.hf").joinpath(name)
            (partial / name).write_text(source.read_text("utf-8"), "utf-8")
        _write_tokenizers(partial, bridge, described)
        write_bridge_card(partial, bridge, described, hub_name)


def _check_local(described: dict[str, Any], out: Path, hub_name: str | None) -> None:
    """Warns of an export that only this machine can load.

    Raises:
      InputError: it is for the hub.
    """
    local = [described[part]["checkpoint"] for part in ("reader", "writer")
             if Path(described[part]["checkpoint"]).is_absolute()]
    if local and hub_name:
        raise InputError(f"without --merge the export refers to {local[0]}, which is on this "
                         "machine alone; add --merge to push it")
    if local:
        logger.warning("%s refers to backbones on this machine; use --merge to share it", out)


def _write_tokenizers(out: Path, bridge: Trained, described: dict[str, Any]) -> None:
    """Writes both tokenizers as one, and the generation config."""
    from transformers import GenerationConfig

    from jaxfusion.hf.tokenization_jaxfusion import BridgeTokenizer

    config, tokenizers = bridge.config, bridge.tokenizers
    answers = copy.deepcopy(tokenizers.decoder)
    if answers.pad_token is None:
        answers.pad_token = answers.eos_token
    turn = tokenizers.turn and {"after": tokenizers.turn.after, "lead": tokenizers.turn.lead}
    settings = {
        "query_offset": described["query_offset"], "prompt_offset": described["prompt_offset"],
        "eos_token_id": tokenizers.eos, "target_eos": tokenizers.ends_targets,
        "text_prompt": config.data.text_prompt, "turn": turn,
        "query_prefix": tokenizers.query_prefix,
        "languages": tokenizers.languages and by_every_code(tokenizers.languages),
    }
    BridgeTokenizer(tokenizers.encoder, answers, settings,
                    model_max_length=config.eval.max_encoder_tokens).save_pretrained(out)
    settings = for_task(answering(config.eval), get_task(config.data.task, config.tasks))
    ends = [tokenizers.eos, *(x for x in tokenizers.ends if x != tokenizers.eos)]
    GenerationConfig(
        max_new_tokens=settings.max_new_tokens, do_sample=False,
        pad_token_id=described["pad_token_id"], eos_token_id=ends,
        bos_token_id=tokenizers.decoder.bos_token_id).save_pretrained(out)


def _check_trained(trained: Flat, own: Table, tables: dict[str, Table], workdir: Path) -> None:
    """Raises InputError if the checkpoint does not match the config."""
    required = {row.ours for row in own.rows}
    towers = {f"{role}/{row.ours}" for role in ROLES for row in tables[role].rows}
    missing, unknown = required - set(trained), set(trained) - required - towers
    if missing or unknown:
        raise InputError(f"{workdir}: its checkpoint does not match its config; missing "
                         f"{sorted(missing)}, unknown {sorted(unknown)}")


def trained_tensors(role: str, trained: Flat, rows: Table) -> Iterator[tuple[str, np.ndarray]]:
    """The Hugging Face tensors of a tower's trained parameters.

    Raises:
      InputError: only a part of a tensor was trained (Phi-3's fused ones).
    """
    flat = {row.ours: trained[f"{role}/{row.ours}"] for row in rows.rows
            if f"{role}/{row.ours}" in trained}
    chosen = tuple(row for row in rows.rows if row.ours in flat)
    fused = {row.theirs for row in chosen if row.part}
    left_out = [row.ours for row in rows.rows if row.theirs in fused and row.ours not in flat]
    if left_out:
        raise InputError(f"{', '.join(left_out)} share a tensor with trained parameters but are "
                         "frozen; train the full tensor")
    yield from to_tensors(Table(chosen), traverse_util.unflatten_dict(flat, sep="/"))


def _describe(bridge: Trained, merge: bool, dtype: str | None) -> dict[str, Any]:
    """The bridge's `config.json`; its fields are not named encoder and decoder, which transformers
    treats specially."""
    config, shapes = bridge.config, bridge.shapes

    def backbone(role: str) -> dict[str, Any]:
        tower = getattr(config, role)
        local = Path(tower.checkpoint).expanduser()
        name = role if merge else str(local.resolve()) if local.is_dir() else tower.checkpoint
        return {"checkpoint": name, "inside": merge, "width": shapes[role].d_model,
                "revision": None if merge else tower.revision,
                "dtype": (merge and dtype) or bridge.dtype(role)}

    encoder, decoder = shapes["encoder"], bridge.tokenizers.decoder
    hidden = config.projector.d_ff or 2 * encoder.d_model
    return {
        "model_type": "jaxfusion_bridge", "architectures": ["BridgeForCausalLM"],
        "auto_map": {"AutoConfig": "modeling_jaxfusion.BridgeConfig",
                     "AutoModelForCausalLM": "modeling_jaxfusion.BridgeForCausalLM"},
        **_ids(bridge),
        "reader": {**backbone("encoder"), "layers": encoder.num_layers, "family": encoder.family,
                   "alone": merge or bridge.is_alone("encoder")},
        "writer": {**backbone("decoder"), "capped": shapes["decoder"].attn_cap is not None},
        "fusion": {"name": config.fusion.name, "layer": config.fusion.layer,
                   "d_ff": config.fusion.d_ff},
        "projector": {"name": config.projector.name, "d_ff": hidden,
                      "latents": config.projector.latents},
        "aligner": {"name": config.aligner.name, "layers": shapes["decoder"].num_layers,
                    "padding": config.aligner.recipe == "paper_code"},
        "added_tokens": list(config.encoder.added_tokens),
        "query_prefix": config.encoder.prefix,
        "bos_token_id": decoder.bos_token_id, "eos_token_id": bridge.tokenizers.eos,
        "start_ids": bridge.tokenizers.start,
        "after_ids": None if QUERY in config.data.text_prompt
        else bridge.tokenizers.encode_prompts([config.data.text_prompt])[0],
        "text_prompt": config.data.text_prompt,
        "chat_template": config.data.chat_template,
        "trained_on": _task_of(config),
        "jaxfusion_version": version("jaxfusion"),
    }


def _task_of(config: Config) -> dict[str, Any]:
    """What the bridge was trained to answer, how it is asked, and the dtypes of its towers."""
    task, own = get_task(config.data.task, config.tasks), config.tasks.get(config.data.task)
    of_rows = {"columns": own.columns, "spellings": list(own.spellings)} if own else {}
    return {"task": config.data.task, "language": config.data.language, "prompt": task.prompt,
            "labels": list(task.labels), "languages": list(task.languages),
            "extract": own and own.extract, "parallel": task.parallel, **of_rows,
            "eval": {name: getattr(config.eval, name) for name in ASKED},
            "dtypes": {role: getattr(config, role).dtype for role in ROLES}}


def _ids(bridge: Trained) -> dict[str, Any]:
    """The id ranges of answers, queries and prompts; see `tokenization_jaxfusion.py`."""
    encoder, decoder = bridge.tokenizers.encoder, bridge.tokenizers.decoder
    rows = {role: bridge.shapes[role].vocab_size for role in ROLES}
    # A tokenizer may have tokens beyond its model's table.
    first = max(rows["decoder"], *(1 + i for i in decoder.get_vocab().values()))
    language = next(iter(bridge.tokenizers.languages or {}), "")
    last = bridge.tokenizers.encode_queries(["a"], [language])[0][-1]
    pad = first + (encoder.pad_token_id or 0)
    return {
        "vocab_size": rows["decoder"], "query_offset": first,
        "prompt_offset": first + rows["encoder"],
        "query_pad_id": pad, "pad_token_id": pad,
        "query_end_id": first + last if last == encoder.eos_token_id else None,
    }


def _unfilled(config: Config) -> str:
    """The task's prompt as a text in quotes, with "..." for each column."""
    prompt = get_task(config.data.task, config.tasks).prompt
    return json.dumps(prompt.format(**dict.fromkeys(re.findall(r"{(\w+)}", prompt), "...")),
                      ensure_ascii=False)


def _chosen(bridge: Trained) -> str:
    """Why it is this step, if a score of the run says so."""
    best = read_notes(bridge.workdir / "checkpoints" / str(bridge.step)).best
    if best is None or best.name is None or best.step != bridge.step:
        return ""
    return f", which has the run's best `{best.name}` on development rows ({best.score:.3f})"


def write_bridge_card(
    folder: Path, bridge: Trained, described: dict[str, Any], hub_name: str | None,
    usage: str | None = None,
) -> None:
    """Writes the model card: metadata, usage, parts and their licences, scores, config.

    Args:
      hub_name: where the export will be on the hub.
      usage: how it is loaded, `{place}` filled in; default: with transformers.
    """
    config, name = bridge.config, hub_name or "jaxfusion-bridge"
    trained = stages(config, bridge.workdir)
    bases = [base_of(title, getattr(config, role).checkpoint, bridge.paths[role])
             for role, title in (("encoder", "encoder"), ("decoder", "LLM"))]
    scores = read_scores(bridge.workdir, config, bridge.step)
    data = metadata(
        name.split("/")[-1], bases, trained, scores,
        **({} if usage else {"library_name": "transformers"}), pipeline_tag="text-generation",
        tags=["jaxfusion", "langbridge", "multilingual"])
    shown = {**described}
    for part, base in zip(("reader", "writer"), bases, strict=True):
        if part in described and not described[part]["inside"]:
            shown[part] = {**described[part], "checkpoint": base.name}
    write_card(folder, data, CARD.format(
        fusion=config.fusion.name, projector=config.projector.name,
        learned=", after a stage on ".join(map(learned, trained)), step=bridge.step,
        chosen=_chosen(bridge), scores=scores.table(),
        usage=(usage or USAGE).format(
            place=f'"{hub_name}"' if hub_name else "DIR", text=_unfilled(config),
            told=TOLD.format(trained_in(config)[0]) if bridge.tokenizers.languages else ""),
        parts="\n".join(base.line() for base in bases), config=json.dumps(shown, indent=2)))
