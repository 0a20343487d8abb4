"""The lm-evaluation-harness with our model: its own tasks on local rows, its numbers ours."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, XNLI, get_config, leave_unscored

from jaxfusion.bridge.job import train
from jaxfusion.config import from_config_dict
from jaxfusion.data.rows.examples import Example
from jaxfusion.errors import InputError
from jaxfusion.evaluation.scoring import SHARED
from jaxfusion.miniatures.inputs import make_inputs
from jaxfusion.runs.lm_harness import FREE, JaxFusion, _at_seam, _decoding
from jaxfusion.runs.score import evaluate


class Request:
    def __init__(self, *args):
        self.args = args


@pytest.fixture(scope="module")
def workdir(cache_dir, tmp_path_factory):
    config = get_config(XNLI, "debug").unlock()
    config.train.steps = config.train.eval_every = config.train.checkpoint_every = 4
    config.data.dev_rows, config.eval.max_new_tokens, config.fusion.name = 8, 4, "last"
    workdir = tmp_path_factory.mktemp("lm_eval") / "run"
    with pytest.MonkeyPatch.context() as patch:
        leave_unscored(patch)
        train(make_inputs(from_config_dict(config)), workdir)
    return workdir


@pytest.mark.parametrize("llm_only", [False, True])
def test_likelihoods_equal_ours(workdir, llm_only):
    _, details = evaluate(workdir, limit=6, llm_only=llm_only, languages=("en", "ar"))
    model = JaxFusion(str(workdir), llm_only=llm_only)
    for part in details["xnli"].values():
        # As the harness writes its requests: no space before, one after.
        asked = [Request(query.rstrip(), f" {label}") for query in part["queries"]
                 for label in part["labels"]]
        found = [score for score, _ in model.loglikelihood(asked[::-1])][::-1]
        assert np.allclose(np.reshape(found, (6, -1)), part["likelihoods"], atol=2e-4)


def test_greedy_continuations_are_known(workdir):
    model = JaxFusion(str(workdir), llm_only=True)
    text = "la ru so"
    answer, = model.generate_until([Request(text, {"until": [], "max_gen_toks": 3})])
    ids = model.run.tokenizers.encode_answers([text + " "], [answer])[0]
    (_, greedy), (_, other) = model.loglikelihood([Request(text, f" {answer}"),
                                                   Request(text, " zzz")])
    assert not other and greedy == (
        model.run.tokenizers.decoder.decode(ids).strip() == answer)


def test_a_texts_likelihood_is_the_sum_of_its_windows(workdir):
    model = JaxFusion(str(workdir), llm_only=True)
    text = "la ru so bako dimofu gata " * 3
    whole, = model.loglikelihood_rolling([Request(text)])
    (alone, _), = model.loglikelihood([Request("", text)])
    assert whole == pytest.approx(alone, rel=1e-5)
    with pytest.raises(InputError, match="llm_only=True"):
        JaxFusion(str(workdir)).loglikelihood_rolling([Request(text)])


def test_a_question_behind_many_examples_is_asked(workdir):
    """Few-shot prompts are longer than what the encoder reads, and end in what is asked."""
    model = JaxFusion(str(workdir))
    (one, _), (other, _) = model.loglikelihood([
        Request("la ru so bako. " * 60 + asked, " gata") for asked in ("dimofu", "bako la")])
    assert one != other


def test_what_all_requests_begin_with_is_read_once(workdir):
    """The examples of few-shot prompts; a request alone shares nothing."""
    model = JaxFusion(str(workdir), llm_only=True)
    asked = [Request("la ru so bako. " * 5 + x, " gata") for x in ("dimofu", "bako la", "ru")]
    rows, _ = model.run.scorer(FREE).rows([Example(x.args[0], "", -1, "") for x in asked])
    assert model.run.scorer(FREE).shared(rows) >= SHARED
    alone = [model.loglikelihood([request])[0] for request in asked]
    found = model.loglikelihood(asked)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in alone]
    assert np.allclose([x for x, _ in found], [x for x, _ in alone], rtol=1e-5)


def test_a_model_without_a_run_is_refused():
    with pytest.raises(InputError, match="give --model_args workdir=DIR"):
        JaxFusion()


def test_settings_are_read_as_the_harness_means_them():
    assert _at_seam("a:", " b c") == ("a: ", "b c")
    assert _decoding({"until": "\n", "temperature": 0.7, "max_gen_toks": 5}) == {
        "stop": ("\n",), "max_new_tokens": 5, "temperature": 0.0, "top_p": 1.0}
    assert _decoding({"do_sample": True, "temperature": 0.7})["temperature"] == 0.7
    with pytest.raises(InputError, match="top_k is not supported"):
        _decoding({"top_k": 5})


@pytest.mark.slow
def test_the_harness_runs_its_own_task(workdir, tmp_path):
    """Its XCOPA, on rows in a local file, from its own command line."""
    rows = [{"premise": f"la ru {i}.", "choice1": "So bako.", "choice2": "Gata.",
             "question": ("cause", "effect")[i % 2], "label": i % 2} for i in range(6)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "xcopa_local.yaml").write_text(
        "include: xcopa/default_et.yaml\ntask: xcopa_local\ndataset_path: json\n"
        f"dataset_name: null\ndataset_kwargs:\n  data_files:\n    test: {data}\n"
        "validation_split: null\n")
    import lm_eval

    # The harness finds a task's functions beside the file that is included.
    shipped = Path(lm_eval.__file__).parent / "tasks" / "xcopa"
    (tmp_path / "xcopa").symlink_to(shipped)
    (tmp_path / "utils.py").symlink_to(shipped / "utils.py")
    done = subprocess.run(
        [sys.executable, "-m", "jaxfusion.runs.lm_harness", "--model", "jaxfusion",
         "--model_args", f"workdir={workdir}", "--tasks", "xcopa_local",
         "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")],
        cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result, = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(result.read_text())
    assert found["n-samples"]["xcopa_local"]["effective"] == 6
    assert 0 <= found["results"]["xcopa_local"]["acc,none"] <= 1
