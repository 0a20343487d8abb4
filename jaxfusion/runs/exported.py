"""Reads a directory that export.py wrote: its config, its trained part, and the bridge as a run."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfusion.data.tasks.catalogue import TASKS, get_task
from jaxfusion.errors import InputError
from jaxfusion.fields import (
    ROLES,
    AlignerConfig,
    Config,
    DataConfig,
    DecoderSettings,
    EncoderSettings,
    EvalConfig,
    FusionConfig,
    GroupConfig,
    OptimizerConfig,
    ProjectorConfig,
    TaskConfig,
)
from jaxfusion.files import read_object
from jaxfusion.hf.hub import NOT_WEIGHTS, find_files
from jaxfusion.hf.load import TensorFiles, load_params, open_tensors
from jaxfusion.hf.tables import Table, bridge_table, tower_table
from jaxfusion.nn.bridge import OWN
from jaxfusion.nn.decoder import DecoderConfig
from jaxfusion.nn.encoder import EncoderConfig
from jaxfusion.runs.open_run import OpenRun
from jaxfusion.sharding.mesh import make_mesh
from jaxfusion.training.build import describe, make_bridge
from jaxfusion.training.load import read_shapes
from jaxfusion.training.state import Flat

MODEL_TYPE = "jaxfusion_bridge"
LONGEST = 1 << 20  # tokenizers without a limit have one of 30 digits
PLAIN = "text"  # the task of an export that does not name its own


@dataclass(frozen=True)
class OpenExport(OpenRun):
    """An exported bridge, or its bare LLM; `workdir` is the export.

    Attributes:
      part: the trained parameters by path.
    """

    part: Flat = field(default_factory=dict)

    def trained(self) -> tuple[int, dict[str, np.ndarray]]:
        """Step 0, and the trained parameters; none for the bare LLM."""
        return 0, {} if self.llm_only else self.part


def is_export(path: Path) -> bool:
    """Whether export.py wrote a bridge into this directory, with its own code."""
    return described_in(path).get("model_type") == MODEL_TYPE


def described_in(path: Path) -> dict[str, Any]:
    """The directory's `config.json`; empty if there is none, or no JSON object."""
    try:
        return read_object(path / "config.json")
    except InputError:
        return {}


def open_export(path: Path) -> OpenExport:
    """Opens an export without writing a workdir; its backbones are read on first use.

    Raises:
      InputError: its files do not fit together, or a backbone cannot be found.
    """
    described = read_object(path / "config.json")
    config, trained = read_export(path.resolve(), described, dict.fromkeys(ROLES))
    return OpenExport(path, config, part=trained)


def read_export(
    path: Path, described: dict[str, Any], named: dict[str, str | None]
) -> tuple[Config, Flat]:
    """The config and the trained part of an export.

    Args:
      described: its `config.json`. named: other backbones by role.

    Raises:
      InputError: a field of `described` or a tensor is missing, or a backbone does not fit.
    """
    tensors = open_tensors(path)
    try:
        config, trained = _ours(path, described, tensors, named)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}/config.json: a field is missing or has the wrong type "
                         f"({error!r}); export the bridge again") from None
    paths = {role: find_files(tower.checkpoint, NOT_WEIGHTS, tower.revision)
             for role in ROLES for tower in [getattr(config, role)]}
    shapes = fitting_shapes(config, trained, paths)
    trained |= _of_towers(config, shapes, tensors)
    return with_trained(config, trained), trained


def with_trained(config: Config, trained: Flat) -> Config:
    """The config with these parameters as what trains."""
    groups = {"bridge": GroupConfig(tuple(sorted(trained)))}
    return replace(config, optimizer=OptimizerConfig(groups=groups))


def read_params(rows: Table, tensors: TensorFiles) -> Flat:
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


def backbones(named: dict[str, str | None], default: dict[str, str | None]) -> dict[str, str]:
    """The names of both backbones, from the command line or the source.

    Raises:
      InputError: one has no name.
    """
    names = {role: named[role] or default.get(role) for role in named}
    missing = [f"--{role}" for role, name in names.items() if name is None]
    if missing:
        raise InputError(f"the source does not name its backbones; give {' and '.join(missing)}")
    return names


