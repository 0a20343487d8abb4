"""A workdir: one writer, a full disk, starts that fail, signals, and what is said."""

import errno
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers import ROOT, interrupt_at, make_config, records

from jaxfusion import config as configs
from jaxfusion import files
from jaxfusion.bridge import warm_start
from jaxfusion.bridge.job import train
from jaxfusion.data import batching
from jaxfusion.data.batching import Ragged, TokenRow, TokenRows, find_shapes, lengths_of, tokenize
from jaxfusion.data.rows.examples import Example
from jaxfusion.errors import InputError, Stopped
from jaxfusion.files import WRITER, new_directory, only_writer, write_checked, write_whole
from jaxfusion.hf import hub
from jaxfusion.training import build, checkpoint
from jaxfusion.training import workdir as workdirs
from jaxfusion.training.checkpoint import Checkpoints
from jaxfusion.training.hooks import Signals
from jaxfusion.training.logs import RunLog
from jaxfusion.training.meter import count_examples


def python(code, *args, **more):
    """A process of its own that runs some code."""
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
                            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            **more)


HOLD = """
    import sys, time
    from pathlib import Path
    from jaxfusion.files import WRITER, only_writer
    place = Path(sys.argv[1])
    with only_writer(place / WRITER, place):
        print("held", flush=True)
        time.sleep(60)
"""


# One writer


def test_a_second_writer_is_refused_and_told_of_the_first(cache_dir, tmp_path):
    """At once, by host, process and time; a killed one holds nothing."""
    config, workdir = make_config(cache_dir, "last,debug", train__steps=2), tmp_path / "run"
    workdir.mkdir()
    first = python(HOLD, workdir)
    assert first.stdout.readline() == "held\n"
    try:
        clock = time.monotonic()
        with pytest.raises(InputError, match=(
                rf"run is being written by process {first.pid} on {socket.gethostname()} since "
                r"20\d\d-.*; wait for it to finish, or stop it$")):
            train(config, workdir)
        assert time.monotonic() - clock < 5 and os.listdir(workdir) == [WRITER]
    finally:
        first.kill()
        first.communicate()
    with only_writer(workdir / WRITER, workdir) as held:  # what is left of it locks nothing
        assert held
    assert not list(workdir.iterdir())


def test_readers_of_a_run_that_is_written_are_let_in(cache_dir, tmp_path, unscored):
    config, workdir = make_config(cache_dir, "last,debug", train__steps=2), tmp_path / "run"
    train(config, workdir)
    assert not (workdir / WRITER).exists()
    with only_writer(workdir / WRITER, workdir):
        assert checkpoint.trained_part(workdir)[0] == 2
        assert workdirs.check_workdir(config, workdir) == configs.load(workdir / "config.json")


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with only_writer(tmp_path / WRITER, tmp_path) as held:
        assert not held
    assert "cannot be locked (No locks available)" in caplog.text


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_writers_of_one_directory_do_not_mix(tmp_path, overwrite):
    """Two exports to one place; none waits for the other, and both are whole."""
    out, ends = tmp_path / "out", {}

    def write(name, before):
        try:
            with new_directory(out, overwrite) as partial:
                before()
                (partial / name).write_text(name)
            ends[name] = "written"
        except InputError as error:
            ends[name] = str(error)

    inside, go = threading.Event(), threading.Event()
    one = threading.Thread(target=write, args=("one", lambda: (inside.set(), go.wait(10))))
    one.start()
    assert inside.wait(10)
    write("two", lambda: None)
    assert os.listdir(out) == ["two"]
    go.set()
    one.join(10)
    assert ends["two"] == "written" and sorted(os.listdir(tmp_path)) == ["out"]
    if overwrite:
        assert ends["one"] == "written" and os.listdir(out) == ["one"]
    else:
        assert "out is not empty" in ends["one"] and os.listdir(out) == ["two"]


# Whole or not there


