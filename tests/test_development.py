"""Development during training: in several languages, the best checkpoint, patience, its curves."""

import json
import logging
from dataclasses import replace
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
from helpers import equal, interrupt_at, make_config, make_run, records

from jaxfusion.bridge import development, job
from jaxfusion.bridge.compare import report
from jaxfusion.bridge.development import deciding, make_score, read_development
from jaxfusion.bridge.job import train
from jaxfusion.config import changed, check, load, save
from jaxfusion.data.tasks.catalogue import TASKS
from jaxfusion.errors import InputError, Stopped
from jaxfusion.reports.pictures import draw_development
from jaxfusion.runs.export.bridge import export
from jaxfusion.runs.score import evaluate
from jaxfusion.training.checkpoint import Best, Checkpoints, Notes, best_of, trained_part
from jaxfusion.training.hooks import Save, Signals, _in_a_line
from jaxfusion.training.state import State
from jaxfusion.training.trainer import Trainer, by_another
from jaxfusion.training.workdir import check_workdir

NLI = TASKS["xnli"]
# By step, of two languages: their mean is best at step 4.
SCORES = {2: (0.2, 0.4), 4: (0.3, 0.7), 6: (0.6, 0.2), 8: (0.4, 0.4), 10: (0.1, 0.3),
          12: (0.9, 0.9)}


@pytest.fixture
def scored(monkeypatch):
    """Scores of a run as `SCORES` has them, whatever was learned."""
    now, save = [0], Save._save

    def note(self, step, score):
        now[0] = step
        save(self, step, score)

    def scores(_):
        one, other = SCORES[now[0]]
        return {"likelihood": (one + other) / 2, "en/likelihood": one, "sw/likelihood": other}

    monkeypatch.setattr(Save, "_save", note)
    monkeypatch.setattr(job, "make_score", lambda *_: scores)


@pytest.fixture(scope="module")
def config(cache_dir):
    """A run of twelve steps that is scored at each second one, and waits for two scores."""
    return make_config(cache_dir, train__eval_every=2, train__checkpoint_every=3,
                       data__dev_patience=2)


def where(run):
    """Scored steps, the newest and the best checkpoint, and what the newest knows of the best."""
    steps = [x["step"] for x in records(run) if "dev/likelihood" in x]
    newest = Checkpoints(run).steps[-1]
    noted = json.loads((run / "checkpoints" / str(newest) / "data" / "metadata").read_text())
    assert noted["best"].pop("name").endswith("likelihood")
    return steps, newest, trained_part(run)[0], noted["best"]


def card_of(run):
    """The model card of a run's export."""
    out = run.with_name(f"{run.name}-out")
    export(run, out, overwrite=True)
    return " ".join((out / "README.md").read_text("utf-8").split())


