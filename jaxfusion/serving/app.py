"""The routes: OpenAI's API, the page and what it asks for, health and metrics."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from jaxfusion.errors import InputError, cut, first_line
from jaxfusion.runs.exported import PLAIN
from jaxfusion.serving.batcher import Batcher, Full
from jaxfusion.serving.examples import columns_of, examples_of
from jaxfusion.serving.explain import explain
from jaxfusion.serving.guard import Guard
from jaxfusion.serving.metrics import Metrics
from jaxfusion.serving.protocol import ChatRequest, CompletionRequest, ExplainRequest, Generation
from jaxfusion.serving.replies import (
    chat_choice,
    completion_choice,
    error_body,
    joined,
    usage,
)
from jaxfusion.serving.requests import Failed, Gone, Replies, chat_job, completion_jobs
from jaxfusion.serving.served import Served

PAGE = Path(__file__).parent / "page"
# The page asks no other server for anything, and no other page may show it in a frame.
HEADERS = {"Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'",
           "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


class Page(StaticFiles):
    """The page's files, with headers of their own."""

    def file_response(self, *args, **kwargs) -> Response:
        """A file; the browser asks each time whether it changed."""
        response = super().file_response(*args, **kwargs)
        response.headers.update({**HEADERS, "Cache-Control": "no-cache"})
        return response


class UnknownModel(Exception):
    """No model has this name."""


def make_app(models: dict[str, Served], batcher: Batcher, token: str | None = None) -> FastAPI:
    """The server's app.

    Args:
      models: by name; the first is what the page is about.
      batcher: answers the prompts; it is closed when the app ends.
      token: that requests have to bear; None: they need none.
    """
    @asynccontextmanager
    async def life(app: FastAPI):
        yield
        await asyncio.to_thread(batcher.close)

    app = FastAPI(title="jaxfusion", lifespan=life, docs_url=None, redoc_url=None,
                  openapi_url=None)
    metrics = Metrics(batcher)
    begun = int(time.time())
    _add_errors(app)
    _add_models(app, models, begun)
    _add_generation(app, models, batcher, metrics)
    _add_page(app, models, batcher)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        alive = batcher.worker.is_alive()
        body = {"status": "ok" if alive else "the worker has ended", "models": list(models)}
        return JSONResponse(body, 200 if alive else 503)

    @app.get("/metrics")
    async def read_metrics() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    app.mount("/", Page(directory=PAGE, html=True))
    app.add_middleware(Guard, metrics=metrics, token=token)
    return app


