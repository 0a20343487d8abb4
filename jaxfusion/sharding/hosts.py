"""Several processes as one program: how they start, and checks that they agree."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

import jaxfusion
from jaxfusion.errors import InputError, first_line

HEARTBEAT_SECONDS = 30  # a peer that is gone for so long ends the others


def join(preemptible: bool = True) -> None:
    """Makes this process one of several.

    On a TPU pod or under SLURM jax finds the others by itself; elsewhere each process gets
    JAX_COORDINATOR_ADDRESS (host:port of the first), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Args:
      preemptible: SIGTERM is kept for who asks for it, as training does; else it ends the process.

    Raises:
      InputError: the others are not to be found.
    """
    jax.config.update("jax_enable_preemption_service", preemptible)
    known = {}
    for name in ("num_processes", "process_id"):
        value = os.environ.get(f"JAX_{name.upper()}")
        if value is not None:
            if not value.isdigit():
                raise InputError(f"JAX_{name.upper()} is '{value}', wanted a number")
            known[name] = int(value)
    try:
        jax.distributed.initialize(**known, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"--distributed: {first_line(error)}; outside a TPU pod and SLURM set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from None


def is_first() -> bool:
    """Whether this process writes what only one may write."""
    return jax.process_index() == 0


def check_peers(**texts: str) -> None:
    """Raises InputError, in all processes, where a text or this project's code is not the same in
    each of them."""
    if jax.process_count() == 1:
        return
    texts["code"] = _code()
    digests = np.stack([np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
                        for text in texts.values()])
    everyone = np.asarray(multihost_utils.process_allgather(digests))
    for i, name in enumerate(texts):
        others = np.flatnonzero((everyone[:, i] != everyone[0, i]).any(axis=-1))
        if len(others):
            raise InputError(f"process {others[0]} has another {name} than process 0; start all "
                             f"with the same command on the same files")


@contextmanager
def all_or_none() -> Iterator[None]:
    """A block that ends well in all processes, or raises in all.

    Raises:
      InputError: the one of this process; or that of another one, for which this one would wait.
    """
    error = None
    try:
        yield
    except InputError as raised:
        if jax.process_count() == 1:
            raise
        error = raised
    if jax.process_count() == 1:
        return
    failed = np.flatnonzero(multihost_utils.process_allgather(np.array(error is not None)))
    if error is not None:
        raise error
    if len(failed):
        raise InputError(f"process {failed[0]} could not start; its own message says why")


def in_any(true: bool) -> bool:
    """Whether something is so in any of the processes; all of them have to ask."""
    if jax.process_count() == 1:
        return true
    return bool(multihost_utils.process_allgather(np.array(true)).any())


def wait_for_peers(what: str) -> None:
    """Returns when all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def _code() -> str:
    """All of this package's source."""
    files = sorted(Path(jaxfusion.__file__).parent.rglob("*.py"))
    return "".join(file.read_text("utf-8") for file in files)


def fetch(tree: Any) -> Any:
    """Arrays that may be spread over all processes as NumPy's, whole in each of them."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)
