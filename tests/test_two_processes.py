"""Two real processes on the loopback interface: one program, one run."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from helpers import ROOT, losses, make_config

from jaxfusion import config as configs
from jaxfusion.bridge.job import train
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
    env = os.environ | {
        "JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(number),
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2 "
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


# One start of two processes for all that ends well: train.py refuses what they do not agree on, as
# the last word of its command; then they train and score.
TOGETHER = """
import runpy, sys
from pathlib import Path

*sys.argv, folder = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as end:
    print(end, file=sys.stderr)

from jaxfusion import config
from jaxfusion.bridge.job import train
from jaxfusion.runs.score import evaluate

train(config.load(Path(folder) / "two.json"), Path(folder) / "two")
evaluate(Path(folder) / "two", limit=12, languages=("en", "ar"))
"""


@pytest.fixture(scope="module")
def together(cache_dir, tmp_path_factory):
    """A folder with a run of two processes, its config, and what they said."""
    folder, port = tmp_path_factory.mktemp("two"), free_port()
    config = make_config(cache_dir, train__steps=4, train__log_every=1, train__eval_every=4,
                         train__checkpoint_every=2, data__dev_rows=8)
    configs.save(config, folder / "two.json")
    both = [start(folder / "other", i, port, f"--config.train.seed={i}", folder, script=[
        "-c", TOGETHER, "train.py", "--config=configs/xnli_paper.py:last,debug"])
        for i in range(2)]
    said = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    return folder, config, said


def test_two_processes_train_as_one_does(together, tmp_path):
    """The losses of one process, though each of two makes only its own rows of a batch."""
    folder, config, _ = together
    train(config, tmp_path / "one")
    one, two = losses(tmp_path / "one"), losses(folder / "two")
    assert one.keys() == two.keys() == set(range(1, 5))
    assert all(abs(one[step] - two[step]) < 1e-4 * one[step] for step in one)
    assert abs(one[1] - two[1]) < 1e-5 * one[1]


def test_two_processes_score_as_one_does(together):
    workdir = together[0] / "two"
    two = json.loads((workdir / "eval" / "results.json").read_text())
    assert not list((workdir / "eval").glob("*step*"))  # nothing was written twice
    alone, _ = evaluate(workdir, limit=12, languages=("en", "ar"))
    assert alone == two
    (scores,) = two.values()
    assert {name: x["exact_match"]["n"] for name, x in scores.items()} == {"en": 12, "ar": 12}


def test_another_config_is_refused_by_all(together):
    folder, _, said = together
    assert all("error: process 1 has another config than process 0" in text for text in said)
    assert not (folder / "other").exists()


@pytest.fixture(scope="module")
def undisturbed(cache_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    codes, said = run_both(workdir)
    assert codes == [0, 0], said
    return workdir


@pytest.mark.slow
def test_eval_py_scores_in_two_processes(undisturbed):
    codes, said = run_both(undisturbed, "--limit=12", script=["eval.py"])
    assert codes == [0, 0], said
    two = json.loads((undisturbed / "eval" / "results.json").read_text())
    alone, _ = evaluate(undisturbed, limit=12)
    assert alone == two


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
def test_two_processes_compare_as_one_does(tmp_path):
    """A comparison of two seeds, which one process reports; what is scored is left out again."""
    script = ["train.py", "--config=configs/xnli_paper.py:last,debug", "--config.seeds=(0, 1)",
              "--config.train.steps=2", "--config.eval.languages=('en', 'ar')"]
    for _ in range(2):
        codes, said = run_both(tmp_path / "two", script=script)
        assert codes == [0, 0], said
    subprocess.run([sys.executable, *script, f"--workdir={tmp_path / 'one'}"], cwd=ROOT,
                   capture_output=True, check=True)
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


@pytest.mark.slow
def test_sigterm_to_one_stops_both_where_they_can_go_on(tmp_path):
    workdir, port = tmp_path / "run", free_port()
    long = ("--config.train.steps=400", "--config.train.eval_every=400")
    both = [start(workdir, i, port, *long) for i in range(2)]
    wait_for_a_checkpoint(workdir, both[0])
    both[1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [Stopped.EXIT_CODE] * 2, said
    assert all("stopped by SIGTERM after step" in text for text in said)
