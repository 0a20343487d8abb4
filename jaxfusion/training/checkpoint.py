"""Checkpoints of the trained part: asynchronous; newest and best kept; damaged ones skipped.

A checkpoint is a directory named after its step: `state` has the arrays, `data` the position in
the batches and the best score so far, `metrics` the score, and `digests` what all of it was when it
was saved. What is read is compared with that.
"""

import json
import logging
import math
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from jaxfusion.data.pipeline import batches_taken
from jaxfusion.errors import InputError, first_line
from jaxfusion.files import no_room
from jaxfusion.sharding.hosts import in_any, is_first, wait_for_peers
from jaxfusion.training.digest import digests, host_digests
from jaxfusion.training.state import State

logger = logging.getLogger(__name__)
BEST = "best"  # beside the position in the batches: of both, a copy is with the digests
SCORE = "score"  # what decides which checkpoint is best; a run says which score that is


class Damaged(Exception):
    """A checkpoint is not what was saved."""


@dataclass(frozen=True)
class Best:
    """The best score of a run so far.

    Attributes:
      step: at which it was reached first. since: how many scores came later; none is better.
      name: which score it is; None if an earlier version did not say.
    """

    step: int
    score: float
    since: int = 0
    name: str | None = None


def best_of(before: Best | None, step: int, score: float, name: str | None = None) -> Best | None:
    """The best score after one more; one that is not a number is never better."""
    if not math.isnan(score) and (before is None or score > before.score):
        return Best(step, score, name=name)
    return before and replace(before, since=before.since + 1)


@dataclass(frozen=True)
class Notes:
    """What a checkpoint stores besides its arrays.

    Attributes:
      data: the position in the batches. score: None where none was given.
      best: the best score up to it; None where there is none, as in earlier versions.
      digests: of the arrays by path; None in a checkpoint of a version that made none.
    """

    data: dict[str, Any]
    score: float | None
    digests: dict[str, str] | None
    best: Best | None = None


