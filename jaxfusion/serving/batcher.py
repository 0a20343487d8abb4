"""A queue of prompts, and the one thread that answers them in batches."""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from jaxfusion.errors import first_line
from jaxfusion.serving.answers import Answer, Part
from jaxfusion.serving.engine import STRIDE, Ask, Running, Shape, most_rows, shape_of
from jaxfusion.serving.served import Served

QUEUE = 128  # prompts that wait
TURNS = 4  # batches that are answered in turn, so that a long answer holds up no short one
GATHER = 0.003  # seconds that an idle device waits for more prompts of a batch
logger = logging.getLogger(__name__)


class Full(Exception):
    """No room in the queue."""


@dataclass
class Job:
    """A prompt in the queue.

    Attributes:
      send: gets the answer's parts, in the worker's thread.
      cancelled: nobody wants the answer any more.
    """

    model: Served
    ask: Ask
    answer: Answer
    send: Callable[[Part], None] = lambda part: None
    cancelled: bool = False
    done: bool = False

    def __post_init__(self):
        self.shape = shape_of(self.ask)

    @property
    def key(self) -> tuple[str, Shape]:
        """Equal for prompts that may share a batch."""
        return self.model.name, self.shape

    @property
    def over(self) -> bool:
        """Whether no token more is wanted."""
        return self.done or self.cancelled

    def give(self, part: Part) -> None:
        """Sends a part of the answer, unless it is over."""
        if self.over:
            return
        self.done = part.last
        with contextlib.suppress(RuntimeError):  # the server's loop has ended
            self.send(part)


class Batcher:
    """Answers prompts in batches, first come first served; several batches take turns.

    Args:
      context: the worker's, around all computation.
      limit: prompts that may wait.
    """

    def __init__(self, context: Callable[[], AbstractContextManager], limit: int = QUEUE):
        self.limit, self.context = limit, context
        self.waiting: deque[Job] = deque()
        self.calls: deque[tuple[Callable[[], Any], Future]] = deque()
        self.batches: list[tuple[Running, list[Job]]] = []
        self.changed, self.closing = threading.Condition(), False
        self.worker = threading.Thread(target=self._work, daemon=True, name="batcher")
        self.worker.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queues all of the jobs, or none.

        Raises:
          Full: there is no room for them.
        """
        with self.changed:
            if self.closing or len(self.waiting) + len(jobs) > self.limit:
                raise Full
            self.waiting.extend(jobs)
            self.changed.notify()

    def call(self, work: Callable[[], Any]) -> Future:
        """Runs a function in the worker's thread, between the steps of batches.

        Raises:
          Full: too many wait already.
        """
        future: Future = Future()
        with self.changed:
            if self.closing or len(self.calls) >= self.limit:
                raise Full
            self.calls.append((work, future))
            self.changed.notify()
        return future

    @property
    def length(self) -> int:
        """How many prompts and calls wait."""
        return len(self.waiting) + len(self.calls)

    @property
    def running(self) -> int:
        """How many prompts are being answered."""
        return sum(not job.over for _, jobs in list(self.batches) for job in jobs)

    def close(self) -> None:
        """Answers what is queued, then ends the thread."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        self.worker.join()

    def _work(self) -> None:
        with self.context():
            while self._await_work():
                self._call_one()
                if self.waiting and len(self.batches) < TURNS:
                    self._begin()
                for batch in list(self.batches):
                    self._step(*batch)
                self.batches = [x for x in self.batches if not all(job.over for job in x[1])]

    def _await_work(self) -> bool:
        """Waits until there is something to do; False once there never will be."""
        with self.changed:
            if self.batches:
                return True
            while not (self.waiting or self.calls):
                if self.closing:
                    return False
                self.changed.wait()
        if self.waiting:
            time.sleep(GATHER)
        return True

    def _call_one(self) -> None:
        if not self.calls:
            return
        work, future = self.calls.popleft()
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(work())
            except Exception as error:  # whatever the device raises
                future.set_exception(error)

    def _begin(self) -> None:
        """Takes the first prompt that waits, and others of its shape, and reads them."""
        with self.changed:
            wanted = [job for job in self.waiting if not job.cancelled]
            jobs = [job for job in wanted if job.key == wanted[0].key]
            jobs = jobs[: most_rows(jobs[0].model, jobs[0].shape)] if jobs else []
            taken = set(map(id, jobs))
            self.waiting = deque(job for job in wanted if id(job) not in taken)
        if not jobs:
            return
        try:
            batch = Running(jobs[0].model, jobs[0].shape, [job.ask for job in jobs])
            prompts = batch.prompt_tokens() if jobs[0].shape.echo else [()] * len(jobs)
            for job, tokens in zip(jobs, prompts, strict=True):
                job.give(Part(prompt=tuple(tokens), finish=None if job.ask.most else "length"))
            self.batches.append((batch, jobs))
        except Exception as error:
            _fail(jobs, error)

    def _step(self, batch: Running, jobs: list[Job]) -> None:
        left = [job.ask.most - len(job.answer.ids) for job in jobs if not job.over]
        if not left:
            return
        try:
            for job, tokens in zip(jobs, batch.advance(min(STRIDE, max(left))), strict=True):
                if not job.over:
                    job.give(job.answer.add(tokens))
        except Exception as error:
            _fail(jobs, error)


def _fail(jobs: Sequence[Job], error: Exception) -> None:
    """Ends jobs whose computation failed, as for want of memory; the server goes on."""
    logger.error("a batch of %d prompts failed: %s", len(jobs), first_line(error))
    for job in jobs:
        job.give(Part(error=f"the computation failed: {first_line(error)}"))
