"""Damaged files of a workdir: never silent, never a traceback; the newest whole step is used."""

import json
import logging
import random
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import equal, leave_unscored, make_config

from jaxfusion import config as configs
from jaxfusion.bridge.job import train
from jaxfusion.data.contamination import read_seen
from jaxfusion.errors import InputError
from jaxfusion.files import length_and_digest, note_sums, sum_of
from jaxfusion.reports.scored_runs import read_run
from jaxfusion.reports.terminal import merge_results
from jaxfusion.runs import answer_file as answer
from jaxfusion.runs.export.bridge import export
from jaxfusion.runs.score import evaluate
from jaxfusion.training import digest
from jaxfusion.training.checkpoint import Checkpoints, abstract_like, trained_part
from jaxfusion.training.logs import RunLog


@pytest.fixture(scope="module")
def scored(cache_dir, tmp_path_factory):
    """A scored run of two checkpoints: its workdir, config and final state."""
    config = make_config(cache_dir, "last,debug", train__steps=4, train__eval_every=2,
                         train__checkpoint_every=2, train__log_every=1)
    workdir = tmp_path_factory.mktemp("damage") / "run"
    with pytest.MonkeyPatch.context() as patch:
        leave_unscored(patch)
        state = train(config, workdir)
    evaluate(workdir, limit=8, languages=("en",))
    return workdir, config, state


@pytest.fixture
def copy(scored, tmp_path):
    return shutil.copytree(scored[0], tmp_path / "run")


def flip(file, bit):
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


# Digests


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_digests_on_devices_and_in_numpy_are_the_same(dtype):
    """Empty, scalar and odd shapes, more than one part."""
    rng = np.random.default_rng(0)
    for shape in ((), (1,), (0, 3), (5, 7, 9), (3, digest.PART + 1)):
        x = jnp.asarray(rng.standard_normal(shape) * 9).astype(dtype)
        host = digest.sums_on_host(np.asarray(x))
        np.testing.assert_array_equal(digest.sums_on_device(x), host)
    found = digest.digests({"a": {"b": x}})
    assert found == digest.host_digests({"a/b": np.asarray(x)})


