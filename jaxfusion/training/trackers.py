"""Where metrics go besides `metrics.jsonl`: TensorBoard, Weights & Biases, MLflow (`logging.to`).

A tracker has three methods: `log` metrics of a step, `add` files, `close`. Those with a server
never end a run: an error gives one warning, and training goes on without them.
"""

import dataclasses
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from secrets import token_hex
from typing import Any, Protocol

from tensorboardX import SummaryWriter

from jaxfusion import config as configs
from jaxfusion.config import CONFIG_FILE, flat
from jaxfusion.errors import InputError, first_line
from jaxfusion.fields import CompareConfig, Job
from jaxfusion.files import read_json, write_checked

TENSORBOARD, WANDB = "tensorboard", "wandb"  # directories of a workdir
IDS = "trackers.json"  # of a workdir: the id of its run at each tracker with a server
PROJECT = "jaxfusion"
MLFLOW_VALUES, MLFLOW_LENGTH = 100, 500  # at once; characters of a parameter
logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """What a run logs to."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Metrics of a step."""

    def add(self, files: Iterable[Path]) -> None:
        """Files of a report, as artefacts."""

    def close(self, failed: bool) -> None:
        """The end of the run in this process."""


class TensorBoard:
    """Curves in `WORKDIR/tensorboard`; those after step `first` are replaced."""

    def __init__(self, workdir: Path, first: int):
        self.writer = SummaryWriter(str(workdir / TENSORBOARD), purge_step=first + 1)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """A scalar for each metric."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def add(self, files: Iterable[Path]) -> None:
        """Nothing: it has no files."""

    def close(self, failed: bool) -> None:
        """Writes what is pending."""
        self.writer.close()


class Wandb:
    """A run of Weights & Biases, online or offline as WANDB_MODE says."""

    def __init__(self, workdir: Path, config: Job, run_id: str | None):
        import wandb

        self.wandb, self.id = wandb, run_id or token_hex(4)
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), name=str(workdir), id=self.id,
            resume="allow", dir=str(workdir), config=dataclasses.asdict(config),
            settings=wandb.Settings(silent=True, console="off", init_timeout=30))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """All metrics of a step. Steps that a resumed run repeats are there already."""
        if step >= self.run.step:
            self.run.log(metrics, step=step)

    def add(self, files: Iterable[Path]) -> None:
        """One artefact with all files."""
        artifact = self.wandb.Artifact(f"report-{self.id}", type="report")
        for file in files:
            artifact.add_file(str(file))
        self.run.log_artifact(artifact)

    def close(self, failed: bool) -> None:
        """Sends what is pending."""
        self.run.finish(exit_code=int(failed))


def _mlflow_name(name: str) -> str:
    """A name with nothing in it that MLflow refuses, as names of tasks may have."""
    return re.sub(r"[^\w.:/ -]", "_", name, flags=re.ASCII)


class MLflow:
    """A run of MLflow, where MLFLOW_TRACKING_URI says."""

    def __init__(self, workdir: Path, config: Job, run_id: str | None):
        # Its own defaults let a server that is gone hold a run for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self.client, self.metric = MlflowClient(), Metric
        if run_id is not None:
            self.id = run_id
            self.client.update_run(self.id, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self.client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self.client.create_experiment(name)
        self.id = self.client.create_run(experiment, run_name=str(workdir)).info.run_id
        params = [Param(_mlflow_name(key), str(value)[:MLFLOW_LENGTH])
                  for key, value in flat(dataclasses.asdict(config)).items()]
        for start in range(0, len(params), MLFLOW_VALUES):
            self.client.log_batch(self.id, params=params[start : start + MLFLOW_VALUES])

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """All metrics of a step in one request."""
        now = int(1000 * time.time())
        self.client.log_batch(self.id, metrics=[
            self.metric(_mlflow_name(name), value, now, step) for name, value in metrics.items()])

    def add(self, files: Iterable[Path]) -> None:
        """Each file by its name."""
        for file in files:
            self.client.log_artifact(self.id, str(file))

    def close(self, failed: bool) -> None:
        """Marks the run as finished, or failed."""
        self.client.set_terminated(self.id, status="FAILED" if failed else "FINISHED")


class Careful:
    """A tracker that is dropped after its first error, with a warning."""

    def __init__(self, name: str, make: Callable[[], Tracker]):
        self.name, self.tracker = name, None
        self.tracker = self._try(make)

    def _try(self, act: Callable[..., Any], *args: Any) -> Any:
        try:
            return act(*args)
        except Exception as error:  # whatever a server, a network or a library does
            self.tracker = None
            logger.warning("%s does not take this run's metrics (%s); the run goes on without it",
                           self.name, first_line(error))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Metrics of a step."""
        if self.tracker:
            self._try(self.tracker.log, step, metrics)

    def add(self, files: Iterable[Path]) -> None:
        """Files of a report."""
        if self.tracker:
            self._try(self.tracker.add, files)

    def close(self, failed: bool) -> None:
        """The end."""
        if self.tracker:
            self._try(self.tracker.close, failed)


SERVERS = {"wandb": Wandb, "mlflow": MLflow}


def check_trackers(config: Job) -> None:
    """Raises InputError for a tracker that is not installed."""
    config = config.base if isinstance(config, CompareConfig) else config
    for name in config.logging.to:
        if name in SERVERS and find_spec(name) is None:
            raise InputError(f"logging.to has '{name}', which is not installed: pip install "
                             f"'jaxfusion[{name}]', or leave it out")


def open_trackers(config: Job, workdir: Path, first: int) -> list[Tracker]:
    """The trackers of a run, which goes on behind step `first` where it was logged before."""
    board = [TensorBoard(workdir, first)] if "tensorboard" in config.logging.to else []
    ids = _ids(workdir) if first else {}
    opened = [_open(name, workdir, config, ids.get(name)) for name in SERVERS
              if name in config.logging.to]
    if opened:
        write_checked(workdir / IDS, json.dumps(
            {**ids, **{x.name: x.tracker.id for x in opened if x.tracker}}))
    return [*board, *opened]


def add_files(workdir: Path, files: list[Path]) -> None:
    """Gives files of a report to the trackers that have a run's metrics."""
    config, ids = configs.load(workdir / CONFIG_FILE), _ids(workdir)
    for tracker in (_open(name, workdir, config, ids[name]) for name in SERVERS if name in ids):
        tracker.add(files)
        tracker.close(failed=False)


def add_report(
    config: Job, workdir: Path, step: int, scores: dict[str, float], files: list[Path]
) -> None:
    """Gives final scores and a report's files to the trackers of a run, or to new runs of theirs.

    Args:
      step: the last one that was logged. The scores come one step behind it, since Weights & Biases
        takes a step once.
    """
    for tracker in open_trackers(config, workdir, max(step, 1)):  # from 1 on a run is continued
        if scores:
            tracker.log(step + 1, scores)
        tracker.add(files)
        tracker.close(failed=False)


def _ids(workdir: Path) -> dict[str, str]:
    file = workdir / IDS
    return read_json(file, "remove it, and the trackers begin another run") if (
        file.is_file()) else {}


def _open(name: str, workdir: Path, config: Job, run_id: str | None) -> Careful:
    return Careful(name, lambda: SERVERS[name](workdir, config, run_id))
