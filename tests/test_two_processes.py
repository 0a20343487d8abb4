"""Two real processes on the loopback interface: one program, one run."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from helpers import ROOT, losses

from jaxfusion.errors import Stopped
from jaxfusion.runs.score import evaluate
from jaxfusion.training.checkpoint import saved_steps

FLAGS = ["--config.train.steps=8", "--config.train.log_every=1", "--config.train.eval_every=4",
         "--config.train.checkpoint_every=2", "--config.data.dev_rows=8"]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(workdir, number, port, *flags, script=None):
    """One of two processes with two devices each, of train.py unless a command is given."""
    env = {name: x for name, x in os.environ.items() if name != "XLA_FLAGS"} | {
        "JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(number),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2 "
                     "--xla_backend_optimization_level=0 "
                     "--xla_cpu_collective_call_terminate_timeout_seconds=300"}
    script = script or ["train.py", "--config=configs/xnli_paper.py:last,debug", *FLAGS]
    return subprocess.Popen(
        [sys.executable, *script, f"--workdir={workdir}", "--distributed", *flags], cwd=ROOT,
        env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def run_both(workdir, *flags, script=None):
    port = free_port()
    both = [start(workdir, i, port, *flags, script=script) for i in range(2)]
    said = [process.communicate(timeout=300)[1] for process in both]
    return [process.returncode for process in both], said


def wait_for_a_checkpoint(workdir, process):
    end = time.monotonic() + 120
    while not saved_steps(workdir) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    assert saved_steps(workdir) and process.poll() is None


@pytest.fixture(scope="module")
def undisturbed(cache_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("two") / "run"
    codes, said = run_both(workdir)
    assert codes == [0, 0], said
    return workdir


def test_two_processes_train_as_one_does(undisturbed, tmp_path):
    """The losses of one process, though each of two makes only its own rows of a batch."""
    command = [sys.executable, "train.py", "--config=configs/xnli_paper.py:last,debug",
               f"--workdir={tmp_path / 'one'}", *FLAGS]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    one, two = losses(tmp_path / "one"), losses(undisturbed)
    assert one.keys() == two.keys() == set(range(1, 9))
    assert all(abs(one[step] - two[step]) < 1e-4 * one[step] for step in one)
    assert abs(one[1] - two[1]) < 1e-5 * one[1]


def test_two_processes_score_as_one_does(undisturbed):
    codes, said = run_both(undisturbed, "--limit=12", script=["eval.py"])
    assert codes == [0, 0], said
    file = undisturbed / "eval" / "results.json"
    two = json.loads(file.read_text())
    alone, _ = evaluate(undisturbed, limit=12)
    assert alone == two and all(
        x["exact_match"]["n"] == 12 for task in two.values() for x in task.values())
    assert not list(file.parent.glob("*step*"))  # nothing was written twice


@pytest.mark.slow
def test_two_processes_move_languages_as_one_does(cache_dir, tmp_path):
    """A Lens run: what is kept, what trains without the LLM, and what is scored with it again."""
    script = ["train.py", "--config=configs/lens_quickstart.py:debug", "--config.sweep=()",
              "--config.data.task_rows=16"]
    codes, said = run_both(tmp_path / "two", script=script)
    assert codes == [0, 0], said
    subprocess.run([sys.executable, *script, f"--workdir={tmp_path / 'one'}"], cwd=ROOT,
                   capture_output=True, check=True)
    one, two = (losses(tmp_path / name / "lens") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(abs(one[x] - two[x]) < 1e-4 * one[x] for x in one)
    alone, both = (json.loads((tmp_path / name / "report.json").read_text()) for name in (
        "one", "two"))
    assert alone.pop("seconds").keys() == both.pop("seconds").keys() and alone == both


@pytest.mark.slow
def test_one_is_killed_and_both_start_again(undisturbed, tmp_path):
    """The one that is left ends too; on another mesh, the two go on to the same end."""
    workdir, port = tmp_path / "run", free_port()
    both = [start(workdir, i, port) for i in range(2)]
    wait_for_a_checkpoint(workdir, both[0])
    both[1].send_signal(signal.SIGKILL)
    both[0].communicate(timeout=120)
    assert both[0].returncode != 0
    codes, said = run_both(workdir, "--config.mesh.data=1", "--config.mesh.fsdp=2",
                           "--config.mesh.tensor=2")
    assert codes == [0, 0], said
    assert "resuming" in said[0]
    again, whole = losses(workdir), losses(undisturbed)
    assert again.keys() == whole.keys()
    assert all(abs(again[step] - whole[step]) < 1e-4 * whole[step] for step in whole)


def test_sigterm_to_one_stops_both_where_they_can_go_on(tmp_path):
    workdir, port = tmp_path / "run", free_port()
    long = ("--config.train.steps=400", "--config.train.eval_every=400")
    both = [start(workdir, i, port, *long) for i in range(2)]
    wait_for_a_checkpoint(workdir, both[0])
    both[1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [Stopped.EXIT_CODE] * 2, said
    assert all("stopped by SIGTERM after step" in text for text in said)


def test_another_config_is_refused_by_all(tmp_path):
    port = free_port()
    both = [start(tmp_path / "run", i, port, f"--config.train.seed={i}") for i in range(2)]
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [1, 1], said
    assert all("process 1 has another config than process 0" in text for text in said)