def test_any_single_bit_and_any_exchange_shows_in_a_digest():
    x = np.random.default_rng(0).standard_normal(50).astype(np.float32)
    sound = digest.host_digests({"x": x})["x"]
    seen = set()
    for bit in range(50 * 32):
        words = x.view(np.uint32).copy()
        words[bit // 32] ^= np.uint32(1 << bit % 32)
        seen.add(digest.host_digests({"x": words.view(np.float32)})["x"])
    assert len(seen) == 50 * 32 and sound not in seen
    assert digest.host_digests({"x": x[::-1]})["x"] != sound
    assert digest.host_digests({"x": x.reshape(5, 10)})["x"] != sound


# Checkpoints


def arrays(step):
    """The files that hold arrays' data, and where in them it is."""
    return [x for x in (step / "state").rglob("*") if x.is_file() and x.parent.name == "d"]


@pytest.mark.parametrize("place", [0.2, 0.4, 0.6, 0.8])
def test_one_flipped_bit_restores_no_wrong_number(scored, copy, place):
    """What is compressed has no checksum of its own: numbers differ, and all else is sound."""
    file = max(arrays(copy / "checkpoints" / "4"), key=lambda x: x.stat().st_size)
    flip(file, 8 * int(place * file.stat().st_size) + 5)
    found, _ = Checkpoints(copy).restore_newest(abstract_like(scored[2]))
    assert int(found.step) == 2


def test_a_flipped_bit_in_an_array_is_never_restored(scored, copy, caplog):
    """The newest checkpoint's data are damaged; the one before it is used, and said."""
    state = scored[2]
    for file in arrays(copy / "checkpoints" / "4"):
        if file.stat().st_size > 2000:
            for place in (0.3, 0.5, 0.7):
                flip(file, 8 * int(place * file.stat().st_size) + 5)
    with caplog.at_level(logging.WARNING):
        step, _ = trained_part(copy)
        found, notes = Checkpoints(copy).restore_newest(abstract_like(state))
    assert step == 2 and int(found.step) == 2 and notes.data == {"next_index": 2}
    assert "checkpoints/4 cannot be read and is passed over" in caplog.text
    assert "checkpoints/4 is damaged and set aside as 4.damaged; the one before" in caplog.text
    assert (copy / "checkpoints" / "4.damaged").is_dir()


@pytest.mark.parametrize("file,content", [
    ("metrics/metrics", b""), ("metrics/metrics", b'{"score": "high"}'),
    ("metrics/metrics", b'{"score": 0.75}'), ("data/metadata", b'{"nex_index": 4}'),
    ("data/metadata", b'{"next_index": "4"}'), ("data/metadata", b"[4]"),
    ("data/metadata", b'{"next_index": 2}'), ("digests/metadata", b"{}"),
    ("digests/metadata", b"\xff\xfe"), ("digests/metadata", None), ("metrics/metrics", None),
    ("_CHECKPOINT_METADATA", b"{"), ("_CHECKPOINT_METADATA", None),
])
def test_damage_beside_the_arrays_falls_back_too(scored, copy, file, content, caplog):
    damaged = copy / "checkpoints" / "4" / file
    damaged.unlink() if content is None else damaged.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert trained_part(copy)[0] == 2
        checkpoints = Checkpoints(copy)
        found, _ = checkpoints.restore_newest(abstract_like(scored[2]))
        assert checkpoints.manager.all_steps() == [2]
        checkpoints.close()
    assert int(found.step) == 2 and "4.damaged" in caplog.text


def test_reading_goes_on_while_training_removes_checkpoints(scored, copy, monkeypatch, caplog):
    """The best one is gone after it was listed: what is saved by now is read."""
    read = Checkpoints._trained

    def remove_first(self, step, notes):
        if step == 4:
            shutil.rmtree(copy / "checkpoints" / "4")
        return read(self, step, notes)

    monkeypatch.setattr(Checkpoints, "_trained", remove_first)
    shutil.rmtree(copy / "checkpoints" / "2" / "metrics")  # not the best one
    shutil.rmtree(copy / "checkpoints" / "2" / "digests")
    notes = copy / "checkpoints" / "2" / "_CHECKPOINT_METADATA"
    about = json.loads(notes.read_text())
    about["item_handlers"].pop("metrics")
    about["item_handlers"].pop("digests")
    notes.write_text(json.dumps(about))
    assert trained_part(copy)[0] == 2
    assert "cannot be read" not in caplog.text


def test_damaged_scores_do_not_get_into_a_model_card(scored, copy, tmp_path):
    file = copy / "eval" / "results.json"
    file.write_text(file.read_text().replace("0.", "1.", 1))
    with pytest.raises(InputError, match=r"results\.json is damaged"):
        export(copy, tmp_path / "out")


def test_an_older_damaged_score_does_not_stop_a_run(scored, copy, caplog):
    """Every score is read before the next save."""
    (copy / "checkpoints" / "2" / "metrics" / "metrics").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        longer = replace(scored[1], train=replace(scored[1].train, steps=6))
        state = train(longer, copy)
    assert int(state.step) == 6 and "2.damaged" in caplog.text
    assert Checkpoints(copy).steps == [4, 6]


def test_a_directory_holds_the_step_it_is_named_after(scored, copy, caplog):
    """The checkpoint of step 2 under the name 3, also with a position that fits."""
    shutil.copytree(copy / "checkpoints" / "2", copy / "checkpoints" / "5")
    (copy / "checkpoints" / "5" / "data" / "metadata").write_text('{"next_index": 5}')
    shutil.rmtree(copy / "checkpoints" / "5" / "digests")
    metadata = copy / "checkpoints" / "5" / "_CHECKPOINT_METADATA"
    items = json.loads(metadata.read_text())
    del items["item_handlers"]["digests"]
    metadata.write_text(json.dumps(items))
    with caplog.at_level(logging.WARNING):
        found, _ = Checkpoints(copy).restore_newest(abstract_like(scored[2]))
    assert int(found.step) == 4 and "it holds step 2" in caplog.text


def test_checkpoints_of_earlier_versions_load_and_that_is_said(scored, copy, caplog):
    """They have no digests."""
    for step in ("2", "4"):
        place = copy / "checkpoints" / step
        shutil.rmtree(place / "digests")
        items = json.loads((place / "_CHECKPOINT_METADATA").read_text())
        del items["item_handlers"]["digests"]
        (place / "_CHECKPOINT_METADATA").write_text(json.dumps(items))
    with caplog.at_level(logging.INFO):
        found, _ = Checkpoints(copy).restore_newest(abstract_like(scored[2]))
    assert equal(jax.device_get(found), jax.device_get(scored[2]))
    assert caplog.text.count("made no digests") == 1


def test_checkpoints_that_are_a_file_are_refused_before_metrics_are_cut(scored, copy):
    shutil.rmtree(copy / "checkpoints")
    (copy / "checkpoints").write_text("what is this")
    before = (copy / "metrics.jsonl").read_bytes()
    with pytest.raises(InputError, match="checkpoints is a file, expected a directory"):
        train(scored[1], copy)
    assert (copy / "metrics.jsonl").read_bytes() == before


# Small files


@pytest.mark.parametrize("content", [
    b"[]", b"{", b"\xff", b'{"job": []}', b'{"train": 3}', b'{"encoder": null}',
    b'{"optimizer": {"groups": {"a": 1}}}',
])
def test_a_damaged_config_is_one_line(copy, content):
    (copy / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json.* is damaged"):
        configs.load(copy / "config.json")
    sum_of(copy / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json"):
        configs.load(copy / "config.json")


def test_a_config_that_was_changed_says_how_to_go_on(copy):
    """A workdir may have been moved, and the paths in it with it."""
    file = copy / "config.json"
    file.write_text(file.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(InputError, match=r"on purpose, remove \.config\.json\.sum next to it"):
        configs.load(file)
    sum_of(file).unlink()
    assert configs.load(file).train.seed == 1


@pytest.mark.parametrize("damage", [
    lambda x: x[:-3], lambda x: b"", lambda x: b"garbage", lambda x: x[:140] + b"\0" + x[141:]])
def test_damaged_fingerprints_are_one_line(copy, damage):
    file = copy / "seen.npy"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(InputError, match=r"seen\.npy is damaged.*run train\.py again"):
        read_seen(copy)


def test_metrics_that_are_no_text_do_not_stop_a_run(copy, caplog):
    file = copy / "metrics.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole[:30] + b"\xff\xff" + whole[32:] + b'{"step": 5, "lo')
    with caplog.at_level(logging.WARNING):
        assert read_run(copy).metrics == []
        RunLog(copy, 4, 4).__exit__(None, None, None)
    assert "its curves are skipped" in caplog.text and "lines that are not records are dropped" in (
        caplog.text)
    assert len(file.read_bytes().splitlines()) == len(whole.splitlines()) - 1
    assert file.read_bytes().endswith(b"\n")


@pytest.mark.parametrize("name", ["results.json", "results.about.json"])
@pytest.mark.parametrize("content", [b"", b"[1]", b'{"step": 4}', None])
def test_damaged_results_are_kept_apart(copy, name, content, caplog):
    """What was scored now is not lost for them."""
    file = copy / "eval" / name
    about = json.loads((copy / "eval" / "results.about.json").read_text())
    file.unlink() if content is None else file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        found = merge_results(copy / "eval" / "results.json", {"xnli": {"en": {}}}, about)
    assert found == {"xnli": {"en": {}}}
    if not (name == "results.json" and content is None):
        assert "is damaged: renamed to results.damaged.json" in caplog.text
        assert json.loads((copy / "eval" / "results.json").read_text()) == found


@pytest.mark.parametrize("file,content,said", [
    ("out.jsonl.about.json", b"{", r"about\.json is damaged"),
    ("out.jsonl.about.json", b"[]", r"about\.json is damaged"),
    ("out.jsonl.about.json", None, r"about\.json is missing"),
    ("out.jsonl", b'{"prompt": "a", "answer": "ne"}\n', r"out\.jsonl is damaged"),
    ("out.jsonl", b"\xff\n", r"out\.jsonl is damaged"),
])
def test_damaged_answers_are_not_continued(tmp_path, file, content, said):
    out, rows = tmp_path / "out.jsonl", [({"prompt": "a"}, "in:1"), ({"prompt": "b"}, "in:2")]
    out.touch()
    assert answer._begin(out, rows, {"step": 4}) == 0
    line = b'{"prompt": "a", "answer": "no"}\n'
    note_sums(out, [length_and_digest(line)])
    out.write_bytes(line + b'{"prom')
    assert answer._begin(out, rows, {"step": 4}) == 1
    damaged = tmp_path / file
    damaged.unlink() if content is None else damaged.write_bytes(content)
    with pytest.raises(InputError, match=rf"{said}.*give another --output, or remove"):
        answer._begin(out, rows, {"step": 4})


def test_a_changed_number_among_scores_is_refused(copy):
    """A report is made of what was scored, or not at all."""
    file = copy / "eval" / "details.json"
    text = file.read_text()
    file.write_text(text.replace("[0, ", "[1, ", 1) if "[0, " in text else text + " ")
    with pytest.raises(InputError, match=r"details\.json is damaged.*score the run again"):
        read_run(copy)


# All of it


def look(workdir, state, caplog):
    """What is read of a workdir, part by part: its value, or `said` where something was said."""
    def restored():
        found, notes = Checkpoints(workdir).restore_newest(abstract_like(state))
        return [x.tobytes() for x in map(np.asarray, jax.tree.leaves(found))], notes

    def trained():
        step, found = trained_part(workdir)
        return step, {name: x.tobytes() for name, x in found.items()}

    def log():
        RunLog(workdir, 4, 4).__exit__(None, None, None)
        return (workdir / "metrics.jsonl").read_bytes()

    parts = {"config": lambda: configs.load(workdir / "config.json"),
             "seen": lambda: read_seen(workdir).tobytes(), "trained": trained,
             "run": lambda: replace(read_run(workdir), place=""), "restored": restored, "log": log}
    found = {}
    for name, read in parts.items():
        caplog.clear()
        try:
            found[name] = read()
        except InputError as error:
            assert "\n" not in str(error)
            found[name] = "said"
        if any(record.levelno >= logging.WARNING for record in caplog.records):
            found[name] = "said"
    return found


def damages(workdir, rng, flips, others):
    """Functions of a file, and which file each is for."""
    files = [x.relative_to(workdir) for x in sorted(workdir.rglob("*"))
             if x.is_file() and x.relative_to(workdir).parts[0] != "tensorboard"]
    filled = [x for x in files if (workdir / x).stat().st_size]
    for _ in range(flips):
        file = rng.choice(filled)
        bit = rng.randrange(8 * (workdir / file).stat().st_size)
        yield file, f"bit {bit}", lambda x, bit=bit: flip(x, bit)
    for _ in range(others):
        file = rng.choice(filled)
        length = rng.randrange((workdir / file).stat().st_size)
        if rng.random() < 0.3:
            yield file, "removed", lambda x: x.unlink()
        else:
            yield file, f"cut at {length}", lambda x, n=length: x.write_bytes(x.read_bytes()[:n])


@pytest.mark.parametrize("flips,others", [
    (12, 6), pytest.param(500, 100, marks=pytest.mark.slow)])
def test_no_damage_is_silent(scored, tmp_path, caplog, flips, others):
    """Single bits, cut and removed files, over everything that is read back.

    Silent is a value that differs with nothing said; a removed note of what was written, or a
    removed file that a run need not have, changes no value.
    """
    workdir, _, state = scored
    caplog.set_level(logging.INFO)
    whole = look(shutil.copytree(workdir, tmp_path / "whole"), state, caplog)
    assert "said" not in whole.values()
    said = 0
    for i, (file, what, damage) in enumerate(damages(workdir, random.Random(flips), flips, others)):
        place = shutil.copytree(workdir, tmp_path / "damaged")
        damage(place / file)
        if what == "removed" and file.name in ("seen.npy", "details.about.json", "metrics.jsonl"):
            shutil.rmtree(place)
            continue
        found = look(place, state, caplog)
        silent = [x for x in whole if found[x] not in ("said", whole[x])]
        assert not silent, f"{i}: {file}, {what}: {silent}"
        said += "said" in found.values()
        shutil.rmtree(place)
    if flips > 100:  # a few draws may all hit files that no value depends on
        assert said > (flips + others) / 5
