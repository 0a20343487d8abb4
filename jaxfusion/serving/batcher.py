"""A queue of prompts, and the thread that answers them in batches."""

import contextlib
import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from jaxfusion.errors import first_line
from jaxfusion.serving.answers import Answer, Part
from jaxfusion.serving.engine import ROWS, STRIDE, Ask, Running, Shape, most_rows, shape_of
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

    A second thread compiles programs that are missing, and does what `call` is given, while the
    first one answers what it can.

    Args:
      context: around all computation.
      limit: prompts that may wait.
    """

    def __init__(self, context: Callable[[], AbstractContextManager], limit: int = QUEUE):
        self.limit, self.context = limit, context
        self.waiting: deque[Job] = deque()
        self.batches: list[tuple[Running, list[Job]]] = []
        self.ready: set[tuple[tuple[str, Shape], int]] = set()  # compiled: a job's key, and rows
        self.asked: set[tuple[tuple[str, Shape], int]] = set()  # these and those on their way
        self.calls: set[Future] = set()
        self.changed, self.closing = threading.Condition(), False
        self.aside = ThreadPoolExecutor(1, "compiler")
        self.worker = threading.Thread(target=self._work, daemon=True, name="batcher")
        self.worker.start()

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queues all of the jobs, or none.

        Raises:
          Full: the queue has no room for them.
        """
        with self.changed:
            if self.closing or len(self.waiting) + len(jobs) > self.limit:
                raise Full
            self.waiting.extend(jobs)
            self.changed.notify()

    def call(self, work: Callable[[], Any]) -> Future:
        """Runs a function beside the batches.

        Raises:
          Full: too many wait already.
        """
        if self.closing or len(self.calls) >= self.limit:
            raise Full

        def within():
            with self.context():
                return work()

        future = self.aside.submit(within)
        self.calls.add(future)
        future.add_done_callback(self.calls.discard)
        return future

    def compile(self, model: Served, ask: Ask, size: int) -> None:
        """Compiles what prompts like this one need, `size` of them at a time."""
        shape = shape_of(ask)
        try:
            with self.context():
                Running(model, shape, [ask] * size, size).advance(1)
        except Exception as error:  # the batch that wants it fails in the same way, and says so
            logger.error("cannot compile %s for %d prompts: %s", shape, size, first_line(error))
        with self.changed:
            self.ready.add(((model.name, shape), size))
            self.asked.add(((model.name, shape), size))
            self.changed.notify()

    @property
    def length(self) -> int:
        """How many prompts and calls wait."""
        return len(self.waiting) + len(self.calls)

    @property
    def running(self) -> int:
        """How many prompts are being answered."""
        return sum(not job.over for _, jobs in list(self.batches) for job in jobs)

    def close(self) -> None:
        """Answers what is queued, then ends the threads."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        self.worker.join()
        self.aside.shutdown(cancel_futures=True)

    def _work(self) -> None:
        with self.context():
            while self._await_work():
                if len(self.batches) < TURNS:
                    self._begin()
                for batch in list(self.batches):
                    self._step(*batch)
                self.batches = [x for x in self.batches if not all(job.over for job in x[1])]

    def _await_work(self) -> bool:
        """Waits until there is something to do; False once there never will be."""
        with self.changed:
            if self.batches:
                return True
            while self._pick() is None:
                if self.closing and not self.waiting:
                    return False
                self.changed.wait()
        time.sleep(GATHER)
        return True

    def _pick(self) -> tuple[list[Job], int] | None:
        """Prompts of one shape that can start, those first that wait longest, and the rows of their
        batch. Asks for programs that are missing."""
        self.waiting = deque(job for job in self.waiting if not job.cancelled)
        groups = defaultdict(list)
        for job in self.waiting:
            groups[job.key].append(job)
        for jobs in groups.values():
            if size := self._size(jobs):
                return jobs[:size], size
        return None

    def _size(self, jobs: Sequence[Job]) -> int | None:
        """The rows that fit these prompts best of those that are compiled."""
        first = jobs[0]
        count = min(len(jobs), most_rows(first.model, first.shape))
        best = next(size for size in ROWS if size >= count)
        if (first.key, best) not in self.asked:
            self.asked.add((first.key, best))
            self.aside.submit(self.compile, first.model, first.ask, best)
        sizes = [size for size in ROWS if (first.key, size) in self.ready]
        larger = [size for size in sizes if size >= best]
        return min(larger) if larger else max(sizes, default=None)

    def _begin(self) -> None:
        """Takes prompts that can start, and reads them."""
        with self.changed:
            picked = self._pick()
            if picked is None:
                return
            jobs, size = picked
            taken = set(map(id, jobs))
            self.waiting = deque(job for job in self.waiting if id(job) not in taken)
        try:
            batch = Running(jobs[0].model, jobs[0].shape, [job.ask for job in jobs], size)
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
