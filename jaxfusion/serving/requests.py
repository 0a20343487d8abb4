"""From a request to jobs in the queue, and from there to the parts of its answers."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence

from starlette.requests import Request

from jaxfusion.errors import InputError
from jaxfusion.serving.answers import Answer, Part
from jaxfusion.serving.batcher import Batcher, Job
from jaxfusion.serving.engine import Ask
from jaxfusion.serving.protocol import ChatRequest, CompletionRequest, Generation
from jaxfusion.serving.served import Served

USUAL = 16  # tokens of a completion of the LLM alone, as OpenAI has it


class Gone(Exception):
    """The client went away."""


class Failed(Exception):
    """The computation of an answer failed."""


def completion_jobs(body: CompletionRequest, model: Served) -> list[Job]:
    """The jobs of `/v1/completions`. The LLM alone continues prompts as they are; a bridge answers
    them as `eval.py` does.

    Raises:
      InputError: what the model cannot do.
    """
    language = body.language or ""
    if model.bare:
        rows = [model.literal(prompt, language) for prompt in body.prompts]
    else:
        if body.echo:
            raise InputError(
                f"echo is for the model 'llm': the encoder of '{model.name}' reads the prompt and "
                "does not predict it; python -m jaxfusion.runs.lm_harness scores answers behind a "
                "bridge")
        if not all(isinstance(prompt, str) for prompt in body.prompts):
            raise InputError(f"the prompt of '{model.name}' is text, which its encoder reads by "
                             "its own tokenizer; send no token ids")
        rows = [model.prompt(prompt, language) for prompt in body.prompts]
    most, stops = body.max_tokens, body.stops
    if model.bare:
        most, stops = USUAL if most is None else most, stops or ()
    return [_job(body, model, row, number, most=most, stops=stops, strips=not model.bare,
                 chances=body.logprobs is not None, echo=bool(body.echo))
            for number, row in enumerate(rows)]


def chat_job(body: ChatRequest, model: Served) -> Job:
    """The job of `/v1/chat/completions`: the last message, answered as `eval.py` does.

    Raises:
      InputError: what the model cannot do.
    """
    if body.messages[-1].role != "user":
        raise InputError("the last message is what is answered, and its role is "
                         f"'{body.messages[-1].role}', expected 'user'")
    if body.top_logprobs is not None and not body.logprobs:
        raise InputError("top_logprobs needs logprobs=true")
    row = model.prompt(body.messages[-1].text, body.language or "")
    return _job(body, model, row, 0, most=body.most, stops=body.stops, strips=True,
                chances=bool(body.logprobs))


def _job(
    body: Generation, model: Served, row, number: int, *, most: int | None,
    stops: Sequence[str] | None, strips: bool, chances: bool, echo: bool = False,
) -> Job:
    """A job; what the request leaves open is as in the run's `eval`, but a seed is drawn."""
    usual = model.scorer.config
    most = usual.max_new_tokens if most is None else most
    model.check_room(row, most)
    seed = secrets.randbits(32) if body.seed is None else body.seed % 2**32
    ask = Ask(
        row, most, usual.temperature if body.temperature is None else body.temperature,
        usual.top_p if body.top_p is None else body.top_p, seed, number, chances or echo, echo)
    stops = usual.stop if stops is None else stops
    return Job(model, ask, Answer(model.tokenizers, stops, most, strips))


class Replies:
    """The answers of a request's jobs, which it puts into the queue.

    Raises:
      Full: the queue has no room for them.
    """

    def __init__(self, batcher: Batcher, jobs: Sequence[Job]):
        self.jobs, self.queue = jobs, asyncio.Queue()
        loop = asyncio.get_running_loop()
        for index, job in enumerate(jobs):
            job.send = lambda part, index=index: loop.call_soon_threadsafe(
                self.queue.put_nowait, (index, part))
        batcher.submit(jobs)

    async def parts(self) -> AsyncIterator[tuple[int, Part]]:
        """Parts with the number of their job, as they come. If they are not awaited to the end,
        as when the client goes away, the jobs are cancelled.

        Raises:
          Failed: a computation failed.
        """
        left = len(self.jobs)
        try:
            while left:
                index, part = await self.queue.get()
                if part.error is not None:
                    raise Failed(part.error)
                left -= part.last
                yield index, part
        finally:
            for job in self.jobs:
                job.cancelled = True

    async def whole(self, request: Request) -> list[list[Part]]:
        """All parts of each job.

        Raises:
          Gone: the client went away meanwhile. Failed: a computation failed.
        """
        async def collect():
            found = [[] for _ in self.jobs]
            async for index, part in self.parts():
                found[index].append(part)
            return found

        answers, gone = asyncio.ensure_future(collect()), asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait({answers, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not answers.done():
                raise Gone
            return answers.result()
        finally:
            answers.cancel()
            gone.cancel()

    def tokens(self) -> tuple[int, int]:
        """How many tokens the prompts and the answers have; a bridge's prompt has those that the
        encoder reads and those of the LLM's text."""
        read = sum(len(job.ask.row.query) + len(job.ask.row.text) for job in self.jobs)
        return read, sum(len(job.answer.ids) for job in self.jobs)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