def fitting_shapes(
    config: Config, trained: Flat, paths: dict[str, Path]
) -> dict[str, EncoderConfig | DecoderConfig]:
    """The backbones' shapes.

    Raises:
      InputError: the projector's widths differ from theirs.
    """
    shapes = read_shapes(paths)
    first = {"linear": "out", "resampler": "q"}.get(config.projector.name, "hidden")
    widths = {"encoder": trained[f"projector/{first}/kernel"].shape[0],
              "decoder": trained["projector/end"].shape[0]}
    for role, shape in shapes.items():
        if widths[role] != shape.d_model:
            raise InputError(f"the projector expects an {role} of width {widths[role]}, but "
                             f"{getattr(config, role).checkpoint} has {shape.d_model}")
    return shapes


def _ours(path: Path, described, tensors: TensorFiles, named) -> tuple[Config, Flat]:
    fusion, projector = described["fusion"], described["projector"]
    aligner = described.get("aligner", {"name": "none"})
    parts = {"encoder": described["reader"], "decoder": described["writer"]}
    names = backbones(named, {
        role: str(path / part["checkpoint"]) if part["inside"] else part["checkpoint"]
        for role, part in parts.items()
    })
    trained = read_params(
        bridge_table(fusion["name"], projector["name"], aligner["name"]), tensors)
    revisions = {role: None if named[role] else part["revision"] for role, part in parts.items()}
    task, tasks, language = _task(described)
    dtypes = described.get("trained_on", {}).get("dtypes", {})
    dtypes = [{"dtype": dtypes[role]} if role in dtypes else {} for role in ROLES]
    chat = described.get("chat_template", False)
    config = Config(
        encoder=EncoderSettings(names["encoder"], revisions["encoder"],
                                added_tokens=tuple(described["added_tokens"]),
                                prefix=described.get("query_prefix", ""), **dtypes[0]),
        decoder=DecoderSettings(names["decoder"], revisions["decoder"], **dtypes[1]),
        fusion=FusionConfig(fusion["name"], fusion["layer"], d_ff=fusion["d_ff"]),
        projector=ProjectorConfig(projector["name"], projector["d_ff"], projector["latents"]),
        aligner=AlignerConfig(
            aligner["name"], "paper_code" if aligner.get("padding") else "default"),
        data=DataConfig(task=task, language=language, chat_template=chat,
                        text_prompt=described.get("text_prompt", ""),
                        bos=None if chat else bool(described["start_ids"]),
                        target_eos=_ends_targets(path)),
        tasks=tasks, eval=replace(_limits(path, task, tasks), **_asked(described)),
    )
    return config, trained


def _task(described: dict[str, Any]) -> tuple[str, dict[str, TaskConfig], str]:
    """The task that the bridge was trained on, by name and as a declaration if this version has
    none like it, and the language."""
    told = described.get("trained_on")  # earlier exports do not say
    if told is None:
        return PLAIN, {PLAIN: TaskConfig("{text}")}, "en"
    name, prompt, labels = told["task"], told["prompt"], tuple(told["labels"])
    known = TASKS.get(name)
    if known is not None and (known.prompt, known.labels) == (prompt, labels):
        return name, {}, told["language"]
    name = name if known is None else f"{name}_exported"
    own = TaskConfig(prompt, labels, tuple(told.get("languages", (told["language"],))),
                     extract=told.get("extract"), parallel=told.get("parallel", False),
                     columns=told.get("columns", {}),
                     spellings=tuple(told.get("spellings", ())))
    return name, {name: own}, told["language"]


def _asked(described: dict[str, Any]) -> dict[str, Any]:
    """How the run's `eval` asks; empty for earlier exports."""
    told = described.get("trained_on", {}).get("eval", {})
    return {name: tuple(x) if isinstance(x, list) else x for name, x in told.items()}


def _ends_targets(path: Path) -> bool:
    """Whether targets of training ended in the end token, as the export's tokenizer knows."""
    file = path / "tokenizer_config.json"
    return bool(read_object(file).get("target_eos", True)) if file.is_file() else True


def _limits(path: Path, task: str, tasks: dict[str, TaskConfig]) -> EvalConfig:
    """The run's limits, from where transformers finds them; a task's own limit stays its own."""
    def read(file: str, name: str) -> int | None:
        found = read_object(path / file).get(name) if (path / file).is_file() else None
        return found if isinstance(found, int) and 0 < found < LONGEST else None

    usual = get_task(task, tasks).max_new_tokens
    most = read("generation_config.json", "max_new_tokens")
    longest = read("tokenizer_config.json", "model_max_length")
    return EvalConfig(max_new_tokens=None if most == usual else most,
                      **({"max_encoder_tokens": longest} if longest else {}))


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
