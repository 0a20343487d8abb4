"""Comparisons: their figures against rows counted by hand, and a run from start to report."""

import json
import shutil
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import COMPARISONS, FILES, get_config, leave_unscored

from configs.common import finish
from jaxfusion import config as configs
from jaxfusion.bridge import warm_start
from jaxfusion.bridge.compare import compare, gather, report
from jaxfusion.config import default_config, from_config_dict, variants
from jaxfusion.data.tasks.catalogue import TASKS
from jaxfusion.data.tasks.spec import Task
from jaxfusion.errors import InputError
from jaxfusion.fields import CompareConfig
from jaxfusion.files import write_checked
from jaxfusion.miniatures.inputs import make_inputs
from jaxfusion.reports.colours import colours_of
from jaxfusion.reports.comparison import Comparison, as_json, differences, markdown, table
from jaxfusion.reports.language_groups import standard_groups
from jaxfusion.reports.pictures import smooth
from jaxfusion.reports.scored_runs import compare_runs, read_models
from jaxfusion.reports.statistics import bootstrap_mean, holm
from jaxfusion.reports.summary import summary
from jaxfusion.runs import score
from jaxfusion.runs.ask import ask, fill, unknown_words
from jaxfusion.runs.score import evaluate
from jaxfusion.training.checkpoint import Best, Checkpoints, chosen_by
from jaxfusion.training.state import State
from jaxfusion.training.workdir import check_workdir

QUICKSTART, = COMPARISONS


def example():
    correct = {
        "LLM alone": {"en": [1, 1, 1, 0], "aa": [0, 0, 1, 0], "bb": [0, 1, 0, 0]},
        "last": {"en": [1, 1, 0, 0], "aa": [1, 0, 1, 0], "bb": [0, 1, 0, 1]},
        "all": {"en": [1, 1, 0, 1], "aa": [1, 1, 1, 0], "bb": [0, 1, 1, 1]},
    }
    return Comparison("xnli", "likelihood", correct, {"rich": ("aa",), "poor": ("bb",)}, "last",
                      {"guessing": 0.25}, {"all": {"aa": [0.5, 0.5], "bb": [0.1, 0.9]}}, ("Note.",))


def test_figures_of_a_comparison_are_those_of_its_rows():
    c = example()
    assert c.languages == ("en", "aa", "bb")
    assert c.cell("all", "aa")[0] == 0.75
    assert c.mean("all", "all groups")[0] == pytest.approx(6 / 8)
    difference, (low, high) = c.mean("all", "all groups", minus="last")
    assert difference == pytest.approx(2 / 8) and low <= difference <= high
    assert c.mean("last", "poor", minus="last") == (0.0, (0.0, 0.0))
    header, *rows = table(c)
    assert header == ["", "", "LLM alone", "last", "all"]
    assert [row[0] for row in rows] == [
        "en", "aa", "bb", "mean of rich", "mean of poor", "mean of all groups", "minus last"]
    assert rows[1][3].startswith("50.0 [") and rows[-1][4].startswith("+25.0 [")
    page = markdown(c)
    assert "| aa | rich |" in page and "guessing 25.0" in page and "Note." in page
    assert json.loads(json.dumps(as_json(c)))["differences"]["all"]["all groups"]["accuracy"] == (
        pytest.approx(0.25))


def test_rows_of_one_sentence_in_many_languages_are_one_observation():
    rng = np.random.default_rng(0)
    rows = rng.random((1, 400)) < 0.6
    _, alone = bootstrap_mean(rows)
    _, copied = bootstrap_mean(np.repeat(rows, 8, axis=0))
    assert copied == alone
    # Against the normal approximation of a mean.
    half = 1.96 * rows.std() / 20
    assert (alone[1] - alone[0]) / 2 == pytest.approx(half, rel=0.1)


def test_seeds_are_averaged_and_their_spread_is_told():
    one, two = example(), example()
    seeds = {"en": [[1, 1, 0, 0], [1, 1, 1, 0]], "aa": [[1, 0, 1, 0], [0, 0, 1, 0]],
             "bb": [[0, 1, 0, 1], [0, 1, 0, 1]]}
    two = replace(two, correct={**two.correct, "all": seeds})
    assert two.seeds("all") == 2 and one.deviation("all", ["en"]) is None
    assert two.cell("all", "en")[0] == pytest.approx(5 / 8)
    assert two.deviation("all", ["en"]) == pytest.approx(np.std([0.5, 0.75], ddof=1))
    assert two.deviation("all", ["aa", "bb"]) == pytest.approx(np.std([0.5, 0.375], ddof=1))
    assert two.rows("all", "en", "last").tolist() == [0, 0, 0.5, 0]
    assert "± 17.7" in markdown(two) and "(all: 2)" in markdown(two) and "±" not in markdown(one)
    assert as_json(two)["deviations"]["en"]["all"] == two.deviation("all", ["en"])


def test_differences_count_what_is_gained_and_lost():
    c = example()
    header, *rows = differences(c, "all")
    found = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert list(found) == ["en", "aa", "bb", "mean of rich", "mean of poor", "mean of all groups"]
    assert found["aa"]["gained"] == "1" and found["aa"]["lost"] == "0"
    assert found["aa"]["last"] == "50.0" and found["aa"]["all"] == "75.0"
    assert found["mean of all groups"]["rows"] == "8" and found["aa"]["p"] == "1.000"
    assert float(found["aa"]["p, Holm"]) >= float(found["aa"]["p"])


def many(share: float, rows: int = 200) -> list[int]:
    return [int(i < share * rows) for i in range(rows)]


def test_a_summary_claims_what_test_and_interval_show():
    correct = {"LLM alone": {"en": many(0.9), "aa": many(0.3), "bb": many(0.3)},
               "A": {"en": many(0.895), "aa": many(0.5), "bb": many(0.31)},
               "B": {"en": many(0.5), "aa": many(0.3), "bb": many(0.31)}}
    c = Comparison("xnli", "likelihood", correct, {"rich": ("aa", "bb")}, "LLM alone", {}, {})
    compared, sure = summary(c)
    assert compared == ("A and B were compared with LLM alone on xnli: the same 200 rows in each "
                        "of 3 languages, by the likelihood of the labels.")
    assert sure.startswith("Sure for these runs: A is better by 10.5 [")
    assert "points on the mean of rich and better in aa; B is worse in en, with no sure " in sure
    assert sure.endswith("(p < 0.05 after Holm's correction for all 8 tests, and a 95% interval "
                         "without 0).")
    # Eight tests are corrected together, in the tables too.
    ps = [test.p for tests in c.tests.values() for test in tests.values()]
    assert [x.corrected for tests in c.tests.values() for x in tests.values()] == holm(ps)
    same = replace(c, correct=dict.fromkeys(correct, correct["LLM alone"]))
    assert summary(same)[1].startswith("No difference to LLM alone is sure for these runs (p <")
    alone = replace(c, correct={"A": correct["A"]}, reference="A")
    assert summary(alone)[0].startswith("A was scored on xnli: 200 rows in each of 3")
    assert summary(alone)[1].startswith("It gets 40.5 [") and "no difference is claim" in (
        summary(alone)[1])


def test_a_method_has_one_colour_everywhere():
    names = ["LLM alone", "last", "layer 11", "global_softmax", "mine", "transformer_softmax"]
    found = colours_of(names)
    assert list(found) == names and len(set(found.values())) == len(names)
    for other in (names[::-1], ["last", "mine"], ["layer_4", *names[3:]]):
        again = colours_of(other)
        assert all(again[x] == found[x] for x in other if x in found)
    assert len(set(colours_of(f"own {i}" for i in range(30)).values())) == 30


def test_a_smoothed_curve_follows_without_delay():
    assert smooth([1.0] * 5) is None
    line = [float(x) for x in range(100)]
    assert np.allclose(smooth(line), line)
    noisy = [x + (-1) ** x for x in range(100)]
    assert np.abs(smooth(noisy) - line)[6:-6].max() < 0.2


