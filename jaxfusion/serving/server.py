"""Opens a run and serves it until it is told to stop."""

import ipaddress
import logging
import signal
import socket
import sys
import time
from pathlib import Path

import uvicorn

from jaxfusion.errors import InputError
from jaxfusion.serving.app import make_app
from jaxfusion.serving.batcher import Batcher
from jaxfusion.serving.engine import ROWS, Ask
from jaxfusion.serving.explain import explain
from jaxfusion.serving.served import Served, open_models

PATIENCE = 120  # seconds that requests have to end after SIGTERM
KEPT = 75  # seconds that an idle connection stays open: longer than clients reuse one
logger = logging.getLogger(__name__)


def serve(workdir: Path, host: str, port: int, token: str | None) -> None:
    """Serves a run until SIGTERM, which lets running requests end and exits with status 0.

    Raises:
      InputError: no bridge, a port in use, or an address that others reach, without a token.
    """
    if token is None and not is_loopback(host):
        raise InputError(f"--host {host} lets others in; give a --token that they have to send, "
                         "or leave --host out, which serves this machine alone")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    listening = open_port(host, port)  # before the model, which takes longer
    run, models = open_models(workdir)
    batcher = Batcher(run.on_mesh)
    logger.info("first compiling %d programs for short prompts: up to minutes on a slow machine, "
                "seconds where an earlier start did it", len(models) * len(ROWS))
    for model in models.values():
        compile_smallest(batcher, model)
    app = make_app(models, batcher, token)
    config = uvicorn.Config(app, log_level="warning", access_log=False,
                            timeout_graceful_shutdown=PATIENCE, timeout_keep_alive=KEPT)
    listening.listen(config.backlog)  # whoever reads the next line may ask at once
    named, at = listening.getsockname()[:2]
    place = f"[{named}]" if ":" in named else named
    logger.info("serving %s on http://%s:%d", " and ".join(models), place, at)
    uvicorn.Server(config).run(sockets=[listening])


def compile_smallest(batcher: Batcher, model: Served) -> None:
    """Compiles what short prompts need, in every size of a batch."""
    begun, most = time.monotonic(), model.scorer.config.max_new_tokens
    ask = Ask(model.prompt("a", model.any_language), most)
    for size in ROWS:
        batcher.compile(model, ask, size)
        logger.info("%s: short prompts, %d at a time, compiled after %.0f s", model.name, size,
                    time.monotonic() - begun)
    batcher.call(lambda: explain(model, "a", model.any_language)).result()


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def open_port(host: str, port: int) -> socket.socket:
    """A socket at the address; 0 is any free port.

    Raises:
      InputError: the port is in use, or the address is not this machine's.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise InputError(f"--host {host} is not an address: {error.strerror}") from None
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind(address)
    except OSError as error:
        found.close()
        raise InputError(f"cannot serve on {host}:{port} ({error.strerror}); give another --port "
                         "or --host") from None
    return found
