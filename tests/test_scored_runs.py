"""What is done with a trained run: scored, compared, reported, given a user's own file."""

import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import XNLI, get_config, leave_unscored, run_script

from jaxfusion import config as configs
from jaxfusion.bridge.compare import check_unseen, compare, gather, report
from jaxfusion.bridge.job import read_data, train
from jaxfusion.config import from_config_dict, one_by_seeds, run_folders
from jaxfusion.data.contamination import check_seen, fingerprints, read_seen, write_seen
from jaxfusion.data.rows.files import read_file
from jaxfusion.errors import InputError
from jaxfusion.fields import TaskConfig
from jaxfusion.files import note_of, only_writer, write_checked
from jaxfusion.miniatures.inputs import make_inputs
from jaxfusion.reports.comparison import table
from jaxfusion.reports.markdown_page import inline
from jaxfusion.reports.scored_runs import (
    ALONE,
    ScoredRun,
    _of_translations,
    compare_runs,
    read_models,
)
from jaxfusion.runs import answer_file as answering
from jaxfusion.runs.answer_file import answer_file
from jaxfusion.runs.open_run import open_run
from jaxfusion.runs.score import evaluate, seen_by

ROWS = [{"premise": f"{'la ' * (i % 7 + 1)}ru", "hypothesis": f"so {i}", "id": i}
        for i in range(30)]


@pytest.fixture(scope="module")
def run(cache_dir, tmp_path_factory):
    """A comparison of one bridge over two seeds, six rows of each language."""
    config = get_config(XNLI, "debug").unlock()
    config.train.steps = config.train.eval_every = config.train.checkpoint_every = 4
    config.data.dev_rows, config.seeds, config.eval.max_new_tokens = 8, (0, 1), 4
    config = one_by_seeds(make_inputs(from_config_dict(config)))
    workdir = tmp_path_factory.mktemp("seeds") / "run"
    with pytest.MonkeyPatch.context() as patch:
        leave_unscored(patch)
        comparison = compare(replace(config, rows=6), workdir)
    return config, workdir, comparison


@pytest.fixture
def bridge(run):
    """The first seed's workdir."""
    return run[1] / run_folders(run[0])["transformer_softmax"][0]


def test_exact_match_of_translations_is_said_to_say_little():
    def lines(task, **own):
        return _of_translations(task, {"a": [ScoredRun("x", {}, config={"tasks": {task: own}})]})

    assert "by log-likelihood" in lines("pairs", answers="train.txt")[0]
    assert "by log-likelihood" in lines("pocket_translation")[0]
    assert lines("pairs") == lines("xnli") == ()


def test_seeds_are_trained_side_by_side(run):
    config, workdir, comparison = run
    assert comparison.seeds("transformer_softmax") == 2
    assert comparison.seeds("LLM alone") == 1
    assert "transformer_softmax: 2" in (workdir / "report.md").read_text()
    seeds = [json.loads((workdir / place / "config.json").read_text())["train"]["seed"]
             for place in run_folders(config)["transformer_softmax"]]
    assert seeds == [0, 1]
    with pytest.raises(InputError, match="contains duplicates"):
        compare(replace(config, seeds=(1, 1)), workdir.parent / "other")
    with pytest.raises(InputError, match=r"give one of its bridges: .*seed_0, .*seed_1"):
        open_run(workdir)


def test_details_hold_every_row(bridge):
    details = json.loads((bridge / "eval" / "details.json").read_text())["xnli"]["en"]
    results = json.loads((bridge / "eval" / "results.json").read_text())["xnli"]["en"]
    for scoring, right in details["correct"].items():
        assert np.mean(right) == results[scoring]["accuracy"]
    found = [details["labels"][i] for i in np.argmax(details["likelihoods"], axis=1)]
    assert [x == y for x, y in zip(found, details["targets"], strict=True)] == [
        bool(x) for x in details["correct"]["likelihood"]]
    shares = np.array(details["tokens"]["weights"])
    assert shares.shape[0] == len(details["tokens"]["tokens"])
    assert np.allclose(shares.sum(axis=1), 1, atol=1e-3)