def test_groups_of_the_papers():
    found = standard_groups(["en", "sw", "hi", "ur", "zh"])
    assert found == {"low-resource": ("sw", "ur"), "Indic": ("hi", "ur"),
                     "all": ("en", "sw", "hi", "ur", "zh")}
    assert standard_groups(["sin_Sinh", "eng_Latn", "tam_Taml"])["Indic"] == (
        "sin_Sinh", "tam_Taml")
    assert standard_groups(["hi", "ta"]) == {"all": ("hi", "ta")} and standard_groups(["en"]) == {}


def test_variants_set_leave_out_and_check_fields():
    config = from_config_dict(get_config(QUICKSTART))
    runs = variants(config)
    assert [run.fusion.name for run in runs.values()] == [
        "last", "layer", "global_softmax", "transformer_softmax"]
    assert set(runs["last"].optimizer.groups) == {"projector"}
    assert {run.train for run in runs.values()} == {config.base.train}
    wrong = get_config(QUICKSTART).unlock()
    wrong.variants = ({"name": "odd", "fusion": {"nam": "last"}},)
    with pytest.raises(InputError, match=r"variants\.odd\.fusion\.nam"):
        from_config_dict(wrong)
    with pytest.raises(InputError, match="at least one variant"):
        from_config_dict(default_config("compare"))


def test_every_bridge_config_makes_a_comparison():
    file = next(file for file in FILES if file.stem == "xnli_paper")
    config = from_config_dict(get_config(file, "compare"))
    assert config.base == from_config_dict(get_config(file)) and len(variants(config)) == 3
    with pytest.raises(InputError, match="unknown config argument 'compare'"):
        finish(default_config("pretrain"), "compare")


@pytest.fixture(scope="module")
def debug_run(cache_dir, tmp_path_factory):
    config = get_config(QUICKSTART, "debug").unlock()
    config.base.train.steps = config.base.train.eval_every = 4
    config.base.data.dev_rows, config.rows = 8, 6
    config = from_config_dict(config)
    config = replace(config, base=make_inputs(config.base))
    workdir = tmp_path_factory.mktemp("quickstart") / "run"
    with pytest.MonkeyPatch.context() as patch:
        leave_unscored(patch)
        patch.setattr(warm_start, "STEPS", 20)  # nothing asks how good it is
        return workdir, compare(config, workdir), config


def test_a_comparison_runs_from_start_to_report(debug_run):
    workdir, comparison, config = debug_run
    assert list(comparison.correct) == [
        "LLM alone", "last", "layer 4", "global_softmax", "transformer_softmax"]
    rows = {comparison.rows(model, x).size for model, by in comparison.correct.items() for x in by}
    assert rows == {6}
    assert set(comparison.layer_weights) == {"global_softmax", "transformer_softmax"}
    for by_language in comparison.layer_weights.values():
        for weights in by_language.values():
            assert len(weights) == 4 and sum(weights) == pytest.approx(1, abs=1e-4)
    assert "Warm start" in comparison.notes[0]
    page = (workdir / "report.md").read_text()
    assert all(name in page for name in comparison.correct)
    assert json.loads((workdir / "report.json").read_text())["seconds"]["last"]["train"] > 0
    for picture in ("accuracy.png", "layers.png", "curves.png"):
        assert (workdir / picture).read_bytes().startswith(b"\x89PNG")
    # Each variant is an ordinary workdir.
    scores = json.loads((workdir / "last" / "eval" / "results.json").read_text())
    english = scores["pocket_nli"]["en"]["likelihood"]
    assert english["accuracy"] == comparison.cell("last", "en")[0]
    with pytest.raises(InputError, match="another config"):
        compare(replace(config, rows=5), workdir)


def test_what_is_scored_is_not_scored_again(debug_run, tmp_path, monkeypatch):
    workdir, _, config = debug_run
    where = tmp_path / "last"
    shutil.copytree(workdir / "last", where)
    read = {x: (where / "eval" / x).read_text() for x in ("results.json", "details.json")}
    with monkeypatch.context() as patch:
        patch.setattr(score, "_score", lambda *_: pytest.fail("scored again"))
        results, _ = evaluate(where, limit=config.rows, again=False)
    assert results == json.loads(read["results.json"])
    # One language's rows are others now: it alone is scored.
    details = json.loads(read["details.json"])
    details["pocket_nli"]["deva"]["queries"][0] += "?"
    write_checked(where / "eval" / "details.json", json.dumps(details))
    scored, new = evaluate(where, limit=config.rows, again=False)
    assert new["pocket_nli"].keys() == {"deva"} and scored == results
    _, new = evaluate(where, limit=config.rows - 1, again=False)
    assert new["pocket_nli"].keys() == results["pocket_nli"].keys()
    # Towers in another dtype may answer otherwise.
    run, asked = configs.load(where / "config.json"), []
    configs.save(replace(run, decoder=replace(run.decoder, dtype="int8")), where / "config.json")
    monkeypatch.setattr(score, "_score", lambda _, rows: asked.append(rows) or ({}, {}))
    evaluate(where, limit=config.rows - 1, again=False)
    assert asked[0]["pocket_nli"].keys() == results["pocket_nli"].keys()


@pytest.mark.parametrize("fusion", ["last", "global_softmax", "transformer_softmax"])
def test_one_input_is_answered_with_its_layers(debug_run, fusion, capsys):
    answer = ask(debug_run[0] / fusion, "bida kuno | ломо")
    said = capsys.readouterr().out
    assert f"answer: {answer}" in said and "%  Entailment" in said
    assert "not in the encoder's vocabulary" in said and "ломо" in said
    assert ("layer 4" in said) == (fusion != "last")


def test_an_input_with_other_columns_is_refused():
    with pytest.raises(InputError, match=r'got 1 .*write: --ask "PREMISE \| HYPOTHESIS"'):
        fill(TASKS["pocket_nli"], "the dog runs")
    with pytest.raises(InputError, match="takes the columns text, not the whole prompt"):
        fill(Task("Review: {text} Mood: ", (), ()), "Review: good. Mood:")
    assert fill(Task("{text}", (), ()), "a") == "a"
    for prompt, text in (("A {text}", "A man."), ("Write down {text}", "Write downwards"),
                         ('"{text}"', '"Yes" is not "no"'), ("- {text}.", "- one.")):
        assert fill(Task(prompt, (), ()), text) == prompt.replace("{text}", text)
    assert fill(TASKS["pocket_nli"], "a | b") == "Premise: a Hypothesis: b Label: "


def test_known_words_are_not_called_unknown():
    from jaxfusion.data.tokenizers import train_tokenizer

    tokenizer = train_tokenizer("encoder", ["the dog runs near the river"] * 50, 60)
    assert unknown_words(tokenizer, "the dog | runs") == []
    assert unknown_words(tokenizer, "the dog | നദി") == ["നദി"]


def test_a_comparison_that_cannot_start_leaves_nothing(debug_run, tmp_path):
    config = debug_run[2]
    encoder = replace(config.base.encoder, checkpoint="/no/where")
    with pytest.raises(InputError, match="neither a directory nor a hub id"):
        compare(replace(config, base=replace(config.base, encoder=encoder)), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="has no language 'hindi'"):
        compare(replace(config, groups={"rich": ("hindi",)}), tmp_path / "run")


def test_a_comparison_is_not_taken_for_one_of_its_bridges(debug_run):
    workdir, _, config = debug_run
    with pytest.raises(InputError, match=r"is a comparison; give one of its bridges: .*layer_4"):
        ask(workdir, "a | b")
    with pytest.raises(InputError, match="holds a run of job 'compare'"):
        check_workdir(config.base, workdir)


def test_languages_of_different_sizes_and_groups_without_any(tmp_path):
    """XWinograd has 16 rows in Chinese and 959 in Japanese; not every task has every target."""
    rows = {"en": [1, 0, 1], "ja": [1] * 40, "zh": [0, 1]}
    other = {name: [1] * len(x) for name, x in rows.items()}
    c = Comparison("xwinograd", "likelihood", {"LLM": rows, "Lens": other},
                   {"targets": ("ja", "zh")}, "LLM", {}, {}, central="en")
    assert c.mean("LLM", "targets")[0] == pytest.approx(0.75)
    low, high = c.mean("Lens", "targets", minus="LLM")[1]
    assert 0 <= low < 0.25 < high <= 0.5
    page = markdown(c)
    assert "2 to 40 rows per language" in page and "| en minus LLM |  |  | +33.3" in page
    alone = Comparison("xnli", "likelihood", {"LLM": {"en": [1, 0]}, "Lens": {"en": [1, 1]}},
                       {"targets": ("si",)}, "LLM", {}, {}, central="en")
    assert "| mean of" not in markdown(alone) and as_json(alone)["central"]["Lens"]


def test_an_empty_group_has_no_mean():
    """It had that of all groups."""
    c = Comparison("t", "likelihood", {"A": {"en": [1, 0], "si": [1, 1]}},
                   {"far": (), "near": ("en",)}, "A", {}, {})
    assert c.group("far") == () and c.group_names == ("near",)
    assert "far" not in markdown(c)


def test_runs_of_a_comparison_keep_its_groups(tmp_path):
    """English and the recipe's languages were counted in the mean of all."""
    comparison = {"job": "compare", "groups": {"far": ["si", "ta"]}, "development": ["ta"]}
    (tmp_path / "config.json").write_text(json.dumps(comparison))
    row = {"correct": {"likelihood": [1]}, "queries": ["q"], "targets": ["x"], "answers": ["x"],
           "likelihoods": [[0.0]], "labels": ["x"]}
    for name in ("one/seed_0", "two/seed_0"):
        (tmp_path / name / "eval").mkdir(parents=True)
        (tmp_path / name / "config.json").write_text('{"job": "bridge"}')
        details = {"sib200": dict.fromkeys(("en", "si", "ta"), row)}
        (tmp_path / name / "eval" / "details.json").write_text(json.dumps(details))
    places = [str(tmp_path / name / "seed_0") for name in ("one", "two")]
    (found,) = compare_runs(read_models(places))
    assert found.groups == {"far": ("si",)}
    assert found.notes == ("Recipes were chosen on ta; means exclude them.",)
    (tmp_path / "config.json").write_text(json.dumps({**comparison, "groups": {}}))
    (found,) = compare_runs(read_models(places))
    assert found.groups == {"all": ("en", "si")}
    assert found.notes == ("Recipes were chosen on ta; means exclude them.",)


def test_checkpoints_that_were_chosen_by_different_scores_are_told(tmp_path):
    """A comparison that an earlier version half finished, and this one to its end."""
    row = {"correct": {"likelihood": [1, 0]}, "queries": ["q", "r"], "targets": ["x", "y"],
           "answers": ["x", "y"], "likelihoods": [[0.0], [0.0]], "labels": ["x", "y"]}
    variants = [{"name": name} for name in ("layer 3", "softmax", "adopted")]
    config = CompareConfig(variants=tuple(variants))
    configs.save(config, tmp_path / "config.json")
    bests = {"layer_3": [Best(2, 0.7), Best(2, 0.7, 1)],  # of an earlier version
             "softmax": [Best(2, 0.5, name="likelihood"), Best(4, 0.6, name="likelihood")],
             "adopted": [None]}
    for name, found in bests.items():
        for file in ("details.json", "llm_only_details.json"):
            (tmp_path / name / "eval").mkdir(parents=True, exist_ok=True)
            write_checked(tmp_path / name / "eval" / file, json.dumps({"xnli": {"en": row}}))
        checkpoints = Checkpoints(tmp_path / name)
        for i, best in enumerate(found):
            checkpoints.save(State(jnp.array(2 * i + 2), {"a": jnp.zeros(2)}, ()),
                             {"next_index": 2 * i + 2}, best and 0.5 + 0.1 * i, best)
        checkpoints.close()
    assert [chosen_by(tmp_path / name) for name in (*bests, "none")] == [
        {None}, {"likelihood"}, set(), set()]
    said = ("Checkpoints were chosen by different scores, which favours some: layer 3 by the score "
            "of an earlier version (exact_match where there are labels); softmax by likelihood.")
    assert said in report([tmp_path]).with_suffix(".md").read_text()
    places = [str(tmp_path / name) for name in bests]
    assert gather(places)[1][0].notes[-1] == said
    assert said not in gather(places[1:])[1][0].notes
