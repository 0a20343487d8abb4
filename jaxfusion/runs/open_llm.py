"""Opens an LLM without a bridge: an ordinary checkpoint, or what a Lens run made of one."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import jax
from flax import traverse_util
from jax.sharding import Mesh

from jaxfusion import config as configs
from jaxfusion.config import CONFIG_FILE
from jaxfusion.errors import InputError
from jaxfusion.fields import (
    DTYPES,
    Config,
    DataConfig,
    DecoderSettings,
    EvalConfig,
    LensRunConfig,
    TaskConfig,
)
from jaxfusion.hf.load import open_tensors
from jaxfusion.nn.bridge import Bridge, Params
from jaxfusion.runs.exported import PLAIN
from jaxfusion.runs.open_run import OpenRun, open_run
from jaxfusion.sharding.mesh import make_mesh
from jaxfusion.training.checkpoint import trained_part
from jaxfusion.training.load import LLM, load_llm
from jaxfusion.training.origin import check_origin
from jaxfusion.training.state import Flat

ANSWER = 128  # default limit of a checkpoint's answer, in tokens
LONGEST = 2048  # tokens of a prompt for it


@dataclass(frozen=True)
class OpenLLM:
    """An LLM on the mesh.

    Attributes:
      config: how it is asked. `data.task` is the first one that a Lens run was scored on, or any
        text.
      params: of the LLM. before: those of before Lens; None for an ordinary checkpoint.
    """

    config: Config
    mesh: Mesh
    llm: LLM
    params: Params
    before: Params | None = None

    def on_mesh(self) -> AbstractContextManager:
        """A context with the mesh set, for computation."""
        return jax.set_mesh(self.mesh)

    @property
    def bridge(self) -> Bridge:
        """The LLM as a bridge without an encoder."""
        return Bridge(None, self.llm.decoder, None, "last")


def open_checkpoint(path: Path) -> OpenLLM:
    """Opens a directory in Hugging Face format, in the dtype that it is stored in. Prompts get its
    chat template, if it has one.

    Raises:
      InputError: not an LLM of a known family, or one that cannot be read.
    """
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        llm = load_llm(DecoderSettings(str(path), dtype=_stored(path)), None, None, mesh)
    most = min(ANSWER, llm.decoder.config.max_length // 2)
    config = Config(data=DataConfig(task=PLAIN, chat_template=llm.tokenizers.turn is not None),
                    eval=EvalConfig(max_new_tokens=most, max_decoder_tokens=LONGEST),
                    tasks={PLAIN: TaskConfig("{text}")})
    return OpenLLM(config, mesh, llm, llm.params)


def _stored(path: Path) -> str:
    """The dtype of a checkpoint's first matrix, if it is one of ours."""
    files = open_tensors(path)
    first = next((name for name, shape in files.shapes().items() if len(shape) == 2), None)
    found = first and str(files.read(first, (slice(0, 1), slice(0, 1))).dtype)
    return found if found in DTYPES else DTYPES[0]


def open_lens(workdir: Path) -> OpenLLM | OpenRun:
    """Opens one run of a Lens sweep, with the LLM as it was before, both in memory; of a run behind
    a bridge the bridge, with the LLM as it is now.

    Raises:
      InputError: nothing was trained in `workdir`, the LLM or its bridge cannot be read, or it is
        not the one that the run was trained on.
    """
    lens = configs.load(workdir / CONFIG_FILE)
    check_trained(workdir)
    trained = trained_part(workdir)[1]  # before the LLM, which takes longer
    if lens.bridge:
        return _behind_bridge(workdir, lens, trained)
    mesh = make_mesh(**vars(lens.mesh))
    with jax.set_mesh(mesh):
        llm = load_llm(lens.decoder, lens.data.chat_template, lens.data.bos, mesh)
        check_origin(workdir, llm.origin)
        params = with_top(llm.params, trained)
    return OpenLLM(_asked(lens), mesh, llm, params, llm.params)


def _behind_bridge(workdir: Path, lens: LensRunConfig, trained: Flat) -> OpenRun:
    """The bridge with these blocks on top of its LLM."""
    try:
        run = open_run(Path(lens.bridge))
    except InputError as error:
        raise InputError(f"{workdir} moved the LLM behind a bridge that cannot be opened: {error}. "
                         "Start where the run was trained, or put the exported LLM behind a bridge "
                         "(docs/lens.md) and give that workdir") from None
    run = replace(run, config=replace(run.config, mesh=lens.mesh, decoder=lens.decoder))
    with run.on_mesh():
        check_origin(workdir, run.origin)
    return run.with_frozen(lambda frozen: _on_top(frozen, trained))


def check_trained(workdir: Path) -> None:
    """Raises InputError if a directory has no run of Lens that trained, naming those inside."""
    if not (workdir / "checkpoints").is_dir():
        inside = sorted(str(file.parent) for file in workdir.glob("*/checkpoints"))
        raise InputError(f"{workdir} has no trained LLM; give one of: {', '.join(inside) or '-'}")


def _asked(lens: LensRunConfig) -> Config:
    task, tasks = next(iter(lens.eval.tasks), PLAIN), lens.tasks
    tasks = tasks if task != PLAIN else {**tasks, PLAIN: TaskConfig("{text}")}
    # Scoring cuts long prompts to the run's limit, serving would refuse them.
    longest = max(LONGEST, lens.eval.max_decoder_tokens)
    return Config(data=DataConfig(task=task, chat_template=lens.data.chat_template),
                  eval=replace(lens.eval, tasks=(), max_decoder_tokens=longest), tasks=tasks)


def with_top(params: Params, part: Flat) -> Params:
    """The LLM with these blocks on top.

    Args:
      params: with `decoder`. part: of the last blocks, by path.
    """
    flat = traverse_util.flatten_dict({"decoder": params["decoder"]}, sep="/")
    return {**params, **traverse_util.unflatten_dict(_on_top(flat, part), sep="/")}


def _on_top(flat: Flat, part: Flat) -> Flat:
    """Parameters by path, with the last blocks in the place of those that were there."""
    out = dict(flat)
    for path, new in part.items():
        old = flat[path]
        out[path] = jax.device_put(
            old.at[len(old) - len(new):].set(new.astype(old.dtype)), old.sharding)
    return out
