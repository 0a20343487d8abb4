"""Several processes as one program: joining them, and that they are of one mind."""

import hashlib
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

import jaxfusion
from jaxfusion.errors import InputError, first_line

HEARTBEAT_SECONDS = 30  # a peer that is gone for so long ends the others


def join() -> None:
    """Makes this process one of several.

    On a TPU pod or under SLURM jax finds the others by itself; elsewhere each process gets
    JAX_COORDINATOR_ADDRESS (host:port of the first), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Raises:
      InputError: the others are not to be found.
    """
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
