"""Checkpoints of the trained part: asynchronous; newest and best kept; damaged ones skipped."""

import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from jaxfusion.errors import InputError, first_line
from jaxfusion.training.state import State

logger = logging.getLogger(__name__)
SCORE = "score"  # what decides which checkpoint is best; a run says which score that is


class Checkpoints:
    """The checkpoints of a workdir.

    Kept are the two newest (the second in case the first is damaged) and the best on the
    development split.
    """

    def __init__(self, workdir: Path, read_only: bool = False):
        self.path = (workdir / "checkpoints").absolute()
        if read_only and not self.path.is_dir():
            raise InputError(f"{self.path} holds no checkpoint: train first")
        policy = keep.AnyPreservationPolicy([
            keep.LatestN(2),
            keep.BestN(get_metric_fn=lambda metrics: metrics[SCORE], n=1, reverse=False,
                       keep_checkpoints_without_metrics=False),
        ])
        self.manager = ocp.CheckpointManager(
            self.path,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy, best_fn=lambda metrics: metrics[SCORE],
                # A reader leaves alone what another process may be writing just now.
                cleanup_tmp_directories=not read_only, read_only=read_only,
            ),
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(), "data": ocp.JsonCheckpointHandler()
            },
        )

    def save(self, state: State, data: dict[str, Any], score: float | None) -> None:
        """Writes in the background: the state, the data iterator's position, and the score."""
        self.manager.save(
            int(state.step),
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(state), data=ocp.args.JsonSave(data)
            ),
            metrics=None if score is None else {SCORE: score},
        )

    def wait(self) -> None:
        """Returns when what was saved is on disk."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        """Waits for what is being written, and stops."""
        self.manager.close()

    @property
    def steps(self) -> list[int]:
        """Those that are saved, ascending."""
        return sorted(self.manager.all_steps())

    def restore_newest(self, abstract: State) -> tuple[State, dict[str, Any]] | None:
        """The newest checkpoint that can be read, or None if there is none.

        One that cannot be read is set aside as `STEP.damaged`, and said, once the one before it
        could be; where none can be read, all stay as they are.

        Raises:
          InputError: there are checkpoints, but none can be read.
        """
        failed: list[tuple[int, Exception]] = []
        for step in reversed(self.steps):
            try:
                restored = self.manager.restore(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.PyTreeRestore(
                            abstract,
                            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
                        ),
                        data=ocp.args.JsonRestore(),
                    ),
                )
            except Exception as error:
                failed.append((step, error))
                continue
            for damaged, error in failed:
                self._set_aside(damaged, error)
            return restored["state"], restored["data"]
        if failed:
            raise self._none_readable(failed[0][1])
        return None

    def _none_readable(self, error: Exception) -> InputError:
        return InputError(
            f"no checkpoint in {self.path} can be read ({first_line(error)}); nothing was changed; "
            "mend the cause, or start anew with another --workdir"
        )

    def _set_aside(self, step: int, error: Exception) -> None:
        damaged = self.path / str(step)
        aside = damaged.with_name(f"{step}.damaged")
        logger.warning(
            "checkpoint %s is damaged and set aside as %s; the one before it is used (%s)",
            damaged, aside.name, first_line(error),
        )
        shutil.rmtree(aside, ignore_errors=True)
        damaged.rename(aside)
        self.manager.reload()

    def restore_trained(self) -> tuple[int, dict[str, np.ndarray]]:
        """Step and trained parameters of the best checkpoint (the newest where none was scored).

        One that cannot be read is passed over, and said, for the newest that can.

        Raises:
          InputError: the workdir has no checkpoint, or none that can be read.
        """
        best, steps = self.manager.best_step(), self.steps[::-1]
        if not steps:
            raise InputError(f"{self.path} holds no checkpoint: train first")
        error: Exception | None = None
        for step in dict.fromkeys([*([] if best is None else [best]), *steps]):
            try:
                return step, self._trained(step)
            except Exception as failure:
                logger.warning("checkpoint %s cannot be read and is passed over (%s)",
                               self.path / str(step), first_line(failure))
                error = error or failure
        raise self._none_readable(error)

    def _trained(self, step: int) -> dict[str, np.ndarray]:
        stored = dict(self.manager.item_metadata(step)["state"].tree["trainable"])
        as_numpy = dict.fromkeys(stored, ocp.RestoreArgs(restore_type=np.ndarray))
        restored = self.manager.restore(step, args=ocp.args.Composite(
            state=ocp.args.PyTreeRestore(
                {"trainable": stored}, restore_args={"trainable": as_numpy}, partial_restore=True
            ),
        ))
        return restored["state"]["trainable"]


def trained_part(workdir: Path) -> tuple[int, dict[str, np.ndarray]]:
    """Step and trained parameters of a workdir's best checkpoint; see `restore_trained`."""
    checkpoints = Checkpoints(workdir, read_only=True)
    try:
        return checkpoints.restore_trained()
    finally:
        checkpoints.close()


def saved_steps(workdir: Path) -> list[int]:
    """Steps of the finished checkpoints; a save that was cut short leaves none."""
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return sorted(int(name) for name in names if name.isdigit())


def abstract_like(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree's arrays."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )
