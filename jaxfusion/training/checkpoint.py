"""Checkpoints of the trained part: asynchronous; newest and best kept; damaged ones skipped."""

import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from jaxfusion.errors import InputError
from jaxfusion.training.state import State

logger = logging.getLogger(__name__)
BEST = "greedy_exact"  # the development score that decides which checkpoint is best


class Checkpoints:
    """The checkpoints of a workdir.

    Kept are the two newest (the second in case the first is damaged) and the best on the
    development split.
    """

    def __init__(self, workdir: Path):
        self.path = (workdir / "checkpoints").absolute()
        policy = keep.AnyPreservationPolicy([
            keep.LatestN(2),
            keep.BestN(get_metric_fn=lambda metrics: metrics[BEST], n=1, reverse=False,
                       keep_checkpoints_without_metrics=False),
        ])
        self.manager = ocp.CheckpointManager(
            self.path,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy, best_fn=lambda metrics: metrics[BEST],
                cleanup_tmp_directories=True,
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
            metrics=None if score is None else {BEST: score},
        )

    def wait(self) -> None:
        """Returns when what was saved is on disk."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        self.manager.close()

    @property
    def steps(self) -> list[int]:
        return sorted(self.manager.all_steps())

    def restore_newest(self, abstract: State) -> tuple[State, dict[str, Any]] | None:
        """The newest checkpoint that can be read, or None if there is none.

        A damaged one is set aside as `STEP.damaged`, and said; the one before it is tried.

        Raises:
          InputError: there are checkpoints, but none can be read.
        """
        steps = self.steps
        for step in reversed(steps):
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
                return restored["state"], restored["data"]
            except Exception as error:
                self._set_aside(step, error)
        if steps:
            raise InputError(
                f"no checkpoint in {self.path} can be read; start anew with another --workdir"
            )
        return None

    def _set_aside(self, step: int, error: Exception) -> None:
        damaged = self.path / str(step)
        aside = damaged.with_name(f"{step}.damaged")
        logger.warning(
            "checkpoint %s is damaged and set aside as %s; the one before it is used (%s)",
            damaged, aside.name, str(error).splitlines()[0],
        )
        shutil.rmtree(aside, ignore_errors=True)
        damaged.rename(aside)
        self.manager.reload()

    def restore_trained(self) -> tuple[int, dict[str, np.ndarray]]:
        """Step and trained parameters of the best checkpoint (the newest where none was scored).

        Raises:
          InputError: the workdir has no checkpoint.
        """
        best = self.manager.best_step()
        step = best if best is not None else self.manager.latest_step()
        if step is None:
            raise InputError(f"{self.path} holds no checkpoint: train first")
        stored = dict(self.manager.item_metadata(step)["state"].tree["trainable"])
        as_numpy = dict.fromkeys(stored, ocp.RestoreArgs(restore_type=np.ndarray))
        restored = self.manager.restore(step, args=ocp.args.Composite(
            state=ocp.args.PyTreeRestore(
                {"trainable": stored}, restore_args={"trainable": as_numpy}, partial_restore=True
            ),
        ))
        return step, restored["state"]["trainable"]


def abstract_like(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree's arrays."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )
