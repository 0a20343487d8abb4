"""Where rows come from, and what is said of those that cannot be read."""

import csv
import gzip
import json
import logging
import shutil
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from helpers import Hub
from pyarrow import parquet

from jaxfusion import config as configs
from jaxfusion.config import CONFIG_FILE, default_config, from_config_dict
from jaxfusion.data.rows import files as readers
from jaxfusion.data.rows import hub as remote
from jaxfusion.data.rows.examples import at_hand, find_source, read_examples, read_stream
from jaxfusion.data.tasks.catalogue import TASKS, check_languages, get_task
from jaxfusion.data.tasks.spec import SAME, Source, Task, configured
from jaxfusion.errors import InputError
from jaxfusion.fields import DataConfig, TaskConfig
from jaxfusion.hf import hub as hf_hub
from jaxfusion.training.workdir import check_workdir

TASK = Task("Text: {text} Label: ", ("good", "bad"), ("en", "si"))
ROWS = [{"text": 'He said "go, now', "label": "bad"}, {"text": "සිංහල", "label": "good"},
        {"text": "third", "label": "1"}]


def read(path, split="train", language="en", task=TASK):
    return read_examples("mine", task, split, language, str(path))


def texts(found):
    return [x.query.removeprefix("Text: ").removesuffix(" Label: ") for x in found]


def write(file, rows=ROWS, mark="", end="\n"):
    """The rows as the file's suffix says."""
    columns = list(rows[0])
    if file.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), file)
        return
    lines = {
        ".jsonl": lambda: [json.dumps(row, ensure_ascii=False) for row in rows],
        ".json": lambda: [json.dumps(rows)],
        ".tsv": lambda: ["\t".join(columns), *("\t".join(row.values()) for row in rows)],
        ".csv": lambda: [",".join(columns), *(",".join(
            '"' + x.replace('"', '""') + '"' for x in row.values()) for row in rows)],
    }[file.suffix]()
    file.write_bytes((mark + "".join(line + end for line in lines)).encode("utf-8"))


# Files


