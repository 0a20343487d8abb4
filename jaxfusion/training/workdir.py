"""The directory of a run: checks that it belongs to this run, and locks it."""

import dataclasses
import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, replace
from glob import has_magic
from pathlib import Path

import jax
from jax.sharding import Mesh

from jaxfusion import config as configs
from jaxfusion.config import CONFIG_FILE, FIRST
from jaxfusion.data.contamination import SEEN
from jaxfusion.errors import InputError
from jaxfusion.fields import ROLES, Config, DataConfig, Job, LensRunConfig
from jaxfusion.files import WRITER, no_room, only_writer
from jaxfusion.hf.hub import COMMIT
from jaxfusion.sharding.hosts import all_or_none, check_peers, is_first
from jaxfusion.sharding.mesh import make_mesh
from jaxfusion.training.checkpoint import Checkpoints
from jaxfusion.training.frozen import FROZEN_FILE
from jaxfusion.training.hooks import PROFILE
from jaxfusion.training.logs import METRICS
from jaxfusion.training.origin import ORIGIN
from jaxfusion.training.trackers import IDS, TENSORBOARD, WANDB, check_trackers

TEMPORARY = ".orbax-checkpoint-tmp"  # in the name of what is being written
# Files of a run that never started, and of one that started but saved no step.
LOCK_FILES = {WRITER, *(f".{CONFIG_FILE}{end}" for end in (".partial", ".sum", ".sum.partial"))}
FILES_BEFORE_A_SAVE = LOCK_FILES | {
    CONFIG_FILE, SEEN, FROZEN_FILE, ORIGIN, METRICS, TENSORBOARD, WANDB, IDS, PROFILE, FIRST,
    *(f".{file}{end}" for file in (SEEN, FROZEN_FILE, ORIGIN, METRICS, IDS)
      for end in (".partial", ".sum", ".sum.partial"))}
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """A workdir that this process, or this group of processes, has to itself.

    Attributes:
      config: with hub commits as an earlier start resolved them. mesh: of `config.mesh`.
      checkpoints: of the workdir.
    """

    config: Job
    workdir: Path
    mesh: Mesh
    checkpoints: Checkpoints

    @property
    def fresh(self) -> bool:
        """Whether nothing is saved that the run would go on from."""
        return not self.checkpoints.steps


@contextmanager
def begin(config: Job, workdir: Path) -> Iterator[Start]:
    """Takes a workdir for a run and puts its mesh in place while the block runs.

    Raises:
      InputError: the workdir holds another run, or another process writes there; the mesh does not
        fit the devices; or processes differ in config or checkpoints.
    """
    with only_run(config, workdir):
        with all_or_none():  # again, now that no other process can write there
            config = check_workdir(config, workdir)
        check_peers(config=json.dumps(dataclasses.asdict(config), sort_keys=True))
        mesh = make_mesh(**vars(config.mesh))
        with jax.set_mesh(mesh), closing(Checkpoints(workdir)) as checkpoints:
            check_peers(checkpoints=str(checkpoints.steps))
            yield Start(config, workdir, mesh, checkpoints)


@contextmanager
def only_run(config: Job, workdir: Path) -> Iterator[None]:
    """Makes the workdir, and keeps other processes from writing there while the block runs. If
    the run fails before it writes anything, new directories are removed.

    Raises:
      InputError: the workdir holds another run, or another process writes there.
    """
    with all_or_none():
        configs.check(config)
        check_trackers(config)
        check_workdir(config, workdir)
    with ExitStack() as stack:
        with all_or_none():
            if is_first():
                _take(workdir, stack)
        with no_room(workdir):
            yield


def _take(workdir: Path, stack: ExitStack) -> None:
    """Makes the workdir and locks it until the stack is closed."""
    try:
        made = [x for x in (workdir, *workdir.parents) if not x.exists()]
        workdir.mkdir(parents=True, exist_ok=True)
        stack.callback(_remove_empty, made)
        stack.enter_context(only_writer(workdir / WRITER, workdir))
    except OSError as error:  # all processes have to hear of it
        raise InputError(f"{workdir} cannot be written: {error}") from None


def _remove_empty(directories: list[Path]) -> None:
    """Removes directories, the innermost first, up to one that holds something."""
    with suppress(OSError):
        for directory in directories:
            directory.rmdir()


def check_workdir(config: Job, workdir: Path) -> Job:
    """The config, with hub commits as the workdir's earlier start resolved them.

    If no step was saved, a different config may replace the old one.

    Raises:
      InputError: the workdir holds another run, or is none.
    """
    file = workdir / CONFIG_FILE
    if has_magic(str(workdir.absolute())):
        raise InputError(f"{workdir.absolute()} has one of * ? [ in it, which the library that "
                         "writes checkpoints takes for a pattern; choose another --workdir")
    if workdir.exists() and not workdir.is_dir():
        raise InputError(f"{workdir} is a file, expected a directory; choose another --workdir")
    if not file.is_file():
        if workdir.exists() and any(x.name not in {*LOCK_FILES, FIRST} for x in workdir.iterdir()):
            raise InputError(
                f"{workdir} is not empty and no run's workdir: {CONFIG_FILE} is missing"
            )
        return config
    old = configs.load(file)
    if not _has_begun(workdir):
        if configs.changed(old, config):
            logger.info("%s: no step was saved under the %s there, which is replaced", workdir,
                        CONFIG_FILE)
        return config
    if old.job != config.job:
        raise InputError(f"{workdir} holds a run of job '{old.job}', this config's job is "
                         f"'{config.job}'; choose another --workdir")
    from_hub = isinstance(config, Config | LensRunConfig)
    for role in [x for x in ROLES if from_hub and hasattr(config, x)]:
        was, now = getattr(old, role), getattr(config, role)
        if _is_mutable(now.revision) and now.checkpoint == was.checkpoint:
            config = replace(config, **{role: replace(now, revision=was.revision)})
    if isinstance(config, Config):
        config = replace(config, data=_same_rows(old.data, config.data))
    if from_hub and config.data.bos is None:
        config = replace(config, data=replace(config.data, bos=old.data.bos))
    if from_hub and config.eval.max_new_tokens is None:  # left open now
        config = replace(
            config, eval=replace(config.eval, max_new_tokens=old.eval.max_new_tokens))
    differences = configs.changed(old, config)
    if differences:
        raise InputError(
            f"{workdir} was written by another config; choose another --workdir or undo: "
            + "; ".join(differences)
        )
    return config


def _has_begun(workdir: Path) -> bool:
    """Whether a workdir holds more than a start leaves that has saved nothing."""
    checkpoints = workdir / "checkpoints"
    if checkpoints.is_dir() and any(
            path.name.partition(".")[0].isdigit() and TEMPORARY not in path.name
            for path in checkpoints.iterdir()):
        return True
    return any(path.name not in FILES_BEFORE_A_SAVE and path != checkpoints
               for path in workdir.iterdir())


def _is_mutable(revision: str | None) -> bool:
    """Whether a revision is a branch or tag rather than a commit."""
    return revision is None or not COMMIT.fullmatch(revision)


def _same_rows(was: DataConfig, now: DataConfig) -> DataConfig:
    """The data with its hub commit as the earlier start resolved it."""
    if _is_mutable(now.revision) and (was.task, was.path) == (now.task, now.path):
        return replace(now, revision=was.revision)
    return now
