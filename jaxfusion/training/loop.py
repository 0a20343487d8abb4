"""The loop of a run of any job."""

import json
from contextlib import ExitStack

from jaxfusion import config as configs
from jaxfusion.config import CONFIG_FILE
from jaxfusion.data.contamination import write_seen
from jaxfusion.errors import Stopped
from jaxfusion.files import write_checked
from jaxfusion.sharding.hosts import is_first, wait_for_peers
from jaxfusion.training.frozen import write_frozen
from jaxfusion.training.hooks import Log, Profile, Save, Signals
from jaxfusion.training.origin import ORIGIN
from jaxfusion.training.state import State
from jaxfusion.training.trainer import Run, Trainer
from jaxfusion.training.workdir import Start


def fit(run: Run, start: Start, profile: tuple[int, int] | None = None) -> State:
    """Trains from the newest checkpoint to the last step, or until patience ends.

    Args:
      start: the workdir, taken. profile: first and last step of a trace in `WORKDIR/profile`.

    Raises:
      InputError: no checkpoint can be read, the disk is full, or the loss is not a number.
      Stopped: SIGTERM came; the state is saved.
    """
    with Signals() as signals, ExitStack() as stack:
        trainer = Trainer(run, start.mesh)
        trainer.restore(start.checkpoints)
        _record_run(run, start)
        log = Log(trainer, start.workdir)
        hooks = [log, Profile(start.workdir, profile), Save(trainer, start.checkpoints, log)]
        for hook in hooks:
            stack.enter_context(hook)
        while not trainer.ended:
            rows, batch = next(trainer.data)
            for hook in hooks:
                hook.before(trainer.done + 1, rows, batch)
            metrics = trainer.do_step(batch)
            due = trainer.due(signals.should_stop(trainer.done))
            for hook in hooks:
                hook.after(trainer.done, metrics, due)
            if due.stop:
                raise Stopped(f"stopped by SIGTERM after step {trainer.done}, which is saved; the "
                              "same command goes on from there")
        start.checkpoints.wait()  # while SIGTERM does not end the process
    return trainer.state


def _record_run(run: Run, start: Start) -> None:
    """Writes config, fingerprints and frozen parameters, after all that can fail at start-up."""
    if is_first():
        configs.save(run.config, start.workdir / CONFIG_FILE)
        if run.seen is not None:
            write_seen(start.workdir, run.seen)
        if run.kept is not None:
            write_frozen(start.workdir, run.kept)
        if run.origin is not None:
            write_checked(start.workdir / ORIGIN, json.dumps(run.origin, indent=2) + "\n")
    wait_for_peers("config")