@pytest.mark.parametrize("mark, end", [("", "\n"), ("\ufeff", "\r\n")], ids=["unix", "windows"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".tsv", ".csv", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, suffix, mark, end):
    write(tmp_path / f"train-si{suffix}", mark=mark, end=end)
    for place in (tmp_path, tmp_path / f"{{split}}-{{language}}{suffix}",
                  tmp_path / f"*-{{language}}{suffix}*"):
        task = TASK if place == tmp_path or "split" in str(place) else replace(
            TASK, source=Source(str(place), splits={"train": "train"}))
        found = read(place, language="si", task=task)
        assert texts(found) == [row["text"] for row in ROWS]
        assert [x.label for x in found] == [1, 0, 1]


def test_a_pattern_reads_all_its_files_in_the_order_of_their_names(tmp_path):
    for name in ("b", "a"):
        write(tmp_path / f"train-{name}.jsonl", [{"text": name, "label": "good"}])
    write(tmp_path / "train-c.csv", [{"text": "c", "label": "good"}])
    assert texts(read(tmp_path / "{split}-*")) == ["a", "b", "c"]
    with pytest.raises(InputError, match=r"dev-\* matches no file: task 'mine' reads split 'dev'"):
        read(tmp_path / "{split}-*", split="dev")
    write(tmp_path / "rows.jsonl", [{"text": "a", "label": "good"}])
    with pytest.raises(InputError, match=r"rows\.jsonl has no {split}: training and test rows"):
        read(tmp_path / "rows.jsonl")


def test_one_file_may_hold_all_languages(tmp_path):
    write(tmp_path / "test.csv", [{**ROWS[0], "language": x} for x in ("en", "en", "ta")])
    assert len(read(tmp_path / "{split}.csv", "test")) == 2
    with pytest.raises(InputError, match="no rows in 'si'; its column 'language' has en, ta"):
        read(tmp_path / "{split}.csv", "test", "si")


def test_a_split_may_be_a_part_of_a_file(tmp_path):
    write(tmp_path / "all.tsv")
    task = replace(TASK, source=Source(str(tmp_path / "{split}.tsv"), splits={
        "train": "all[:2]", "dev": "all[2:3]", "test": "all[1:]"}))
    sizes = {split: len(read_examples("mine", task, split, "en", None)) for split in
             ("train", "dev", "test")}
    assert sizes == {"train": 2, "dev": 1, "test": 2}


@pytest.mark.parametrize("rows", ["all[-100:]", "all[:10%]", "all[1:2:3]"])
def test_rows_that_are_not_counted_from_the_first_are_the_hubs_alone(rows, tmp_path):
    write(tmp_path / "rows.csv")
    own = TaskConfig("{text}", splits={"dev": rows})
    line = r"splits\.dev is 'all\[.*, expected rows counted from"
    with pytest.raises(InputError, match=line):
        get_task("mine", {"mine": replace(own, source="rows.csv")})
    with pytest.raises(InputError, match=line):
        read_examples("mine", get_task("mine", {"mine": own}), "dev", "en",
                      str(tmp_path / "rows.csv"))
    task = get_task("mine", {"mine": replace(own, source="hub:owner/name")})
    assert task.source.rows("dev") == (rows, slice(None))  # which its library reads


def test_a_renamed_column_that_is_missing_has_both_names(tmp_path):
    write(tmp_path / "test.csv", [{"text": "x", "grade": "bad"}])
    own = TaskConfig("{text}", ("bad", "good"), source=str(tmp_path / "{split}.csv"),
                     columns={"label": "mood"})
    with pytest.raises(InputError, match="'label', which the task calls 'mood' there, is missing"):
        read_examples("mine", get_task("mine", {"mine": own}), "test", "en", None)


def test_a_task_without_a_source_has_its_columns_wherever_the_rows_are(tmp_path):
    write(tmp_path / "test.csv", [{"text": "x", "mood": "bad"}])
    task = get_task("mine", {"mine": TaskConfig("{text}", ("bad", "good"),
                                                columns={"label": "mood"})})
    found, = read_examples("mine", task, "test", "en", str(tmp_path / "{split}.csv"))
    assert found.target == "bad"
    assert task.at("hub:a/b").rename == task.at("tfds:a/b").rename == {"mood": "label"}
    assert task.source is None


def test_languages_at_hand_are_those_with_files(tmp_path):
    write(tmp_path / "test-si.csv")
    for place in (tmp_path, tmp_path / "{split}-{language}.*"):
        assert at_hand("mine", TASK, "test", str(place)) == ("si",)
    own = replace(TASK, source=Source(str(tmp_path / "{split}-{language}.csv"), splits=SAME))
    assert at_hand("mine", own, "test", None) == ("si",)
    assert at_hand("mine", TASK, "test", None) == ("en", "si")


@pytest.mark.parametrize("name, content, message", [
    ("train.tsv", b"text\tlabel\nfine\tgood\ncaf\xe9\tgood\n",
     r"train\.tsv:3: is not UTF-8: byte 0xe9 at offset 24 of the file; save the file as UTF-8"),
    ("train.jsonl", '{"text": "x"}\n'.encode("utf-16"),
     r"train\.jsonl:1: is not UTF-8: byte 0xff at offset 0 of the file, the start of UTF-16"),
    ("train.csv", b'text,label\nfine,good\n"open,good\nfine,good\n',
     r"train\.csv:3: unterminated quoted field starts here \(line 4: unexpected"),
    ("train.csv", b'text,label\n"two\nlines",good\n"open,good\n"fine",good\n',
     r"train\.csv:4: unterminated quoted field starts here .*line 5: ',' expected after"),
    ("train.csv", b"text,label\nx,y,good\n", r"train\.csv:2: 3 comma-separated fields, expected 2"),
    ("train.csv", b"text,text\n", r"train\.csv:1: duplicate column name"),
    ("train.csv", b"text,label\n", r"split 'train' of task 'mine' in 'en' is empty"),
    ("train.jsonl", b"", r"split 'train' of task 'mine' in 'en' is empty"),
    ("train.csv", b"text,label\nfine,good\nx,so-so\n",
     r"train\.csv:3: label 'so-so' is not one of good, bad \(or 0 … 1\)"),
    ("train.jsonl", b'{"text": {"en": "x"}, "label": "good"}\n',
     r"train\.jsonl:1: column 'text': expected text, got {'en': 'x'}"),
    ("train.jsonl", b'{"text": "x", "id": 7, "label": 0}\n{"text": "y", "id": 7, "label": 0}\n',
     r"train\.jsonl:2: id 7 is already used by .*train\.jsonl:1, a different row"),
    ("train.json", b'[{"text": "\\ud800", "label": "good"}]',
     r"train\.json row 1: unpaired surrogate"),
    ("train.csv", b"text," + b"x" * 9999 + b"\nfine\n", r"1 comma-separated fields, .*x{9} …\)$"),
    ("train.parquet", b"PAR1 and no more", r"train\.parquet cannot be read as Parquet after"),
    ("train.xlsx", b"", r"train\.xlsx is not one of \.jsonl, \.json, \.csv, \.tsv, \.parquet"),
])
def test_bad_files_are_named_with_their_row(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read(tmp_path / "{split}.*")


def test_a_parquet_file_cut_short_is_named(tmp_path):
    file = tmp_path / "train.parquet"
    write(file, ROWS * 1000)
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(InputError, match=r"train\.parquet cannot be read as Parquet .* complete\?"):
        read(file.with_name("{split}.parquet"))
    file.write_bytes(whole[:200] + bytes(200) + whole[400:])  # damaged inside
    with pytest.raises(InputError, match=r"train\.parquet cannot be read as Parquet after row"):
        read(file.with_name("{split}.parquet"))
    write(file, [{"text": "x", "label": "neither"}])
    with pytest.raises(InputError, match=r"train\.parquet row 1: label 'neither' is not one of"):
        read(file.with_name("{split}.parquet"))


def test_a_parquet_file_that_says_a_column_twice_is_refused(tmp_path):
    """Python kept the last one."""
    one, other = pa.array(["x"]), pa.array(["good"])
    parquet.write_table(pa.Table.from_arrays([one, one, other], ["text", "text", "label"]),
                        tmp_path / "train.parquet")
    with pytest.raises(InputError, match="duplicate column name: text, text, label"):
        read(tmp_path / "{split}.parquet")


@pytest.mark.parametrize("cells, said", [
    (pa.array([b"x"]), "column 'text': expected text, got b'x'"),
    (pa.array([2**30], pa.date32()), "cannot be read as Parquet after row 0: days=1073741824"),
    (pa.array([1], pa.timestamp("us", "Mars/X")), "cannot be read as Parquet after row 0: 'Mars"),
])
def test_parquet_cells_that_are_no_text_are_said(tmp_path, cells, said):
    parquet.write_table(pa.table({"text": cells, "label": ["good"]}), tmp_path / "train.parquet")
    with pytest.raises(InputError, match=said):
        read(tmp_path / "{split}.parquet")


def test_a_renamed_column_takes_the_place_of_another_of_its_name(tmp_path):
    write(tmp_path / "train.csv", [{"review": "fine", "text": "other", "label": "good"}])
    task = replace(TASK, source=Source(str(tmp_path / "{split}.csv"), splits=SAME,
                                       rename={"review": "text"}))
    assert texts(read_examples("mine", task, "train", "en", None)) == ["fine"]


def test_a_quote_in_a_tsv_is_a_character_like_any_other(tmp_path):
    (tmp_path / "train.tsv").write_text('text\tlabel\n"open\tgood\n12" pipe\tbad\n')
    assert texts(read(tmp_path / "{split}.tsv")) == ['"open', '12" pipe']


def test_a_quoted_field_may_have_lines_and_be_long(tmp_path):
    with (tmp_path / "train.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["text", "label"], ["two\nlines", "good"],
                                      ["x" * 200_000, "bad"], ["y", "neither"]])
    found = read_stream("mine", TASK, "train", "en", str(tmp_path / "{split}.csv"))
    assert texts([next(found), next(found)]) == ["two\nlines", "x" * 200_000]
    with pytest.raises(InputError, match=r"train\.csv:5: label 'neither'"):
        next(found)


def test_a_row_that_comes_again_is_left_out_and_counted(tmp_path, caplog):
    row = {"id": "a", "text": "x", "label": "good"}
    write(tmp_path / "train-1.jsonl", [row, {**row, "id": "b"}])
    write(tmp_path / "train-2.jsonl", [row, row])
    with caplog.at_level(logging.WARNING):
        assert len(read(tmp_path / "{split}-*.jsonl")) == 2
    assert "2 duplicate rows skipped (same id" in caplog.text


def test_two_files_for_the_same_rows_are_refused(tmp_path):
    write(tmp_path / "train-en.jsonl")
    write(tmp_path / "train-en.csv")
    with pytest.raises(InputError, match=r"train-en\.csv and train-en\.jsonl exist for this"):
        read(tmp_path)
    (tmp_path / "train-en.csv").unlink()
    with pytest.raises(InputError, match=r"dev-en\.jsonl is missing: .* \.json, \.csv, \.tsv"):
        read(tmp_path, "dev")


def test_the_sample_of_indicxnli_and_a_file_of_belebele(real_data, tmp_path):
    path = real_data / "indicxnli_test_50"
    found = {x: len(read_examples("indicxnli", TASKS["indicxnli"], "test", x, str(path)))
             for x in TASKS["indicxnli"].languages}
    assert sum(found.values()) == 549 and min(found.values()) > 40
    assert len(TASKS["belebele"].languages) == 122
    row = {"flores_passage": "p", "question": "q", "correct_answer_num": "3",
           **{f"mc_answer{i}": f"a{i}" for i in range(1, 5)}}
    write(tmp_path / "sin_Sinh.jsonl", [row])
    one, = read_examples("belebele", TASKS["belebele"], "test", "sin_Sinh", str(tmp_path))
    assert one.target == "C" and one.query.startswith("Passage: p\nQuestion: q\nA: a1\n")


# Tasks of one's own

OWN = {"prompt": "Text: {text} Label: ", "labels": ("good", "bad"), "languages": ("en", "si"),
       "columns": {"text": "review", "label": "stars"}, "spellings": ("5", "1")}


def own_config(**fields):
    config = default_config()
    config.tasks = {"reviews": {**OWN, **fields}}
    config.data.task = "reviews"
    return config


def test_a_task_is_one_entry_of_a_config(tmp_path):
    write(tmp_path / "train.csv", [{"review": "fine", "stars": "5"}, {"review": "x", "stars": "1"}])
    config = from_config_dict(own_config(source=str(tmp_path / "{split}.csv")))
    configs.save(config, tmp_path / "config.json")
    config = configs.load(tmp_path / "config.json")
    task = get_task("reviews", config.tasks)
    found = read_examples("reviews", task, "train", "en", None)
    assert [x.target for x in found] == ["good", "bad"] and texts(found) == ["fine", "x"]
    # Elsewhere its columns have the same names.
    (tmp_path / "train.csv").rename(tmp_path / "train-2.csv")
    assert read_examples("reviews", task, "train", "en", str(tmp_path / "{split}-2.csv")) == found
    check_languages("reviews", ("si",), config.tasks)
    with pytest.raises(InputError, match="task 'reviews' has no language 'fr'; it has en, si"):
        check_languages("reviews", ("fr",), config.tasks)
    with pytest.raises(InputError, match=r"unknown task 'review' \(did you mean 'reviews'"):
        get_task("review", config.tasks)


@pytest.mark.parametrize("fields, message", [
    ({"promt": "x"}, r"field 'tasks\.reviews\.promt' \(did you mean 'prompt'"),
    ({"prompt": "Text: "}, r"tasks\.reviews\.prompt is 'Text: ', expected a text with a column"),
    ({"prompt": "{text} {0}"}, r"tasks\.reviews\.prompt is not a valid template"),
    ({"prompt": "{text} {"}, r"tasks\.reviews\.prompt is not a valid template"),
    ({"labels": ("a", "A")}, r"labels contains duplicates"),
    ({"spellings": ("1",)}, r"spellings has 1 entries, expected one for each of the 2 labels"),
    ({"splits": {"tset": "x"}}, r"splits: 'tset' \(did you mean 'test'"),
    ({"extract": "number"}, r"extract 'number' \(did you mean 'last_number'"),
    ({"unlabelled": True}, r"tasks\.reviews is unlabelled, but has labels"),
    ({"languages": ()}, r"tasks\.reviews\.languages is empty"),
])
def test_a_task_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        get_task("reviews", from_config_dict(own_config(**fields)).tasks)


def test_a_name_is_taken_once_and_a_source_is_needed():
    with pytest.raises(InputError, match="'xnli' already exists"):
        get_task("sib200", {"xnli": TaskConfig("{text}")})
    with pytest.raises(InputError, match=r"task 'mine' has no source of its own; set config\.data"):
        read_examples("mine", get_task("mine", {"mine": TaskConfig("{text}")}), "test", "en", None)


# The hub


def test_a_dataset_is_pinned_to_its_commit(monkeypatch, tmp_path):
    hub = Hub(monkeypatch, [{"text": "x", "label": 1}])
    c = DataConfig(task="mine", path="hub:owner/name", revision="v1")
    task = configured(TASK, c)
    source = find_source("mine", task, "train", "en", c.path)
    assert remote.commit_of(source, "train", "en") == hub.hash
    read_examples("mine", task, "train", "en", c.path)
    assert hub.asked == [("owner/name", None, "v1"), "downloaded", "train"]  # opened once
    # A workdir keeps the commit, as long as it is of the same rows.
    config = from_config_dict(default_config())
    saved = replace(config, data=replace(c, revision=hub.hash))
    configs.save(saved, tmp_path / CONFIG_FILE)
    (tmp_path / "checkpoints" / "1").mkdir(parents=True)  # a step was saved
    assert check_workdir(replace(config, data=c), tmp_path) == saved
    with pytest.raises(InputError, match=r"data\.revision: 'c+' -> 'd+'"):
        check_workdir(replace(config, data=replace(c, revision="d" * 40)), tmp_path)


def test_the_settings_are_for_every_dataset_of_the_training_languages():
    en, others = Source("hub:a/en"), Source("hub:a/others")
    task = replace(TASK, languages=("en", "sw"), source=others, sources={"en": en})
    pinned, streamed = {"revision": "v1", "streaming": True}, {"streaming": True}
    for language, wanted in (
        ("all", (streamed, pinned)),  # the commit is that of the first language's dataset
        ("en", ({}, pinned)), ("sw", (pinned, {}))):
        found = configured(task, DataConfig(language=language, **pinned))
        assert (found.source, found.sources["en"]) == (
            replace(others, **wanted[0]), replace(en, **wanted[1]))


def test_classes_are_known_by_their_names_whatever_their_order(monkeypatch):
    features = datasets.Features({"text": datasets.Value("string"),
                                  "label": datasets.ClassLabel(names=["Bad", "Good"])})
    Hub(monkeypatch, [{"text": "x", "label": 1}], features)
    found, = read_examples("mine", TASK, "train", "en", "hub:owner/name")
    assert found.target == "good"


def test_a_stream_is_read_no_further_than_it_must(monkeypatch):
    rows = [{"text": str(i), "label": i % 2} for i in range(6)] + [{"text": "bad row", "label": 9}]
    hub = Hub(monkeypatch, rows)
    task = configured(TASK, DataConfig(path="hub:owner/name", streaming=True))
    found = read_stream("mine", task, "train", "en", "hub:owner/name")
    assert texts([next(found) for _ in range(6)]) == list("012345")
    assert "downloaded" not in hub.asked
    with pytest.raises(InputError, match=r"owner/name \(None\) train row 6: label 9"):
        next(found)


@pytest.fixture
def hub_copy(tmp_path, monkeypatch):
    """A copy of a hub dataset in the cache, as the datasets library leaves it, and no hub."""
    write(tmp_path / "rows.jsonl", [{"premise": "p", "hypothesis": "h", "label": "1"}])
    made = datasets.load_dataset_builder(
        "json", data_files={"test": str(tmp_path / "rows.jsonl")}, cache_dir=str(tmp_path / "made"))
    made.download_and_prepare()
    copy = tmp_path / "cache" / "facebook___xnli" / "sw" / "0.0.0" / ("a" * 40)
    shutil.copytree(made.cache_dir, copy)
    (copy / "json-test.arrow").rename(copy / "xnli-test.arrow")
    about = json.loads((copy / "dataset_info.json").read_text())
    about |= {"config_name": "sw", "dataset_name": "xnli"}
    (copy / "dataset_info.json").write_text(json.dumps(about))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    remote._builder.cache_clear()


def test_out_of_reach_a_copy_is_read_and_said(hub_copy, caplog):
    with caplog.at_level(logging.WARNING):
        found, = read_examples("xnli", TASKS["xnli"], "test", "sw", None)
    assert found.target == "Neutral"
    assert f"reading the cached copy of facebook/xnli, commit {'a' * 40}" in caplog.text
    with pytest.raises(InputError, match=r"no copy is cached.*put test-ur\.jsonl in"):
        read_examples("xnli", TASKS["xnli"], "test", "ur", None)
    other = configured(TASKS["xnli"], DataConfig(language="sw", revision="b" * 40))
    with pytest.raises(InputError, match=r"cached copy of .* is commit a+, not b+"):
        read_examples("xnli", other, "test", "sw", None)


def test_a_hub_that_never_answers_is_given_up_soon(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(hf_hub, "PATIENCE", 0.1)
    monkeypatch.setattr(hf_hub, "MOST_PATIENCE", 0.4)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes connections, says nothing
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        hf_hub.hub_in_reach.cache_clear()
        clock = time.monotonic()
        assert not hf_hub.hub_in_reach() and time.monotonic() - clock < 2
        assert constants.HF_HUB_OFFLINE  # the libraries know
        # One that answers, even with an error, is in reach.
        monkeypatch.setattr(hf_hub, "MOST_PATIENCE", 5.0)
        thread = threading.Thread(target=_refuse, args=(server,), daemon=True)
        thread.start()
        assert hf_hub.answers(constants.ENDPOINT)
        thread.join(5)
    hf_hub.hub_in_reach.cache_clear()


def _refuse(server):
    for _ in range(2):  # the first connection is the one that was given up
        connection, _ = server.accept()
        with connection, suppress(OSError):
            connection.recv(1000)
            connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")


# tensorflow-datasets


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """A set as tensorflow-datasets' XNLI is, prepared as ArrayRecord."""
    import tensorflow_datasets as tfds

    languages = ("en", "sw")

    class Xnli(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
                "premise": tfds.features.Translation(languages),
                "hypothesis": tfds.features.TranslationVariableLanguages(languages),
                "label": tfds.features.ClassLabel(names=["neutral", "entailment",
                                                         "contradiction"])}))

        def _split_generators(self, manager):
            return {"test": self._generate_examples()}

        def _generate_examples(self):
            for i in range(4):
                yield i, {"premise": {x: f"{x} සිං {i}" for x in languages},
                          "hypothesis": {x: f"{x} {i}" for x in languages}, "label": i % 3}

    folder = tmp_path_factory.mktemp("tfds")
    builder = Xnli(data_dir=folder, file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_path)