def test_runs_are_compared_on_the_same_rows_or_refused(run, bridge, tmp_path):
    other = str(run[1] / run_folders(run[0])["transformer_softmax"][1])
    c, = compare_runs(read_models([str(bridge), other]))
    assert list(c.correct) == ["seed_0", "seed_1"] and c.reference == "seed_0"
    both, = compare_runs(read_models([f"{bridge},{other}"]), "exact_match")
    assert both.seeds("transformer_softmax") == 2 and both.scoring == "exact_match"
    copy = tmp_path / "copy"
    shutil.copytree(bridge / "eval", copy / "eval")
    details = json.loads((copy / "eval" / "details.json").read_text())
    details["xnli"]["ar"]["queries"][3] += " indeed"
    write_checked(copy / "eval" / "details.json", json.dumps(details))
    with pytest.raises(InputError, match=r"xnli ar: row 4 differs between .*seed_0 and .*copy"):
        compare_runs(read_models([str(bridge), str(copy)]))
    for part in details["xnli"]["en"].values():
        if isinstance(part, list):
            del part[4:]
    write_checked(copy / "eval" / "details.json", json.dumps(details))
    with pytest.raises(InputError, match=r"xnli en: .* was scored on 6 rows, .*copy on 4"):
        compare_runs(read_models([str(bridge), str(copy)]))
    write_checked(copy / "eval" / "details.json", json.dumps({"sib200": {}}))
    with pytest.raises(InputError, match="no scored task and language in common"):
        compare_runs(read_models([str(bridge), str(copy)]))
    with pytest.raises(InputError, match=r"no scores yet .*: python eval\.py --workdir"):
        read_models([str(bridge), str(tmp_path / "none")])
    with pytest.raises(InputError, match="duplicate run"):
        read_models([str(bridge), f"{bridge}/"])
    with pytest.raises(InputError, match="duplicate run"):
        read_models([f"{bridge},{bridge}", other])
    with pytest.raises(InputError, match="unknown scoring 'f1'"):
        compare_runs(read_models([str(bridge), other]), "f1")


def test_compare_and_report_show_one_table(run):
    config, workdir, made = run
    _, (whole,) = gather([str(workdir)])
    assert table(whole) == table(made) and whole.notes == made.notes
    places = [workdir / x for x in run_folders(config)["transformer_softmax"]]
    asked = [str(places[-1] / "eval" / ALONE), ",".join(map(str, places))]
    models, (again,) = gather(asked)
    assert list(models) == ["LLM alone", "transformer_softmax"]
    assert table(again) == table(replace(made, reference="LLM alone"))
    with pytest.raises(InputError, match="is a comparison: give it alone, or runs of it"):
        gather([str(workdir), asked[0]])


def test_a_row_that_was_trained_on_is_named(bridge, tmp_path, caplog):
    copy = tmp_path / "copy"
    shutil.copytree(bridge, copy)
    config = open_run(copy).config
    test_row = list(read_file(Path(config.data.path) / "test-en.jsonl"))[2][0]
    query = f"Premise: {test_row['premise']}  Hypothesis: {test_row['hypothesis'].upper()} Label: "
    write_seen(copy, np.concatenate([read_seen(bridge), fingerprints([query])]))
    with pytest.raises(InputError, match=r"training rows: of \d+ texts 1 are gone, and 0 are"):
        train(config, copy)
    with pytest.raises(InputError, match=r"test row 3 of 'xnli' in 'en' was trained on: 'Premise"):
        evaluate(copy, limit=6)
    _, details = evaluate(copy, limit=6, drop_seen=True)
    before = json.loads((bridge / "eval" / "details.json").read_text())["xnli"]
    for language in ("en", "ar"):  # the row's translation goes with it
        assert details["xnli"][language]["queries"] == [
            x for i, x in enumerate(before[language]["queries"]) if i != 2]
    # A comparison looks before it trains.
    rows = tmp_path / "rows"
    shutil.copytree(config.data.path, rows)
    with (rows / "train-en.jsonl").open("a") as file:
        file.write(json.dumps(test_row) + "\n")
    with pytest.raises(InputError, match="test row 3 of 'xnli' in 'en' was trained on"):
        again = replace(config, data=replace(config.data, path=str(rows)))
        check_unseen(again, 6, read_data(again)[2])
    # What an earlier stage was trained on counts, too.
    second = replace(config, train=replace(config.train, init_from=str(copy)))
    assert np.isin(fingerprints([query]), seen_by(second, tmp_path / "second")).all()
    (copy / "seen.npy").write_bytes(b"")  # training writes it again
    check_seen(copy, fingerprints([query]))
    assert "are not compared with those that the run began with" in caplog.text