def test_what_a_killed_export_left_goes_with_the_next(tmp_path):
    (tmp_path / "..out.partial-1-0a1b2c3d.writer").touch()
    for left in (".out.partial-1", ".out.partial-1-0a1b2c3d", ".out.old-7"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "file").write_text(left)
    (tmp_path / ".out.partial-notes").mkdir()  # nobody's of ours
    with new_directory(tmp_path / "out", overwrite=True) as partial:
        (partial / "file").write_text("new")
    assert (tmp_path / "out" / "file").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == [".out.partial-notes", "out"]


def test_an_export_killed_between_its_two_renames_is_put_back(tmp_path):
    (tmp_path / ".out.old-7").mkdir()
    (tmp_path / ".out.old-7" / "file").write_text("old")
    with pytest.raises(InputError, match="out is not empty"), new_directory(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "file").read_text() == "old"


@pytest.mark.parametrize("out", [".", "..", "checkpoints", "checkpoints/4", "checkpoints/new"])
def test_no_directory_is_written_over_a_run(tmp_path, out):
    """Nor round one, nor among its checkpoints."""
    run = tmp_path / "runs" / "run"
    (run / "checkpoints" / "4").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"belongs to the run .*/runs/run:"), new_directory(
            run / out, overwrite=True):
        pass
    assert (run / "checkpoints" / "4").is_dir()
    with new_directory(run / "exported"):
        pass
    assert (run / "exported").is_dir()


@pytest.mark.parametrize("write", [write_whole, write_checked])
def test_a_planted_link_is_not_followed(tmp_path, write):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    for name in (".results.json.partial", "..results.json.sum.partial"):
        (tmp_path / name).symlink_to(precious)
    write(tmp_path / "results.json", "{}")
    assert precious.read_text() == "mine" and (tmp_path / "results.json").read_text() == "{}"
    assert not (tmp_path / ".results.json.partial").exists()


def test_a_write_that_is_killed_leaves_old_content_that_is_whole(tmp_path, monkeypatch):
    """The note of what is written comes first."""
    file = tmp_path / "results.json"
    write_checked(file, '{"a": 1}')
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_whole", lambda place, content: (
            write_whole(place, content) if place.suffix == ".sum" else None))
        for content in ('{"a": 2}', '{"a": 4}'):  # killed twice
            write_checked(file, content)
    assert files.read_json(file, "") == {"a": 1}
    write_checked(file, '{"a": 3}')
    assert files.read_json(file, "") == {"a": 3}


# A full disk


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"),
    pytest.param(ValueError('RESOURCE_EXHAUSTED: Error writing "x": No space left on device'),
                 marks=pytest.mark.slow),
])
def test_a_full_disk_is_one_line_and_the_run_goes_on(
        cache_dir, tmp_path, unscored, monkeypatch, error):
    """Whatever the library says, now or when it has written in the background."""
    config = make_config(cache_dir, "last,debug", train__steps=6, train__checkpoint_every=2,
                         train__eval_every=6)
    original, method = ocp.CheckpointManager.save, "save"

    def fail(self, step, *args, **kwargs):
        if step == 4:
            raise error
        return original(self, step, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, method, fail)
        with pytest.raises(InputError, match=(
                r"run/checkpoints could not be written: no space left, [\d,.]+ MiB free on the "
                r"disk of .*; free some space and run the same command again")):
            train(config, tmp_path / "run")
    assert Checkpoints(tmp_path / "run").steps == [2]
    train(config, tmp_path / "run")
    whole = tmp_path / "whole"
    train(config, whole)
    assert records(tmp_path / "run") == records(whole)


