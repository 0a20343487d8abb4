"""Runs `tests/eight_devices`, which need a process of their own: XLA's flags are read once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted(Path(__file__).with_name("eight_devices").glob("test_*.py"))
# The one that takes longest has a process to itself, and another worker may take the rest.
ALONE = [file for file in FILES if file.stem == "test_mesh"]


@pytest.mark.parametrize("files,marked", [
    pytest.param(ALONE, "not slow", id="meshes"),
    pytest.param([x for x in FILES if x not in ALONE], "not slow", id="others"),
    pytest.param(FILES, "slow", id="slow", marks=pytest.mark.slow),
])
def test_eight_devices(files, marked, cache_dir):
    flags = ("--xla_force_host_platform_device_count=8 "
             "--xla_cpu_collective_call_terminate_timeout_seconds=300")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", marked,
               "-p", "no:cacheprovider", *files]
    # What the run of pytest that starts this one has told its workers is not for another.
    env = {name: x for name, x in os.environ.items() if not name.startswith("PYTEST_")}
    env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {flags}"
    # Threads of XLA's pool. Devices may take collectives that are independent of each other in
    # different orders; with a thread for each device, which is the default, all may end up waiting.
    env["NPROC"] = "32"
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
