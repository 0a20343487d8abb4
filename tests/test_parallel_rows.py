"""Parallel text as a task: pairs of lines, all languages in one training set, and how it is scored.
"""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import ROOT, get_config, make_config

from jaxfusion import config as configs
from jaxfusion.bridge import warm_start as warm
from jaxfusion.bridge.job import read_data, train
from jaxfusion.config import from_config_dict
from jaxfusion.data.pocket.world import write_translations
from jaxfusion.data.rows.examples import read_examples
from jaxfusion.data.tasks.catalogue import get_task
from jaxfusion.errors import InputError
from jaxfusion.fields import Config, DataConfig, TaskConfig

PAIRS = {
    "prompt": "{text}", "languages": ("sw", "si"), "source": "{split}-{language}.txt",
    "answers": "{split}-{language}.en.txt"}


@pytest.fixture
def pairs(tmp_path, monkeypatch):
    """A directory with four training pairs of each language, and two of development."""
    monkeypatch.chdir(tmp_path)
    for split, rows in {"train": 4, "dev": 2, "test": 2}.items():
        for language in ("sw", "si"):
            for ending in (".txt", ".en.txt"):
                (tmp_path / f"{split}-{language}{ending}").write_text(
                    "".join(f"{language}{ending[1:3]} {split} {i}\n" for i in range(rows)), "utf-8")
    return tmp_path


def read(language="all", split="train", **fields):
    task = get_task("pairs", {"pairs": TaskConfig(**{**PAIRS, **fields})})
    return read_examples("pairs", task, split, language, None)


def test_lines_are_rows_of_every_language(pairs):
    rows = read()
    assert [(x.query, x.target, x.language) for x in rows][3:5] == [
        ("swtx train 3", "swen train 3", "sw"), ("sitx train 0", "sien train 0", "si")]
    assert len(rows) == 8 and len(read("si", "dev")) == 2


def test_a_few_rows_are_of_every_language(pairs, monkeypatch):
    """A stream's first rows, and the texts of a warm start."""
    config = Config(tasks={"pairs": TaskConfig(**PAIRS)},
                    data=DataConfig("pairs", language="all", streaming=True, train_rows=5))
    rows = read_data(config)[2]
    assert [x.language for x in rows] == ["sw", "si", "sw", "si", "sw"]
    seen = []
    monkeypatch.setattr(warm, "ROWS", 4)
    monkeypatch.setattr(warm, "_pairs", lambda model, params, rows: seen.extend(rows) or 1 / 0)
    model = SimpleNamespace(bridge=SimpleNamespace(latents=0), trainable={}, frozen={})
    with pytest.raises(ZeroDivisionError):
        warm.warm_start(model, read())
    assert [x.language for x in seen] == ["sw", "si", "sw", "si"]


def test_one_file_may_be_all_splits(pairs):
    fields = {"source": "train-{language}.txt", "answers": "train-sw.en.txt",
              "splits": {"train": "all[:3]", "dev": "all[3:]"}}
    assert [x.query for x in read("si", "train", **fields)] == [f"sitx train {i}" for i in range(3)]
    assert [x.target for x in read("si", "dev", **fields)] == ["swen train 3"]
    with pytest.raises(InputError, match="give each split its own rows"):
        read("si", **{**fields, "splits": {"train": "all[:3]", "dev": "all[2:]"}})


def test_rows_in_the_place_of_lines_have_their_own_answers(pairs):
    for language in ("sw", "si"):
        (pairs / f"train-{language}.jsonl").write_text('{"text": "a", "target": "b"}\n' * 4)
    task = get_task("pairs", {"pairs": TaskConfig(**PAIRS)})
    for place in (".", "{split}-{language}.jsonl"):
        rows = read_examples("pairs", task, "train", "si", place)
        assert [(x.query, x.target) for x in rows] == [("a", "b")] * 4


def test_real_parallel_text_in_two_splits(real_data):
    folder = real_data / "ntrex" / "NTREX-128"
    rows = read(
        languages=("si", "sw"), names={"si": "sin", "sw": "swa"},
        source=f"{folder}/newstest2019-ref.{{language}}.txt",
        answers=f"{folder}/newstest2019-src.eng.txt",
        splits={"train": "all[:1900]", "dev": "all[1900:]"})
    assert len(rows) == 3800 and rows[0].target == rows[1900].target
    assert (rows[0].language, rows[1900].language) == ("si", "sw")


@pytest.mark.parametrize(("change", "message"), [
    (lambda d: (d / "train-si.en.txt").unlink(), "train-si.en.txt is missing"),
    (lambda d: (d / "train-si.txt").write_text("one\ntwo\n"),
     "'train-si.en.txt' has 4 lines, 'train-si.txt' 2: line 3 has no counterpart"),
    (lambda d: (d / "train-si.txt").write_text("one\n\nthree\nfour\n"),
     "train-si.txt:2: column 'text' is empty"),
    (lambda d: (d / "train-si.txt").write_bytes(b"one\ntwo\nthree\n\xff\n"), "is not UTF-8"),
])
def test_pairs_that_are_not_are_refused(pairs, change, message):
    change(pairs)
    with pytest.raises(InputError, match=message):
        read()


@pytest.mark.parametrize(("fields", "message"), [
    ({"labels": ("a", "b")}, "answers is for parallel text"),
    ({"prompt": "{source}"}, "let {text} be the prompt's only column"),
    ({"source": None}, "answers needs config.tasks.pairs.source"),
    ({"source": "hub:a/b"}, "answers needs config.tasks.pairs.source"),
])
def test_answers_without_their_texts_are_refused(pairs, fields, message):
    with pytest.raises(InputError, match=message):
        read(**fields)


def test_a_first_stage_on_pairs_is_judged_by_likelihood(pairs, cache_dir):
    """Every language is scored, by the targets' log-likelihood: the loss of those rows."""
    config = replace(
        make_config(cache_dir, "last,debug", train__steps=2, train__eval_every=1,
                    train__checkpoint_every=1, data__task="pairs", data__path=None,
                    data__language="all"),
        tasks={"pairs": TaskConfig(**PAIRS)})
    _, task, rows, dev = read_data(config)
    assert len(rows) == 8 and [*dev] == ["sw", "si"] and task.development == "log_likelihood"
    train(config, pairs / "run")
    lines = [json.loads(x) for x in (pairs / "run" / "metrics.jsonl").read_text().splitlines()]
    scores = [x for x in lines if "dev/log_likelihood" in x]
    means = [np.mean([x[f"dev/{name}/log_likelihood"] for name in dev]) for x in scores]
    assert len(scores) == 2
    np.testing.assert_allclose([x["dev/log_likelihood"] for x in scores], means, rtol=1e-6)


def test_the_pocket_world_has_translations(tmp_path):
    """Train-frame sentences of every language for training, others for development."""
    write_translations(tmp_path, scale=0.01)
    task = get_task("pocket_translation")
    assert "en" not in task.languages
    train_rows, dev = (read_examples("pocket_translation", task, split, "all", str(tmp_path))
                       for split in ("train", "dev"))
    assert {x.language for x in train_rows} == {x.language for x in dev} == {*task.languages}
    assert not {x.target for x in train_rows} & {x.target for x in dev}
    config = from_config_dict(get_config(ROOT / "configs" / "pocket_qa.py", "two_stages"))
    first = configs.first_stage(config)
    assert (first.data.task, first.data.text_prompt) == ("pocket_translation", "")