class Checkpoints:
    """The checkpoints of a workdir.

    Kept are the two newest (the second in case the first is damaged) and the best on the
    development split.

    Raises:
      InputError: `checkpoints` is a file, or is missing in read-only mode.
    """

    def __init__(self, workdir: Path, read_only: bool = False):
        self.path = (workdir / "checkpoints").absolute()
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file, expected a directory of checkpoints; move it "
                             "away")
        if read_only and not self.path.is_dir():
            raise InputError(f"{self.path} holds no checkpoint: train first")

    @cached_property
    def manager(self) -> ocp.CheckpointManager:
        """What writes; it reads every score, so damaged checkpoints have to be set aside before."""
        policy = keep.AnyPreservationPolicy([
            keep.LatestN(2),
            keep.BestN(get_metric_fn=lambda metrics: _rank(metrics[SCORE]), n=1, reverse=False,
                       keep_checkpoints_without_metrics=False),
        ])
        return ocp.CheckpointManager(
            self.path,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy, best_fn=lambda metrics: _rank(metrics[SCORE]),
                cleanup_tmp_directories=True,
            ),
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(), "data": ocp.JsonCheckpointHandler(),
                "digests": ocp.JsonCheckpointHandler(),
            },
        )

    def save(
        self, state: State, data: dict[str, Any], score: float | None, best: Best | None = None
    ) -> None:
        """Writes in the background: the state, the data iterator's position, the score, and the
        best score so far. A checkpoint of the same step, which was not scored, is replaced.

        Raises:
          InputError: the disk is full, now or when the one before was written.
        """
        if int(state.step) in self.steps:
            self.manager.delete(int(state.step))
        data = data if best is None else {**data, BEST: asdict(best)}
        made = {"step": int(state.step), "data": data, "score": score, "arrays": digests(state)}
        with no_room(self.path):
            self.manager.save(
                int(state.step),
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(state), data=ocp.args.JsonSave(data),
                    digests=ocp.args.JsonSave(made),
                ),
                metrics=None if score is None else {SCORE: score},
            )

    def wait(self) -> None:
        """Returns when what was saved is on disk.

        Raises:
          InputError: the disk is full.
        """
        if "manager" in vars(self):
            with no_room(self.path):
                self.manager.wait_until_finished()

    def close(self) -> None:
        """Waits for what is being written, and stops."""
        if "manager" in vars(self):
            with no_room(self.path):
                self.manager.close()

    @property
    def steps(self) -> list[int]:
        """Those that are saved, ascending."""
        return saved_steps(self.path.parent)

    def restore_newest(self, abstract: State) -> tuple[State, Notes] | None:
        """The newest checkpoint that can be read, or None if there is none.

        A damaged one is renamed to `STEP.damaged`, with a warning, once another could be read;
        where none can be read, all stay as they are.

        Raises:
          InputError: there are checkpoints, but none can be read.
        """
        failed: dict[int, Exception] = {}
        found, newest = None, -1
        for step in reversed(self.steps):
            try:
                notes = _in_all(lambda step=step: read_notes(self.path / str(step)))
                if found is None:
                    found, newest = (self._restore(step, abstract, notes), notes), step
            except Exception as error:
                failed[step] = error
        if found is None and failed:
            raise self._none_readable(next(iter(failed.values())))
        for damaged, error in failed.items():
            self._set_aside(damaged, error, newer=damaged > newest)
        return found

    def _restore(self, step: int, abstract: State, notes: Notes) -> State:
        args = ocp.args.PyTreeRestore(
            abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract))
        # The handler alone: it waits for no other process, of which one may fail.
        state = _in_all(lambda: ocp.PyTreeCheckpointHandler().restore(
            self.path / str(step) / "state", args=args))
        if int(state.step) != step:
            raise Damaged(f"it holds step {int(state.step)}")
        if notes.digests is None:
            _say_unchecked(self.path / str(step))
            return state
        found = digests(state)
        _in_all(lambda: _compare(notes.digests, found))
        return state

    def _none_readable(self, error: Exception) -> InputError:
        return InputError(
            f"no checkpoint in {self.path} can be read ({first_line(error)}); nothing was changed; "
            "repair the cause, or start again with another --workdir"
        )

    def _set_aside(self, step: int, error: Exception, newer: bool) -> None:
        damaged = self.path / str(step)
        aside = damaged.with_name(f"{step}.damaged")
        logger.warning("checkpoint %s is damaged and set aside as %s%s (%s)", damaged, aside.name,
                       "; the one before it is used" if newer else "", first_line(error))
        if is_first():
            shutil.rmtree(aside, ignore_errors=True)
            damaged.rename(aside)
        wait_for_peers(f"{step} set aside")

    def restore_trained(self) -> tuple[int, dict[str, np.ndarray]]:
        """Step and trained parameters of the best checkpoint (the newest where none was scored).

        A damaged one is skipped, with a warning, for the newest that is intact.

        Raises:
          InputError: the workdir has no checkpoint, or none that can be read.
        """
        steps = self.steps[::-1]
        if not steps:
            raise InputError(f"{self.path} holds no checkpoint: train first")
        notes: dict[int, Notes] = {}
        first: Exception | None = None
        for step in steps:
            try:
                notes[step] = read_notes(self.path / str(step))
            except Exception as error:
                if self._is_gone(step):
                    return self.restore_trained()
                first = first or self._pass_over(step, error)
        scored = [step for step in notes if notes[step].score is not None]
        best = [_highest(notes, scored)] if scored else []
        for step in dict.fromkeys([*best, *notes]):
            try:
                return step, self._trained(step, notes[step])
            except Exception as error:
                if self._is_gone(step):
                    return self.restore_trained()
                first = first or self._pass_over(step, error)
        raise self._none_readable(first)

    def _is_gone(self, step: int) -> bool:
        """Whether a run that is still training has removed a checkpoint since it was listed."""
        return not (self.path / str(step)).is_dir()

    def _pass_over(self, step: int, error: Exception) -> Exception:
        logger.warning("checkpoint %s cannot be read and is passed over (%s)",
                       self.path / str(step), first_line(error))
        return error

    def _trained(self, step: int, notes: Notes) -> dict[str, np.ndarray]:
        handler, place = ocp.PyTreeCheckpointHandler(), self.path / str(step) / "state"
        stored = {"step": (tree := handler.metadata(place).tree)["step"],
                  "trainable": dict(tree["trainable"])}
        restored = handler.restore(place, args=ocp.args.PyTreeRestore(
            stored, partial_restore=True, restore_args=jax.tree.map(
                lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)))
        if int(restored["step"]) != step:
            raise Damaged(f"it holds step {int(restored['step'])}")
        if notes.digests is None:
            _say_unchecked(self.path / str(step))
        else:
            saved = {name: x for name, x in notes.digests.items() if name.startswith("trainable/")}
            _compare(saved, host_digests({f"trainable/{name}": x
                                          for name, x in restored["trainable"].items()}))
        return restored["trainable"]