def test_a_full_disk_leaves_no_half_of_a_file(tmp_path, monkeypatch):
    write_whole(tmp_path / "a.json", "old")

    def fail(self, *_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(InputError, match=r"a\.json could not be written: no space left"):
        write_whole(tmp_path / "a.json", "new")
    assert os.listdir(tmp_path) == ["a.json"] and (tmp_path / "a.json").read_text() == "old"


# Starts that fail


@pytest.mark.parametrize("wrong,right", [
    (lambda c: replace(c, optimizer=replace(c.optimizer, schedule="cosin")), lambda c: c),
    (lambda c: replace(c, train=replace(c.train, batch_size=7, accumulate=2)), lambda c: c),
])
def test_a_start_that_fails_does_not_block_the_mended_one(
        cache_dir, tmp_path, unscored, wrong, right):
    config = make_config(cache_dir, "last,debug", train__steps=2)
    with pytest.raises(InputError):
        train(wrong(config), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert int(train(right(config), tmp_path / "run").step) == 2


def test_a_config_under_which_nothing_was_saved_gives_way(
        cache_dir, tmp_path, unscored, monkeypatch, caplog):
    """A start that fails in its first step, as by memory, is mended the same way."""
    config, workdir = make_config(cache_dir, "last,debug", train__steps=6), tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            train(config, workdir)
    assert (workdir / "config.json").is_file() and (workdir / "metrics.jsonl").is_file()
    other = replace(config, train=replace(config.train, seed=3))
    with caplog.at_level(logging.INFO):
        train(other, workdir)
    assert "no step was saved under the config.json there, which is replaced" in caplog.text
    assert json.loads((workdir / "config.json").read_text())["train"]["seed"] == 3
    with pytest.raises(InputError, match=r"train\.seed: 3 -> 0"):
        train(config, workdir)


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.json", "model.safetensors"])
def test_what_is_no_run_s_stays(cache_dir, tmp_path, name):
    """A directory of the user's own, be it with files of the same names."""
    (tmp_path / name).write_text('{"mine": 1}\n')
    with pytest.raises(InputError):
        train(make_config(cache_dir, "last,debug", train__steps=2), tmp_path)
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_text() == '{"mine": 1}\n'


# Signals


@pytest.fixture
def heard():
    """SIGINT as it is in a terminal; where the tests run in the background, it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_that_a_callback_swallows_ends_the_run_after_the_step(heard):
    with Signals() as signals:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt:
            pass  # as a callback of a library does
        with pytest.raises(KeyboardInterrupt):
            signals.should_stop(3)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_last_save_is_on_disk_before_sigterm_may_end_the_process(
        cache_dir, tmp_path, unscored, monkeypatch):
    handlers, wait = [], Checkpoints.wait
    monkeypatch.setattr(Checkpoints, "wait", lambda self: (
        handlers.append(signal.getsignal(signal.SIGTERM)), wait(self)))
    train(make_config(cache_dir, train__steps=1), tmp_path / "run")
    assert handlers and all(isinstance(x.__self__, Signals) for x in handlers)



def test_sigterm_before_the_first_step_has_its_status(cache_dir, tmp_path):
    """75 from the start on, while rows are tokenized."""
    process = subprocess.Popen(
        [sys.executable, "train.py", "--config=configs/xnli_paper.py:debug",
         f"--workdir={tmp_path / 'run'}"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert any("rows tokenized" in line for line in process.stderr)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[1]
    assert process.returncode == Stopped.EXIT_CODE == 75, said
    assert "stopped by SIGTERM" in said and "Traceback" not in said


# What is said


def test_only_the_first_of_several_processes_sets_aside(tmp_path, monkeypatch):
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    waited = []
    monkeypatch.setattr(checkpoint, "is_first", lambda: False)
    monkeypatch.setattr(checkpoint, "wait_for_peers", waited.append)
    found = Checkpoints(tmp_path)
    found._set_aside(4, ValueError("no"), newer=True)
    assert (tmp_path / "checkpoints" / "4").is_dir() and len(waited) == 1
    monkeypatch.setattr(checkpoint, "is_first", lambda: True)
    found._set_aside(4, ValueError("no"), newer=True)
    assert (tmp_path / "checkpoints" / "4.damaged").is_dir() and len(waited) == 2


def test_scripts_let_jax_have_a_gpu_s_memory():
    """Eval.py as train.py, before jax is there."""
    code = """
        import os, sys
        import jaxfusion.cli as cli
        assert "jax" not in sys.modules
        cli.set_up_jax()
        assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.92"
    """
    process = python(code)
    assert process.wait() == 0, process.stderr.read()
    for script in ("train.py", "eval.py"):
        assert "    set_up_jax()\n" in (ROOT / "jaxfusion" / "commands" / script).read_text()


@pytest.mark.skipif(any(Path("/dev").glob("accel*")) or Path("/dev/vfio").is_dir(),
                    reason="this machine may have a TPU")
def test_a_machine_without_a_tpu_hears_nothing_of_one():
    """libtpu, where it is installed, asks a cloud for what these variables say."""
    process = python("""
        import os
        os.environ.pop("JAX_PLATFORMS")  # of the tests: a user's jax looks for every device
        import jaxfusion.cli as cli
        cli.set_up_jax()
        import jax
        jax.devices()
    """)
    assert process.wait() == 0 and process.stderr.read() == ""


@pytest.mark.parametrize("dtype,head_dim,cap,why", [
    ("float32", 64, None, "takes bfloat16 and float16, not float32"),
    ("bfloat16", 20, None, "not 20"), ("bfloat16", 64, 50.0, "bounds no scores"),
    ("bfloat16", 64, None, "plain attention runs for .* odd length"),
])
def test_a_kernel_that_cannot_run_is_said_once(caplog, dtype, head_dim, cap, why):
    build._log_plain.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            build._log_plain("decoder", "cudnn", head_dim, jnp.dtype(dtype), cap, False)
            build._log_plain("decoder", "auto", head_dim, jnp.dtype(dtype), cap, False)
    found, = caplog.messages
    assert re.search(why, found)


def test_a_slow_hub_is_waited_for(monkeypatch, caplog):
    """A warning names the slow hub, which still counts as reachable."""
    from huggingface_hub import constants

    monkeypatch.setattr(hub, "PATIENCE", 0.05)
    monkeypatch.setattr(hub, "MOST_PATIENCE", 5.0)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "answers", lambda url: time.sleep(0.3) or True)
    hub.hub_in_reach.cache_clear()
    try:
        assert hub.hub_in_reach() and not constants.HF_HUB_OFFLINE
        assert "has not answered for 0 s: waiting" in caplog.text
    finally:
        hub.hub_in_reach.cache_clear()


def test_the_warm_start_depends_on_the_seed(monkeypatch):
    keys, config = [], configs.from_json({})
    monkeypatch.setattr(warm_start, "_pairs", lambda *_: (np.eye(2), np.eye(2), np.zeros(2)))

    def stop(key, steps):
        keys.append(jax.random.key_data(key).tolist())
        raise StopIteration

    monkeypatch.setattr(warm_start.jax.random, "split", stop)
    for seed in (0, 1):
        with pytest.raises(StopIteration):
            warm_start.warm_start(SimpleNamespace(
                bridge=SimpleNamespace(latents=0, projector=None), frozen={},
                trainable={"projector/end": np.zeros(2)},
                config=replace(config, train=replace(config.train, seed=seed))), [])
    assert keys[0] == jax.random.key_data(jax.random.key(0)).tolist() != keys[1]


def test_every_record_has_real_tokens_and_short_batches_count_as_such(
        cache_dir, tmp_path, unscored, monkeypatch):
    """Also the first record, of which the time is not measured, and after a resume."""
    config = make_config(cache_dir, "last,debug", train__steps=9, train__log_every=1,
                         train__eval_every=9, train__checkpoint_every=3, train__batch_size=8,
                         data__train_rows=20)
    taken = []
    original = RunLog.train

    def spy(self, step, metrics, done):
        taken.append((step, done))
        original(self, step, metrics, done)
        if step == 4 and len(taken) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunLog, "train", spy)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run")
    train(config, tmp_path / "run")
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < x["real_tokens"] <= 1 for x in lines if "loss" in x)
    assert [x["step"] for x in lines if "loss" in x] == list(range(1, 10))
    # 20 rows in batches of 8: one of three has 4.
    timed = {step: done.examples for step, done in taken if step not in (1, 4)}
    assert sorted(set(timed.values())) == [4, 8]


def test_examples_are_counted_in_packed_and_short_batches():
    packed = np.array([[1, 1, 2, 2, 3, 0], [1, 2, 0, 0, 0, 0], [0] * 6])
    assert count_examples([np.zeros_like(packed), packed]) == 5
    languages = np.ones((4, 3, 7), int)  # of 4 prompts in 3 languages
    assert count_examples([languages]) == 4


def test_rows_longer_than_the_limits_are_said_once(cache_dir, tmp_path, caplog):
    config = make_config(cache_dir, "last,debug", train__steps=4, train__eval_every=2,
                         train__checkpoint_every=2, data__dev_rows=4)
    config = replace(config, eval=replace(config.eval, max_encoder_tokens=16))
    with caplog.at_level(logging.WARNING):
        train(config, tmp_path / "run")
    assert caplog.text.count("development rows longer than the limits") == 1


# Rows in little memory


def test_rows_take_four_bytes_an_id():
    rows = TokenRows(latents=3)
    wanted = [TokenRow([5] * i, [6] * (i % 3), [7], 3) for i in range(50)]
    for row in wanted:
        rows.append(row.query, row.text, row.target)
    assert list(rows) == wanted and rows[-1] == wanted[-1] and rows[3:5] == wanted[3:5]
    assert rows.queries.ids.itemsize == 4
    assert all((a == b).all() for a, b in zip(lengths_of(rows), lengths_of(wanted), strict=True))
    shapes = find_shapes(rows, (8, 16))
    assert shapes == find_shapes(wanted, (8, 16))
    assert shapes.buckets_of(rows).tolist() == [shapes.bucket(row) for row in wanted]
    with pytest.raises(IndexError):
        Ragged()[0]


def test_tokenized_rows_take_little_more_than_their_ids(tokenizers):
    examples = [Example("bada la so " * 100, "ko", 0) for _ in range(300)]
    limits = {"text_prompt": "", "max_encoder_tokens": 400, "max_decoder_tokens": 12,
              "with_target": True}
    tokenize(examples[:2], tokenizers, **limits)
    tracemalloc.start()
    try:
        rows, _ = tokenize(examples, tokenizers, **limits)
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    ids = sum(len(row.query) + len(row.target) for row in rows)
    assert ids > 300 * 400 and held < 6 * ids


def test_tokenizing_in_parts_is_tokenizing_and_tells_how_far_it_is(
        tokenizers, monkeypatch, caplog):
    examples = [Example("bada " * (i % 7 + 1), ("ko", "mi")[i % 2], 0) for i in range(23)]
    limits = {"text_prompt": "so {query}", "max_encoder_tokens": 9, "max_decoder_tokens": 12,
              "with_target": True}
    whole, cut = tokenize(examples, tokenizers, **limits)
    monkeypatch.setattr(batching, "PART", 4)
    monkeypatch.setattr(batching, "PROGRESS_SECONDS", -1)
    with caplog.at_level(logging.INFO):
        parts, again = tokenize(examples, tokenizers, **limits)
    assert list(parts) == list(whole) and cut == again and cut.queries
    assert "20 of 23 rows tokenized, " in caplog.text and "rows/s, 0 s left" in caplog.text


def test_debug_inputs_that_another_process_made_meanwhile_are_taken(tmp_path):
    from jaxfusion.miniatures.inputs import _make

    def make(out):
        for _ in range(2):
            with new_directory(out) as partial:
                (partial / "file").touch()

    _make(tmp_path / "made", make)
    assert (tmp_path / "made" / "file").is_file()
