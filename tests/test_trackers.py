"""Trackers: none ends a run, a resumed run goes on in its own, and the real libraries read back."""

import json
import struct
import time
from dataclasses import replace

import pytest
from helpers import make_config, records

from jaxfusion.bridge.compare import report
from jaxfusion.bridge.job import train
from jaxfusion.config import changed, from_json
from jaxfusion.errors import InputError
from jaxfusion.fields import CompareConfig, Config, LoggingConfig
from jaxfusion.runs.score import evaluate
from jaxfusion.training import trackers
from jaxfusion.training.logs import RunLog
from jaxfusion.training.trackers import IDS, check_trackers, open_trackers

BOTH = LoggingConfig(("tensorboard", "wandb", "mlflow"))


class Server:
    """In a tracker's place: keeps what it gets, and fails when it is told to."""

    def __init__(self, workdir, config, run_id):
        self.id, self.got, self.fails = run_id or "made", [], False

    def log(self, step, metrics):
        if self.fails:
            raise ConnectionError("no route\nto host")
        self.got.append((step, metrics))

    def close(self, failed):
        self.got.append(failed)


@pytest.fixture
def servers(monkeypatch):
    monkeypatch.setattr(trackers, "SERVERS", {"wandb": Server, "mlflow": Server})
    return Config(logging=BOTH)


def test_every_tracker_gets_what_the_file_gets(servers, tmp_path):
    opened = open_trackers(servers, tmp_path, first=0)
    assert [type(x).__name__ for x in opened] == ["TensorBoard", "Careful", "Careful"]
    with RunLog(tmp_path, 4, 0, True, opened) as log:
        log.write(2, {"loss": 1.0})
        log.write(2, {"dev/sw/exact_match": 0.5})
    for server in opened[1:]:
        assert server.tracker.got == [(2, {"loss": 1.0}), (2, {"dev/sw/exact_match": 0.5}), False]
    assert records(tmp_path) == [{"step": 2, **x} for _, x in opened[1].tracker.got[:-1]]


def test_a_resumed_run_goes_on_in_its_own(servers, tmp_path):
    open_trackers(servers, tmp_path, first=0)
    (tmp_path / IDS).unlink()
    trackers.write_checked(tmp_path / IDS, json.dumps({"wandb": "a", "mlflow": "b"}))
    assert [x.tracker.id for x in open_trackers(servers, tmp_path, 2)[1:]] == ["a", "b"]
    # Nothing was saved of the run that had them.
    assert [x.tracker.id for x in open_trackers(servers, tmp_path, 0)[1:]] == ["made", "made"]


def test_what_cannot_be_reached_is_said_once(servers, tmp_path, caplog):
    opened = open_trackers(servers, tmp_path, first=0)
    with RunLog(tmp_path, 4, 0, True, opened) as log:
        opened[2].tracker.fails = True
        for step in (1, 2, 3):
            log.write(step, {"loss": 1.0})
    assert [x.message for x in caplog.records] == [
        "mlflow does not take this run's metrics (no route); the run goes on without it"]
    assert len(opened[1].tracker.got) == 4 and len(records(tmp_path)) == 3


@pytest.mark.parametrize("config", [Config(logging=BOTH), CompareConfig(base=Config(logging=BOTH))])
def test_a_tracker_that_is_not_installed_is_refused(config, monkeypatch, tmp_path):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "mlflow" else name)
    with pytest.raises(InputError, match=r"'mlflow', which is not installed: pip install .*mlflow"):
        check_trackers(config)


def test_names_that_mlflow_takes():
    assert trackers._mlflow_name("tasks.my task (é).prompt") == "tasks.my task ___.prompt"
    assert trackers._mlflow_name("dev/sin_Sinh/a-b:c d.e") == "dev/sin_Sinh/a-b:c d.e"


def test_names_of_trackers():
    with pytest.raises(InputError, match="did you mean 'wandb'"):
        from_json({"logging": {"to": ["wandbb"]}})
    assert from_json({"logging": {"to": []}}).logging.to == ()
    assert not changed(Config(), Config(logging=BOTH))  # of a run that is resumed


@pytest.fixture
def config(cache_dir, unscored):
    config = make_config(cache_dir, train__steps=4, train__eval_every=2, train__log_every=1,
                         train__checkpoint_every=2)
    return replace(config, logging=BOTH)


@pytest.mark.slow
def test_real_libraries_have_curves_config_and_report(config, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run = tmp_path / "run"
    train(replace(config, train=replace(config.train, steps=2)), run)
    train(config, run)
    evaluate(run, languages=("en",), limit=4)
    report([run])
    wanted = {(x["step"], "loss"): x["loss"] for x in records(run) if "loss" in x}
    assert len(wanted) == 4
    ids = json.loads((run / IDS).read_text())

    client = mlflow.tracking.MlflowClient()
    kept = client.get_run(ids["mlflow"])
    assert kept.data.params["optimizer.b1"] == "0.8" and kept.info.status == "FINISHED"
    curve = client.get_metric_history(ids["mlflow"], "loss")
    assert {(x.step, "loss"): x.value for x in curve} == wanted
    assert client.get_metric_history(ids["mlflow"], "dev/exact_match")
    assert {"report.html", "accuracy.png"} <= {
        x.path for x in client.list_artifacts(ids["mlflow"])}

    found = {}
    for file in sorted(run.glob(f"wandb/offline-run-*/run-{ids['wandb']}.wandb")):
        found |= wandb_losses(file)
    assert found == pytest.approx(wanted)
    assert list(run.glob("wandb/offline-run-*/**/*.html")) or b"report.html" in b"".join(
        x.read_bytes() for x in run.glob("wandb/offline-run-*/*.wandb"))


def wandb_losses(file):
    """The losses of a run that Weights & Biases kept offline, by step."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = {}
    for data in log_records(file.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        items = {x.key or "/".join(x.nested_key): json.loads(x.value_json)
                 for x in record.history.item}
        if "loss" in items:
            found[record.history.step.num, "loss"] = items["loss"]
    return found


def log_records(data):
    """Records of LevelDB's log format: blocks of 32 KiB with parts, each of them with a checksum,
    a length and a kind (whole, first, middle, last), behind a header of seven bytes."""
    place, parts = 7, b""
    while place + 7 < len(data):
        if (left := -place % 32768) < 7 and left:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        if not kind:
            return
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


@pytest.mark.slow
def test_servers_that_are_not_there_hold_no_run(config, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    start = time.monotonic()
    train(config, tmp_path / "run")
    said = [x.message for x in caplog.records if "goes on without it" in x.message]
    assert len(said) == 2 and time.monotonic() - start < 120, said
    assert len([x for x in records(tmp_path / "run") if "loss" in x]) == 4