def _add_models(app: FastAPI, models: dict[str, Served], begun: int) -> None:
    def about(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": begun, "owned_by": "jaxfusion"}

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [about(name) for name in models]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        return about(_find(models, name).name)


def _add_generation(
    app: FastAPI, models: dict[str, Served], batcher: Batcher, metrics: Metrics
) -> None:
    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        model = _find(models, body.model)
        replies = Replies(batcher, completion_jobs(body, model))
        offsets = [0] * len(replies.jobs)

        def choice(index, part):
            made = completion_choice(index, part, model.tokenizers, body.logprobs, offsets[index])
            offsets[index] += len(made["text"])
            return made

        kind = {"object": "text_completion", "whole": "text_completion", "id": "cmpl"}
        return await _reply(body, request, replies, choice, choice, kind, metrics)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        model = _find(models, body.model)
        replies = Replies(batcher, [chat_job(body, model)])
        top, started = (body.top_logprobs or 0) if body.logprobs else None, []

        def piece(_, part):
            first, started[:] = not started, [True]
            return chat_choice(part, model.tokenizers, top, whole=False, first=first)

        def whole(_, part):
            return chat_choice(part, model.tokenizers, top, whole=True)

        kind = {"object": "chat.completion.chunk", "whole": "chat.completion", "id": "chatcmpl"}
        response = await _reply(body, request, replies, whole, piece, kind, metrics)
        if (others := len(body.messages) - 1):
            response.headers["X-Jaxfusion-Warning"] = (
                f"only the last message is read; {others} before it not")
        return response


async def _reply(
    body: Generation, request: Request, replies: Replies, whole: Callable, piece: Callable,
    kind: dict[str, str], metrics: Metrics,
) -> Response:
    """The response to a request: at once, or as a stream of events.

    Args:
      whole, piece: make a choice of an answer, and of a part of it.
    """
    head = {"id": f"{kind['id']}-{uuid.uuid4().hex}", "created": int(time.time()),
            "model": body.model}
    if body.stream:
        head |= {"object": kind["object"]}
        events = _events(body, replies, piece, head, metrics)
        return StreamingResponse(events, media_type="text/event-stream",
                                 headers={"Cache-Control": "no-cache"})
    answers = await replies.whole(request)
    choices = [whole(index, joined(parts)) for index, parts in enumerate(answers)]
    metrics.count_tokens(*replies.tokens())
    return JSONResponse({**head, "object": kind["whole"], "choices": choices,
                         "usage": usage(*replies.tokens())})


async def _events(
    body: Generation, replies: Replies, piece: Callable, head: dict[str, Any], metrics: Metrics
) -> AsyncIterator[str]:
    """The answer's parts as server-sent events."""
    counts = body.stream_options is not None and body.stream_options.include_usage
    extra = {"usage": None} if counts else {}
    try:
        async for index, part in replies.parts():
            if part.text or part.tokens or part.prompt or part.last:
                yield _event({**head, "choices": [piece(index, part)], **extra})
        if counts:
            yield _event({**head, "choices": [], "usage": usage(*replies.tokens())})
        yield "data: [DONE]\n\n"
    except Failed as error:
        yield _event(error_body(str(error), "server_error"))
    finally:
        metrics.count_tokens(*replies.tokens())


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _add_page(app: FastAPI, models: dict[str, Served], batcher: Batcher) -> None:
    first = next(iter(models.values()))
    beside = next((name for name in models if name != first.name), None)

    @app.get("/api/about")
    async def about() -> dict[str, Any]:
        told, task = first.tokenizers.languages, first.config.data.task
        return {"model": first.name, "llm": beside,
                "beside": "LLM before Lens" if first.bare else "LLM alone",
                "task": None if task == PLAIN else task, "prompt": first.task.prompt,
                "columns": columns_of(first), "labels": first.task.labels,
                "languages": None if told is None else list(told),
                "examples": examples_of(first)}

    @app.post("/api/explain")
    async def explain_text(body: ExplainRequest) -> dict[str, Any]:
        model = _find(models, body.model)
        model.prompt(body.text, body.language or "")  # refuses before it waits
        future = batcher.call(lambda: explain(model, body.text, body.language or ""))
        return await asyncio.wrap_future(future)


def _find(models: dict[str, Served], name: str) -> Served:
    if name not in models:
        raise UnknownModel(f"unknown model '{name:.80}'; the models are {', '.join(models)}")
    return models[name]


def _add_errors(app: FastAPI) -> None:
    """Every error in OpenAI's shape."""
    def add(kind: type[Exception], make: Callable[[Any], tuple[dict[str, Any], int]],
            headers: dict[str, str] | None = None) -> None:
        async def handle(_: Request, error: Exception) -> Response:
            body, status = make(error)
            return JSONResponse(body, status, headers)

        app.add_exception_handler(kind, handle)

    add(InputError, lambda error: (error_body(str(error)), 400))
    add(RequestValidationError, lambda error: (_invalid(error), 400))
    add(UnknownModel, lambda error: (
        error_body(str(error), param="model", code="model_not_found"), 404))
    add(Full, lambda _: (error_body("the queue is full; try again in a second",
                                    "rate_limit_error", code="queue_full"), 429),
        {"Retry-After": "1"})
    add(Failed, lambda error: (error_body(str(error), "server_error"), 500))
    add(Gone, lambda _: (error_body("the client went away"), 499))
    add(HTTPException, lambda error: (error_body(
        "no such address; there are the page at / (GET), /v1/models (GET), /v1/completions and "
        "/v1/chat/completions (POST)" if error.status_code in (404, 405) else str(error.detail)),
        error.status_code))
    add(Exception, lambda error: (error_body(f"{type(error).__name__}: {first_line(error)}",
                                             "server_error"), 500))


def _invalid(error: RequestValidationError) -> dict[str, Any]:
    """What is wrong with the body, in one line: the field, what is wanted, what was got."""
    first = error.errors()[0]
    place = [str(x) for x in first["loc"][1:]]
    if first["type"] == "json_invalid":
        return error_body("the body is not JSON: " + str(first.get("ctx", {}).get("error", "")))
    if first["type"] == "model_attributes_type" and not place:
        return error_body("the body should be a JSON object, sent with Content-Type: "
                          "application/json")
    if first["type"] == "extra_forbidden":
        return error_body(f"unknown field '{'.'.join(place)}'; leave it out")
    got = "" if first["type"] == "missing" else f", got {cut(repr(first.get('input')))}"
    where = place[0] if place else "the body"
    said = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return error_body(f"{where}: {said}{got}", param=place[0] if place else None)