def read_notes(place: Path) -> Notes:
    """What a checkpoint's directory stores besides its arrays, checked.

    Raises:
      Damaged, OSError, ValueError, KeyError, TypeError: it does not, or cannot be read.
    """
    items = _json(place / "_CHECKPOINT_METADATA")["item_handlers"]
    data = _json(place / "data" / "metadata")
    # Adopted checkpoints have no position.
    if data != {} and batches_taken(data) != int(place.name):
        raise Damaged(f"its data position is {batches_taken(data)}, expected {place.name}")
    score = None
    if "metrics" in items or (place / "metrics").exists():
        score = _json(place / "metrics" / "metrics")[SCORE]
        if isinstance(score, bool) or not isinstance(score, int | float):
            raise Damaged(f"its score is {score!r}, expected a number")
    position = {name: value for name, value in data.items() if name != BEST}
    best = Best(**data[BEST]) if BEST in data else None
    if "digests" not in items and not (place / "digests").exists():
        return Notes(position, score, None, best)
    saved = _json(place / "digests" / "metadata")
    for name, value in (("step", int(place.name)), ("data", data), ("score", score)):
        if saved[name] != value and not (_is_nan(saved[name]) and _is_nan(value)):
            raise Damaged(f"its {name} is {value}, but {saved[name]} was saved")
    return Notes(position, score, dict(saved["arrays"]), best)


def _is_nan(x: Any) -> bool:
    return isinstance(x, float) and math.isnan(x)


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise Damaged(f"{file.parent.name}/{file.name}: {first_line(error)}") from None


def _compare(saved: dict[str, str], found: dict[str, str]) -> None:
    """Raises Damaged unless the digests are the same."""
    for name in sorted(saved.keys() | found.keys()):
        if saved.get(name) != found.get(name):
            raise Damaged(f"{name} is not what was saved: its digest is {found.get(name)}, "
                          f"expected {saved.get(name)}")


def _in_all(read):
    """What `read` gives, if it does so in all processes.

    Raises:
      Exception: the one of this process, or Damaged where another one failed.
    """
    error = found = None
    try:
        found = read()
    except Exception as raised:
        error = raised
    failed = in_any(error is not None)
    if error is not None:
        raise error
    if failed:
        raise Damaged("another process cannot read it")
    return found


def _say_unchecked(place: Path) -> None:
    logger.info("checkpoint %s was saved by a version that made no digests: whether it is damaged "
                "is not known", place)


def trained_part(workdir: Path) -> tuple[int, dict[str, np.ndarray]]:
    """Step and trained parameters of a workdir's best checkpoint; see `restore_trained`."""
    return Checkpoints(workdir, read_only=True).restore_trained()


def chosen_by(workdir: Path) -> set[str | None]:
    """The name of the score by which a workdir's best checkpoint was chosen: None if an earlier
    version did not store it. Empty if no checkpoint was scored."""
    notes = {}
    for step in saved_steps(workdir):
        with suppress(Exception):  # a damaged one is never chosen
            notes[step] = read_notes(workdir / "checkpoints" / str(step))
    if not (scored := [step for step in notes if notes[step].score is not None]):
        return set()
    best = notes[_highest(notes, scored)].best
    return {best and best.name}


def _highest(notes: dict[int, Notes], scored: list[int]) -> int:
    """The step of the highest score; the last one of several."""
    return max(scored, key=lambda step: (_rank(notes[step].score), step))


def _rank(score: float) -> float:
    """The score to sort by: one that is not a number compares with none, and is the lowest."""
    return -math.inf if math.isnan(score) else score


def saved_steps(workdir: Path) -> list[int]:
    """Steps of the finished checkpoints; a save that was cut short leaves none."""
    found = (workdir / "checkpoints").glob("*")
    return sorted(int(path.name) for path in found if path.name.isdigit() and path.is_dir())


def abstract_like(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree's arrays."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
    )