def test_a_file_is_answered_and_a_stopped_run_goes_on(bridge, tmp_path, monkeypatch):
    monkeypatch.setattr(answering, "BATCHES", 1)
    source, out, again = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "again.jsonl"))
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    drawn = {"temperature": 0.9, "max_new_tokens": 3}
    assert answer_file(bridge, source, out, decoding=drawn) == 30
    lines = [json.loads(line) for line in out.read_text().split("\n")[:-1]]
    assert [{k: line[k] for k in ROWS[0]} for line in lines] == ROWS
    for line in lines:
        chances = line["probabilities"]
        assert sum(chances.values()) == pytest.approx(1, abs=1e-3)
        assert line["prediction"] == max(chances, key=chances.get)
    # Stopped in the middle of a line.
    written = out.read_bytes()
    again.write_bytes(written[: written.find(b"\n", len(written) // 2) + 9])
    shutil.copy(f"{out}.about.json", f"{again}.about.json")
    left = answer_file(bridge, source, again, decoding=drawn)
    assert 0 < left < 30 and again.read_bytes() == written
    assert answer_file(bridge, source, again, decoding=drawn) == 0
    with pytest.raises(InputError, match=r"was started with temperature 0\.9, not 0\.5"):
        answer_file(bridge, source, again, decoding={**drawn, "temperature": 0.5})
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS[::-1]))
    with pytest.raises(InputError, match=r"jsonl:1 answers a different row than .*in\.jsonl:1"):
        answer_file(bridge, source, again, decoding=drawn)


def test_answers_are_written_by_one_and_never_over_the_input(bridge, tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    odd = {**ROWS[0], "note": float("nan"), "separator": "a\u2028b"}
    source.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in (odd, odd)))
    assert answer_file(bridge, source, out) == 2
    lines = [json.loads(line) for line in out.read_text().split("\n")[:-1]]
    assert [line["note"] for line in lines] == [None, None]
    assert answer_file(bridge, source, out) == 0
    with only_writer(note_of(out), out), pytest.raises(
            InputError, match=rf"out\.jsonl is being written by process {os.getpid()} on .* since"):
        answer_file(bridge, source, out)
    with pytest.raises(InputError, match="is the input"):
        answer_file(bridge, source, source)
    with pytest.raises(InputError, match=r"expected the name of a \.jsonl file"):
        answer_file(bridge, source, tmp_path)


def test_what_differs_between_runs_is_said_or_left_out(bridge, tmp_path, caplog):
    copy = tmp_path / "copy"
    shutil.copytree(bridge, copy)
    evaluate(copy, limit=6, decoding={"temperature": 0.5})
    (copy / "metrics.jsonl").open("a").write('{"step": 5, "lo')
    c, = compare_runs(read_models([str(bridge), str(copy)]))
    assert len(c.notes) == 1 and c.notes[0].startswith("Different decoding: ")
    assert '"temperature": 0.5' in c.notes[0]
    # The bare LLM on other rows is left out of the report, and an old file of details is refused.
    config = configs.load(copy / "config.json")
    configs.save(replace(config, data=replace(config.data, text_prompt="so:")),
                 copy / "config.json")
    evaluate(copy, limit=5, llm_only=True)
    assert re.search("glued to its prompt: 'so:(Entailment|Neutral|Contradiction)'", caplog.text)
    assert "LLM alone" not in report([copy]).read_text()
    details = json.loads((copy / "eval" / "details.json").read_text())
    del details["xnli"]["ar"]["labels"]
    write_checked(copy / "eval" / "details.json", json.dumps(details))
    with pytest.raises(InputError, match="which did not store labels; score it again"):
        compare_runs(read_models([str(bridge), str(copy)]))


def test_text_in_a_table_stays_text():
    assert inline("a|b [x](y) `c` <d> & \\ \n *e*") == (
        r"a\|b \[x\](y) \`c\` &lt;d> &amp; \\ \*e\*")


