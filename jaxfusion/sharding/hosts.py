"""Multi-process start-up and consistency checks."""

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

HEARTBEAT_SECONDS = 30  # after this long without a peer, the others exit


def join(preemptible: bool = True) -> None:
    """Joins this process with the others.

    On a TPU pod or under SLURM jax finds the others by itself; elsewhere set
    JAX_COORDINATOR_ADDRESS (host:port of the first), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Args:
      preemptible: let training catch SIGTERM and save; otherwise it terminates the process.

    Raises:
      InputError: the other processes cannot be reached.
    """
    jax.config.update("jax_enable_preemption_service", preemptible)
    known = {}
    for name in ("num_processes", "process_id"):
        value = os.environ.get(f"JAX_{name.upper()}")
        if value is not None:
            if not value.isdigit():
                raise InputError(f"JAX_{name.upper()} is '{value}', expected a number")
            known[name] = int(value)
    try:
        jax.distributed.initialize(**known, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"--distributed: {first_line(error)}; outside a TPU pod and SLURM set "
            "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID"
        ) from None


def is_first() -> bool:
    """Whether this process writes files that only one process may write."""
    return jax.process_index() == 0


def check_peers(**texts: str) -> None:
    """Raises InputError in all processes if a text or this package's code differs between them."""
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
                             f"processes with the same command on the same files")


@contextmanager
def all_or_none() -> Iterator[None]:
    """A block that succeeds in all processes, or raises in all.

    Raises:
      InputError: this process raised it, or another one did, for which this one would wait.
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
        raise InputError(f"process {failed[0]} could not start; see its own error message")


def in_any(true: bool) -> bool:
    """Whether the value is True in any process; all processes have to call this."""
    if jax.process_count() == 1:
        return true
    return bool(multihost_utils.process_allgather(np.array(true)).any())


def wait_for_peers(what: str) -> None:
    """Waits until all processes have called this."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def _code() -> str:
    """All of this package's source."""
    files = sorted(Path(jaxfusion.__file__).parent.rglob("*.py"))
    return "".join(file.read_text("utf-8") for file in files)


def fetch(tree: Any) -> Any:
    """Gathers arrays that may be sharded over processes into full NumPy arrays in each process."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)
