"""What a run says: a live line on the terminal, metrics as JSONL and for trackers."""

import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jaxfusion.files import is_as_written, note_sums, write_checked
from jaxfusion.training.trackers import Tracker

METRICS = "metrics.jsonl"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Done:
    """What went through a few steps.

    Attributes:
      examples: their number. tokens: real ones, of both towers. flops: the model's; all of these
        without steps whose time is not measured.
      peak: FLOPs a second of all chips; None where it is not known.
      real: the share of real tokens among all slots; None where no step was done.
    """

    examples: int
    tokens: int
    flops: float
    peak: float | None
    real: float | None

    def rates(self, seconds: float) -> dict[str, float]:
        """As metrics, for the time that they took; none where nothing was counted."""
        found = {}
        if self.tokens:
            found = {"examples_per_second": self.examples / seconds,
                     "tokens_per_second": self.tokens / seconds}
        if self.real is not None:
            found["real_tokens"] = self.real
        if self.tokens and self.peak:
            found["model_flops_utilisation"] = self.flops / seconds / self.peak
        return found


class RunLog:
    """Metrics of one run; a resumed run goes on after the restored step.

    Args:
      workdir: `metrics.jsonl` is written here.
      steps: of the whole run. first: steps already done; later records are dropped.
      writes: False is silent: of several processes one writes.
      trackers: that get the metrics, too.
    """

    def __init__(self, workdir: Path, steps: int, first: int, writes: bool = True,
                 trackers: Sequence[Tracker] = ()):
        self.file, self.writes = workdir / METRICS, writes
        if writes:
            kept = _drop_after(self.file, first)
            self.length, self.digest = len(kept), blake2b(kept, digest_size=16)
        self.trackers = trackers
        self.console = Console(file=sys.stderr, quiet=not writes)
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"), TimeRemainingColumn(),
            console=self.console, disable=not self.console.is_terminal,
        )
        self.task = self.progress.add_task("train", total=steps, completed=first, status="")
        self.steps, self.clock, self.clock_step = steps, time.monotonic(), first

    def __enter__(self) -> "RunLog":
        self.progress.start()
        return self

    def __exit__(
        self, kind: type | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
        for tracker in self.trackers:
            tracker.close(failed=value is not None)

    def train(self, step: int, metrics: dict[str, float], done: Done) -> None:
        """Logs a step's metrics, and the speed of all steps since the last call."""
        seconds = time.monotonic() - self.clock
        rates = done.rates(seconds)
        left = seconds / max(step - self.clock_step, 1) * (self.steps - step)
        self.clock, self.clock_step = time.monotonic(), step
        status = f"loss {metrics['loss']:.4f}"
        if "examples_per_second" in rates:
            status += (f"  {rates['examples_per_second']:.1f} examples/s  "
                       f"{rates['tokens_per_second']:,.0f} tokens/s")
        if "model_flops_utilisation" in rates:
            status += f"  {100 * rates['model_flops_utilisation']:.0f}% of peak"
        self.progress.update(self.task, completed=step, status=status)
        if not self.console.is_terminal:
            self.say(f"step {step}/{self.steps}  {status}  {clock(left)} left")
        self.write(step, {**metrics, **rates})

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Appends a record to the JSONL file, and gives it to the trackers."""
        if not self.writes:
            return
        line = (json.dumps({"step": step, **metrics}) + "\n").encode()
        with self.file.open("ab") as file:
            file.write(line)
        self.length += len(line)
        self.digest.update(line)
        note_sums(self.file, [[self.length, self.digest.hexdigest()]])
        for tracker in self.trackers:
            tracker.log(step, metrics)

    def say(self, line: str) -> None:
        """One line on the terminal, above the live one."""
        self.progress.console.print(line, highlight=False, soft_wrap=True)

    def restart_clock(self) -> None:
        """Leaves out of the speed what was no training, such as an evaluation."""
        self.clock = time.monotonic()


def clock(seconds: float) -> str:
    """`h:mm:ss`."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def _drop_after(file: Path, step: int) -> bytes:
    """Removes records past `step`, which a resumed run writes again, and lines that are none.

    Returns:
      What is left.
    """
    if not file.is_file():
        return b""
    written = file.read_bytes()
    lines = written.split(b"\n")[:-1]
    found = [read_record(line) for line in lines]
    if None in found or not is_as_written(file, written, grows=True):
        logger.warning("%s is damaged: lines that are not records are dropped, others may be "
                       "wrong; the run itself does not read it", file)
    kept = b"".join(line + b"\n" for line, record in zip(lines, found, strict=True)
                    if record is not None and record["step"] <= step)
    write_checked(file, kept)
    return kept


def read_record(line: bytes) -> dict[str, float] | None:
    """A line of metrics; None where it is damaged."""
    try:
        found = json.loads(line)
        found["step"] + 0  # a number
        return found
    except (ValueError, TypeError, KeyError):
        return None
