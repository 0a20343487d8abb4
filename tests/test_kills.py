"""Commands that are killed at any moment: started again, they end as if nothing had been."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, records

from jaxfusion.training.checkpoint import trained_part

TRAIN = ["--config.train.steps=12", "--config.train.log_every=2", "--config.train.eval_every=6",
         "--config.train.checkpoint_every=2", "--config.data.dev_rows=12"]
COMMANDS = {
    "train": ["train.py", "--config=configs/xnli_paper.py:debug", *TRAIN, "--workdir={out}"],
    "compare": ["train.py", "--config=configs/xnli_paper.py:compare,debug", "--workdir={out}",
                "--config.rows=6", *(x.replace("config.", "config.base.") for x in TRAIN)],
    "lens": ["train.py", "--config=configs/lens_quickstart.py:debug", "--config.sweep=()",
             "--config.data.task_rows=8", "--workdir={out}"],
    "eval": ["eval.py", "--workdir={out}", "--limit=12", "--languages=en"],
    "export": ["export.py", "--workdir={run}", "--out={out}/exported", "--overwrite", "--merge"],
}


def start(name, out, run):
    words = [x.format(out=out, run=run) for x in COMMANDS[name]]
    return subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True)


def results(name, out):
    """What a finished command left, without the time it took and places."""
    if name == "train":
        step, found = trained_part(out)
        return step, {x: y.tobytes() for x, y in found.items()}, records(out)
    if name == "eval":
        return [json.loads((out / "eval" / x).read_text())
                for x in ("results.json", "details.json")]
    if name == "export":
        return {str(x.relative_to(out)): x.read_bytes()
                for x in sorted((out / "exported").rglob("*")) if x.is_file()}
    report = json.loads((out / "report.json").read_text())
    parts = [trained_part(x.parent) for x in sorted(out.glob("**/checkpoints"))]
    return ({x: y for x, y in report.items() if x != "seconds"},
            [(step, {x: np.asarray(y).tobytes() for x, y in found.items()})
             for step, found in parts])


def finish(name, out, run):
    process = start(name, out, run)
    said = process.communicate()[1]
    assert process.returncode == 0 and "Traceback" not in said, said
    return said


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_eight_kills_change_nothing(cache_dir, tmp_path, name):
    """SIGKILL at random moments, each time in what the last one left."""
    rng, run = random.Random(name), tmp_path / "run"
    finish("train", run, run)
    whole, out = tmp_path / "whole" / "x", tmp_path / "killed" / "x"
    for place in (whole, out):  # reports name their workdir
        place.parent.mkdir()
        if name == "eval":
            shutil.copytree(run, place)
    seconds = -os.times().elapsed
    finish(name, whole, run)
    seconds += os.times().elapsed
    killed = 0
    while killed < 8:
        process = start(name, out, run)
        try:
            process.communicate(timeout=rng.uniform(0.1, 0.9) * seconds)
            assert process.returncode == 0
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            killed += 1
    finish(name, out, run)
    assert results(name, out) == results(name, whole)
    left = [x for x in out.rglob(".*") if x.name.endswith(".partial") or ".partial-" in x.name]
    assert not left and not list(out.rglob(".writer"))