def test_patience_ends_a_run_which_stays_ended(config, scored, tmp_path, caplog, capsys):
    state = train(config, tmp_path)
    assert where(tmp_path) == ([2, 4, 6, 8], 8, 4, {"step": 4, "score": 0.5, "since": 2})
    assert "step 4, which has the run's best `likelihood` on development rows (0.500)." in (
        card_of(tmp_path))
    assert "no better in 2 scores than 0.500 at step 4" in capsys.readouterr().err
    with caplog.at_level(logging.INFO):
        assert equal(state, train(config, tmp_path))
    assert "finished:" in caplog.text and where(tmp_path)[0] == [2, 4, 6, 8]
    # With more patience it goes on, to its end and a better score.
    more = replace(config, data=replace(config.data, dev_patience=4))
    train(more, tmp_path)
    assert where(tmp_path) == ([2, 4, 6, 8, 10, 12], 12, 12, {
        "step": 12, "score": 0.9, "since": 0})
    assert "step 12, which has the run's best `likelihood` on development rows (0.900)." in (
        card_of(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("step", [6, 8])
def test_a_run_that_was_killed_ends_where_it_would(config, scored, step, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_at(patch, step)
        train(config, tmp_path)
    train(config, tmp_path)
    assert where(tmp_path) == ([2, 4, 6, 8], 8, 4, {"step": 4, "score": 0.5, "since": 2})


@pytest.mark.parametrize("step", [
    pytest.param(3, marks=pytest.mark.slow), 4, pytest.param(6, marks=pytest.mark.slow)])
def test_a_run_that_was_stopped_scores_what_it_owes(config, scored, step, tmp_path, monkeypatch):
    """SIGTERM comes at a step that is scored, or not: the scores, the best and the end are those
    of an undisturbed run."""
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Signals, "should_stop", lambda self, at: at == step)
        train(config, tmp_path)
    assert Checkpoints(tmp_path).steps[-1] == step
    train(config, tmp_path)
    assert where(tmp_path) == ([2, 4, 6, 8], 8, 4, {"step": 4, "score": 0.5, "since": 2})


@pytest.mark.slow
def test_a_language_decides(config, scored, tmp_path, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        patch.setattr(job, "deciding", lambda *_: "en/likelihood")
        train(config, tmp_path)
    assert where(tmp_path) == ([2, 4, 6, 8, 10], 10, 6, {"step": 6, "score": 0.6, "since": 2})
    train(config, tmp_path)  # it has ended
    assert "0.600 at step 6, is of en/likelihood; runs of today choose by likelihood" in caplog.text
    train(replace(config, data=replace(config.data, dev_patience=4)), tmp_path)
    assert "is of en/likelihood; scores from here on are compared with it all the same" in (
        caplog.text)


@pytest.mark.parametrize("name, now, other", [
    (None, "likelihood", True), (None, "sw/likelihood", True), ("likelihood", "likelihood", False),
    ("exact_match", "likelihood", True), ("en/likelihood", "likelihood", True),
    (None, "exact_match", False), (None, "log_likelihood", False), (None, "accuracy", False)])
def test_a_best_score_of_an_earlier_version_is_told_where_it_may_differ(name, now, other):
    """Free text, translations and towers have been scored in one way by every version."""
    assert by_another(Best(3, 0.5, name=name), now) == other


def test_a_score_of_a_version_that_kept_no_best_is_told(tmp_path, caplog):
    trainer = object.__new__(Trainer)
    trainer.run = SimpleNamespace(score=print, best="likelihood", steps=12, patience=None)
    trainer.state = State(jnp.array(0), {}, ())
    for score, best in ((float("nan"), None), (0.5, Best(4, 0.5))):
        trainer.restore(SimpleNamespace(
            path=tmp_path / "checkpoints", restore_newest=lambda _, score=score: (
                State(jnp.array(4), {}, ()), Notes({}, score, None))))
        assert trainer.best == best
    assert "0.500 at step 4, is of an earlier version, which may have chosen by another" in (
        caplog.text)


def test_the_best_of_scores():
    best = best_of(None, 2, float("nan"))
    assert best is None
    for step, score in ((4, 0.5), (6, 0.5), (8, float("nan")), (10, 0.4)):
        best = best_of(best, step, score)
    assert best == Best(4, 0.5, 3) and best_of(best, 12, 0.6) == Best(12, 0.6)


def test_a_score_that_is_not_a_number_is_never_the_best(tmp_path):
    """As the newest one it was taken for the best, and the best checkpoint was removed."""
    checkpoints, best = Checkpoints(tmp_path), None
    for step, score in ((2, 0.5), *((step, float("nan")) for step in (4, 6, 8))):
        best = best_of(best, step, score, "log_likelihood")
        checkpoints.save(State(jnp.array(step), {"a": jnp.zeros(2)}, ()), {"next_index": step},
                         score, best)
    checkpoints.close()
    assert checkpoints.steps == [2, 6, 8] and trained_part(tmp_path)[0] == 2


def test_which_score_decides(config):
    def decides(task=NLI, max_new_tokens=None, **fields):
        return deciding(replace(
            config, data=replace(config.data, **fields),
            eval=replace(config.eval, max_new_tokens=max_new_tokens)), task)

    two = {"dev_languages": ("en", "sw")}
    assert decides() == decides(**two) == decides(dev_decides="en") == NLI.scoring == "likelihood"
    assert decides(replace(NLI, labels=())) == "exact_match"
    assert decides(dev_decides="sw", **two) == "sw/likelihood"
    assert decides(replace(NLI, unlabelled=True), dev_decides="sw", **two) == "sw/log_likelihood"
    assert decides(dev_decides="sw", language="all") == "sw/likelihood"
    assert decides(max_new_tokens=0) == "likelihood"
    assert _in_a_line({"exact_match": 0.5, "likelihood": 0.6, "sw/exact_match": 0.4,
                       "sw/likelihood": 0.3}, "exact_match") == (
        "exact_match 0.500  likelihood 0.600  (exact_match: sw 0.400)  (exact_match decides)")
    assert _in_a_line({"exact_match": 0.5, "likelihood": 0.6}, "likelihood") == (
        "exact_match 0.500  likelihood 0.600  (likelihood decides)")
    assert _in_a_line({"exact_match": 0.5}, "exact_match") == "exact_match 0.500"


def test_means_over_languages(config, monkeypatch):
    monkeypatch.setattr(development, "_correctness", lambda model, rows, task, language, mesh: (
        lambda _: {"exact_match": {"en": 1.0, "sw": 0.5}[language]}))
    assert make_score(None, {"sw": []}, NLI, None)({}) == {"exact_match": 0.5}
    assert make_score(None, {"en": [], "sw": []}, NLI, None)({}) == {
        "exact_match": 0.75, "en/exact_match": 1.0, "sw/exact_match": 0.5}


@pytest.mark.parametrize("fields,said", [
    ({"dev_languages": ("ar", "en", "ar")}, "names a language twice"),
    ({"dev_decides": "sw"}, "'sw', expected mean, or a language of development: en"),
    ({"dev_languages": ("ar", "sw"), "dev_decides": "en"}, "development: ar, sw")])
def test_what_cannot_decide_is_refused(config, fields, said):
    with pytest.raises(InputError, match=said):
        check(replace(config, data=replace(config.data, **fields)))


def test_of_all_languages_the_task_s_may_decide(config):
    data = replace(config.data, language="all", dev_decides="sw")
    check(replace(config, data=data))
    with pytest.raises(InputError, match="'xx', expected mean, or a language of development: en"):
        read_development(replace(config, data=replace(data, dev_decides="xx")), NLI)


def test_patience_may_change_and_languages_may_not(config):
    new = replace(config, data=replace(config.data, dev_patience=None, dev_languages=("en",)))
    assert [x.partition(":")[0] for x in changed(config, new)] == ["data.dev_languages"]


def test_what_a_run_was_started_with_stays_when_it_goes_on(tiny, tmp_path):
    make_run(tmp_path / "run", tiny)
    left_open = load(tmp_path / "run" / "config.json")
    began = replace(left_open, eval=replace(left_open.eval, max_new_tokens=0))
    save(began, tmp_path / "run" / "config.json")
    assert check_workdir(left_open, tmp_path / "run") == began


def test_rows_of_languages_or_a_line_on_those_that_there_are(config):
    first, second = NLI.languages[:2]  # of which `made:rows` has rows
    data = replace(config.data, dev_languages=(second, first), dev_rows=3)
    rows = read_development(replace(config, data=data), NLI)
    assert {x: len(part) for x, part in rows.items()} == {second: 3, first: 3}
    wrong = replace(config, data=replace(data, dev_languages=(first, "sw", "th")))
    with pytest.raises(InputError, match=f"has sw, th, but .*'xnli' are in {first}, {second}$"):
        read_development(wrong, NLI)
    with pytest.raises(InputError, match="has no language 'xx'"):
        read_development(replace(config, data=replace(data, dev_languages=("xx",))), NLI)


def test_the_picture_has_a_line_for_each_language(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda self, x, y, **more: drawn.append(
        (x, y, more["label"], tuple(more["color"]))))
    monkeypatch.setattr("matplotlib.axes.Axes.legend", lambda *_, **__: SimpleNamespace())
    seed = [{"step": step, "dev/exact_match": 0.0, **{
        f"dev/{x}/exact_match": y for x, y in zip(("en", "sw"), SCORES[step], strict=True)}}
        for step in (2, 4)]
    alone = [{"step": 2, "dev/exact_match": 1.0, "loss": 1.0}]
    assert not draw_development({"a": [alone, alone]}, tmp_path / "x.png")
    assert not draw_development({"a": [seed[:1]]}, tmp_path / "x.png")
    assert draw_development({"a": [seed, seed], "b": [alone]}, tmp_path / "x.png")
    light, dark = drawn[:4], drawn[4:]
    assert [x[:3] for x in light] == [((2, 4), (0.2, 0.3), "en"), ((2, 4), (0.2, 0.3), None),
                                      ((2, 4), (0.4, 0.7), "sw"), ((2, 4), (0.4, 0.7), None)]
    assert light == dark
    assert len({x[3] for x in drawn}) == 2


@pytest.mark.slow
def test_languages_are_scored_in_training_and_drawn_in_the_report(cache_dir, tmp_path):
    config = make_config(cache_dir, train__steps=4, train__eval_every=2, data__dev_rows=8,
                         data__dev_languages=("en", "ar"), data__dev_decides="ar")
    train(config, tmp_path)
    for record in (x for x in records(tmp_path) if "dev/likelihood" in x):
        for name in ("exact_match", "likelihood"):
            both = [record[f"dev/{language}/{name}"] for language in ("en", "ar")]
            assert record[f"dev/{name}"] == pytest.approx(sum(both) / 2)
    tags = b"".join(x.read_bytes() for x in (tmp_path / "tensorboard").iterdir())
    assert b"dev/ar/likelihood" in tags
    evaluate(tmp_path, languages=("en",), limit=4)
    page = report([tmp_path])
    assert "development score of each language" in page.read_text()
    assert "development.png" in page.with_suffix(".md").read_text()