def test_tensorflow_datasets_are_read_without_tensorflow(tfds_dir):
    found = read_examples("xnli", TASKS["xnli"], "test", "sw", f"tfds:{tfds_dir}")
    wanted = {(f"Premise: sw සිං {i} Hypothesis: sw {i} Label: ", answer) for i, answer in
              enumerate(("Neutral", "Entailment", "Contradiction", "Neutral"))}
    assert {(x.query, x.target) for x in found} == wanted
    assert not any(name.split(".")[0] == "tensorflow" for name in sys.modules)
    task = get_task("mine", {"mine": TaskConfig(
        "{premise}", ("neutral", "entailment", "contradiction"), source=f"tfds:{tfds_dir}",
        splits={"test": "test[1:3]"})})
    with pytest.raises(InputError, match=r"test row 1: column 'premise': expected text, got {'en'"):
        read_examples("mine", task, "test", "en", None)
    with pytest.raises(InputError, match="has no split for 'train'; it has test"):
        read_examples("mine", task, "train", "en", None)


def test_a_set_of_tfrecords_says_how_to_prepare_it(tfds_dir, tmp_path):
    place = tmp_path / "xnli" / "1.0.0"
    shutil.copytree(tfds_dir, place)
    about = place / "dataset_info.json"
    about.write_text(about.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(InputError, match=r"exists only as tfrecord.*builder\('xnli', file_format"):
        read_examples("xnli", TASKS["xnli"], "test", "sw", f"tfds:{place}")
    with pytest.raises(InputError, match=r"has no dataset_info\.json"):
        read_examples("xnli", TASKS["xnli"], "test", "sw", f"tfds:{tmp_path}")
    with pytest.raises(InputError, match="tfds:no_such_set cannot be opened"):
        read_examples("xnli", TASKS["xnli"], "test", "sw", "tfds:no_such_set")


def test_sib200_is_read_as_its_authors_read_it(real_data):
    """Pandas wrote it, and quotes texts that hold quotes; XNLI's files are raw."""
    pandas = pytest.importorskip("pandas")
    task, changed = TASKS["sib200"], {}
    for language in at_hand("sib200", task, "test", str(real_data / "sib200")):
        changed[language] = 0
        for split in ("train", "dev", "test"):
            file = real_data / "sib200" / "data" / "annotated" / language / f"{split}.tsv"
            texts = pandas.read_csv(file, sep="\t")["text"]
            rows = read_examples("sib200", task, split, language, str(real_data / "sib200"))
            assert [x.query for x in rows] == texts.tolist()
            raw = set(file.read_text("utf-8").split("\n"))
            changed[language] += sum(not any(line.endswith(f"\t{text}") for line in raw)
                                     for text in texts if '"' in text)
    assert changed["arb_Arab"] == 108 and changed["hin_Deva"] == 0 and changed["zho_Hans"] == 1


@pytest.mark.parametrize("name, text", [
    ("train-en.jsonl", '{"text": "a b", "label": "good"}\n\n\n'),
    ("train-en.csv", "text,label\na b,good\n\n"), ("train-en.tsv", "text\tlabel\na b\tgood\n \n"),
    ("train-en.csv", "text,label\ra b,good\r"), ("train-en.tsv", "text\tlabel\ra b\tgood"),
    ("train-en.CSV", "text,label\na b,good\n"),
    ("train-en.jsonl.gz", '{"text": "a b", "label": "good"}'),
])
def test_files_as_other_programs_leave_them(name, text, tmp_path):
    """Blank last lines, lone carriage returns, another case, gzip."""
    data = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert texts(read(tmp_path)) == ["a b"]


def test_a_blank_line_between_rows_is_named(tmp_path):
    (tmp_path / "train-en.jsonl").write_text('{"text": "a", "label": "good"}\n\n'
                                             '{"text": "b", "label": "good"}\n')
    with pytest.raises(InputError, match=r"train-en\.jsonl:2: not JSON"):
        read(tmp_path)


def test_quotes_that_pandas_wrote_into_a_tsv_are_said(tmp_path, caplog):
    (tmp_path / "train-en.tsv").write_text('text\tlabel\n"he said ""a"""\tgood\n')
    assert texts(read(tmp_path)) == ['"he said ""a"""']
    assert "1 lines have quoted fields" in caplog.text


def test_classes_of_a_parquet_file_have_the_names_that_it_gives_them(tmp_path):
    """`datasets` numbers them in its own order and writes the names beside them."""
    import datasets

    rows = {"text": ["a", "b", "c"], "label": [0, 1, 0]}
    features = datasets.Features(text=datasets.Value("string"),
                                 label=datasets.ClassLabel(names=["Bad", "good"]))
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train-en.parquet")
    assert [x.target for x in read(tmp_path)] == ["bad", "good", "bad"]
    names = datasets.Features(features | {"label": datasets.ClassLabel(names=["no", "yes"])})
    datasets.Dataset.from_dict(rows, features=names).to_parquet(tmp_path / "train-en.parquet")
    with pytest.raises(InputError, match="label 'no' is not one of good, bad"):
        read(tmp_path)


def test_a_parquet_file_that_unpacks_without_end_is_left(tmp_path, monkeypatch):
    """824 bytes took 8 GB."""
    monkeypatch.setattr(readers, "UNPACKED_BYTES", 1 << 24)
    table = pa.table({"text": ["a" * 100_000] * 4000, "label": ["good"] * 4000})
    parquet.write_table(table, tmp_path / "train-en.parquet", compression="zstd")
    assert (tmp_path / "train-en.parquet").stat().st_size < 10_000
    with pytest.raises(InputError, match=r"to more than 1,000 times its .* stopped at row 168"):
        read(tmp_path)


def test_json_that_is_nested_too_deep_is_one_line(tmp_path):
    (tmp_path / "train-en.jsonl").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"train-en\.jsonl:1: not JSON"):
        read(tmp_path)