@pytest.mark.parametrize(("row", "said"), [
    ({"premise": "x"}, r"in\.jsonl:2: column 'hypothesis' is missing; expected premise"),
    ({"premise": " ", "hypothesis": "x"}, r"in\.jsonl:2: column 'premise' is empty"),
    ({"premise": "x", "hypothesis": "x", "answer": "y"}, "column 'answer' is an output column"),
])
def test_a_row_that_cannot_be_answered_is_named(bridge, tmp_path, row, said):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(x) + "\n" for x in (ROWS[0], row)))
    with pytest.raises(InputError, match=said):
        answer_file(bridge, source, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_decoding_that_chooses_nothing_is_refused(bridge):
    for fields, said in (({"top_p": 0.0}, "top_p"), ({"temperature": -1.0}, "temperature"),
                         ({"stop": ("",)}, "stop")):
        with pytest.raises(InputError, match=f"eval.{said}"):
            open_run(bridge, fields)


def test_a_page_holds_what_a_reader_asks_for(run, bridge):
    page = report([bridge])
    assert page == bridge / "eval" / "report.html" and "McNemar" not in page.read_text()
    evaluate(bridge, limit=6, llm_only=True)
    text, markdown = report([bridge]).read_text(), page.with_suffix(".md").read_text()
    for part in ("McNemar", "LLM alone", "Weight of each layer", "Layer weights of each token",
                 "Training", "Settings", "&#34;learning_rate&#34;", "python 3."):
        assert part in text
    assert not re.findall(r'(?:src|href|srcset)="(?!data:)', text)  # nothing else is needed
    assert "`" not in text and text.count("prefers-color-scheme: dark)") == text.count("<img ") + 1
    assert '<p class="summary">transformer_softmax was scored on' not in text
    assert '<p class="summary">seed_0 was compared with LLM alone on xnli' in text
    pictures = re.findall(r"\]\((.*?)\)", markdown)
    assert pictures and all((page.parent / name).is_file() for name in pictures)
    whole = report([run[1]])
    assert whole == run[1] / "report.html" and "transformer_softmax: 2" in whole.read_text()


def test_a_page_shows_each_script_its_own_way(bridge, tmp_path):
    """In a browser: right-to-left text runs right to left, markup in a row is only text."""
    copy = tmp_path / "run"
    shutil.copytree(bridge, copy)
    file = copy / "eval" / "details.json"
    details = json.loads(file.read_text())
    arabic = details["xnli"]["ar"]
    arabic["queries"][0] = "Premise: <b>هذا نص عربي للاختبار</b>"
    arabic["correct"]["likelihood"][0] ^= 1
    write_checked(file, json.dumps(details))
    alone = copy / "eval" / "llm_only_details.json"
    write_checked(alone, json.dumps({**details, "xnli": {**details["xnli"], "ar": {
        **arabic, "correct": {**arabic["correct"], "likelihood": [
            1 - x for x in arabic["correct"]["likelihood"]]}}}}))
    page = report([copy])
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        assert "&lt;b&gt;" in page.read_text() and 'dir="rtl"' in page.read_text()
        pytest.skip("no Chromium is installed: the page was not opened")
    code = ("<script>onload = () => { const cells = [...document.querySelectorAll('td.text')];"
            "const cell = cells.find(x => x.textContent.includes('عربي'));"
            "document.title = getComputedStyle(cell).direction + ' ' + cell.children.length + ' ' +"
            "[...document.images].every(x => x.naturalWidth > 0) + ' ' +"
            "(document.documentElement.scrollWidth <= innerWidth) }</script>")
    shown = tmp_path / "shown.html"
    shown.write_text(page.read_text().replace("</body>", f"{code}</body>"))
    said = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
         "--window-size=400,900", f"--user-data-dir={tmp_path / 'profile'}", shown.as_uri()],
        capture_output=True, text=True, timeout=120, env={**os.environ, "HOME": str(tmp_path)})
    assert "<title>rtl 0 true true</title>" in said.stdout


@pytest.mark.parametrize(("flags", "said"), [
    (["--compare", "a"], "takes two runs or more"),
    (["--workdir", "a", "--compare", "b", "c"], "wanted --workdir DIR, or --compare"),
    ([], "wanted --workdir DIR, or --compare"),
    (["--workdir", "a", "--input", "x"], "go together"),
    (["--workdir", "a,b", "--ask", "x"], "--ask takes one --workdir"),
    (["--workdir", "a", "b"], "'b' is not a flag"),
    (["--workdir", "a", "--report", "--limit", "3"], "--limit is for scoring"),
    (["--workdir", "a", "--report", "--ask", "x"], "--ask and --report are one at a time"),
])
def test_flags_that_do_not_go_together(flags, said):
    found = run_script("eval.py", *flags)
    assert found.startswith("error: ") and said in found


def test_answers_longer_than_what_the_llm_reads_are_refused(bridge):
    with pytest.raises(InputError, match=r"max_new_tokens is 999,999,999, but the LLM reads at"):
        evaluate(bridge, limit=2, decoding={"max_new_tokens": 999_999_999})


def test_answers_that_are_cut_before_their_end_are_counted_and_said(bridge, tmp_path, caplog):
    copy = shutil.copytree(bridge, tmp_path / "copy")
    for language, rows in (("en", 2), ("sw", 1)):
        (tmp_path / f"test-{language}.jsonl").write_text(
            "".join(f'{{"query": "la ru {i}", "target": "7"}}\n' for i in range(rows)))
    found, _ = evaluate(copy, tasks=("mgsm",), languages=("en", "sw"), data_path=str(tmp_path),
                        decoding={"max_new_tokens": 1})
    assert [x["exact_match"].get("unfinished") for x in found["mgsm"].values()] == [2, 1]
    assert "mgsm en: 2 of 2 answers were truncated at 1 new tokens" in caplog.text


def test_a_task_without_test_rows_is_said_before_it_is_trained_on(bridge, caplog):
    config = open_run(bridge).config
    own = TaskConfig(prompt="{premise}", labels=("a", "b"), languages=("en",),
                     source="hub:a/b", splits={"train": "train"})
    config = replace(config, tasks={"mine": own},
                     data=replace(config.data, task="mine", path=None, dev_rows=None))
    with pytest.raises(InputError):  # the hub is offline in tests
        read_data(config)
    assert "task 'mine' has no test split: eval.py can score the run only with" in caplog.text
