"""Generation and scoring: what a prompt is answered does not depend on its neighbours."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative
from hypothesis import given
from hypothesis import strategies as st

from jaxfusion.config import default_config, finish, from_config_dict
from jaxfusion.data.batching import collate, find_shapes, tokenize
from jaxfusion.data.sources import Example
from jaxfusion.data.task import Task, last_number
from jaxfusion.evaluation.generate import Decoding, make_scorer
from jaxfusion.evaluation.metrics import accuracy, wilson_interval
from jaxfusion.evaluation.report import merge_results
from jaxfusion.evaluation.scoring import Scorer
from jaxfusion.fields import EvalConfig
from jaxfusion.sharding.mesh import make_mesh
from jaxfusion.training.state import load_model, merge

LABELS = ("bako", "dimofu gata")
TASK = Task("{text}", LABELS, ("en",))
QUERIES = [f"{'la ru ' * n}Label: " for n in (1, 9, 3, 4, 12)]
EXAMPLES = [Example(query, LABELS[i % 2], i % 2) for i, query in enumerate(QUERIES)]


@pytest.fixture(scope="module")
def model(tiny):
    config = finish(default_config(), "global_softmax,debug").unlock()
    config.encoder.checkpoint, config.decoder.checkpoint = (
        str(tiny / role) for role in ("encoder", "decoder")
    )
    return load_model(from_config_dict(config), make_mesh())


@pytest.fixture(scope="module")
def params(model):
    return merge(model.trainable, model.frozen)


def rows_of(model, examples, with_target=False, text_prompt=""):
    return tokenize(
        examples, model.tokenizers, text_prompt=text_prompt, max_encoder_tokens=128,
        max_decoder_tokens=64, with_target=with_target,
    )[0]


@pytest.mark.parametrize("bare", [False, True])
def test_a_prompt_is_answered_as_it_is_alone(model, params, bare):
    """In any batch, bucket and padding; tokens are compared up to near-ties of the top two."""
    config = EvalConfig(batch_size=4, max_encoder_tokens=128, max_new_tokens=6)
    together = Scorer(model.bridge, model.tokenizers, config, bare=bare)(params, EXAMPLES, TASK)
    for i, example in enumerate(EXAMPLES):
        alone = Scorer(
            model.bridge, model.tokenizers, EvalConfig(batch_size=1, max_new_tokens=6), bare=bare
        )(params, [example], TASK)
        assert alone.answers[0] == together.answers[i]
        assert alone.correct["likelihood"][0] == together.correct["likelihood"][i]


def test_greedy_and_likelihood_equal_a_full_pass(model, params):
    """Each greedy token is the argmax, and each score the sum, of logits without any cache."""
    bridge, tokenizers = model.bridge, model.tokenizers
    rows = rows_of(model, EXAMPLES[:2], text_prompt="so")
    shapes = find_shapes(rows, (64,))
    batch = collate(*shapes.place(rows, 1, 2), tokenizers)
    options = np.array([[[7, 9, 30, 2], [7, 9, 30, 2]], [[8, 0, 0, 0], [9, 5, 0, 0]]])
    mask = options > 0
    score = make_scorer(bridge, Decoding(5, tokenizers.eos), bare=False)
    tokens, scores = score(params, batch, options, mask)

    def logits_after(i, answer):
        """Logits before each token of `answer` in row i, from one uncached pass."""
        row = type(rows[i])(rows[i].query, rows[i].text, list(answer))
        whole = collate(*find_shapes([row], (64,)).place([row], 1, 1), tokenizers)
        return bridge.target_logits(params, whole)[0, : len(answer)]

    for i in range(2):
        answer = tokens[i].tolist()
        top = np.argsort(np.asarray(logits_after(i, answer)), axis=-1)[:, ::-1]
        ended = answer.index(tokenizers.eos) + 1 if tokenizers.eos in answer else len(answer)
        assert answer[:ended] == top[:ended, 0].tolist()
        for c in range(2):
            option = options[c, i][mask[c, i]]
            log_probs = jax.nn.log_softmax(logits_after(i, option), axis=-1)
            expected = float(jnp.sum(log_probs[np.arange(len(option)), option]))
            assert abs(float(scores[c, i]) - expected) < 1e-4 * abs(expected)


def test_too_long_queries_are_counted(model, params):
    config = EvalConfig(batch_size=4, max_encoder_tokens=16, max_new_tokens=2)
    scored = Scorer(model.bridge, model.tokenizers, config)(params, EXAMPLES, TASK)
    assert scored.cut.queries > 0 and len(scored.answers) == len(EXAMPLES)


def test_free_text_has_greedy_scores_alone(model, params):
    config = EvalConfig(batch_size=4, max_new_tokens=2)
    task = Task("{text}", (), ("en",))
    scored = Scorer(model.bridge, model.tokenizers, config)(params, EXAMPLES, task)
    assert set(scored.correct) == {"exact_match"}


def test_letters_are_scored_by_the_prompts_own_logits(model, params):
    """Options of one token give what they give with a cache behind the prompt."""
    bridge, tokenizers = model.bridge, model.tokenizers
    rows = rows_of(model, EXAMPLES[:2])
    batch = collate(*find_shapes(rows, (64,)).place(rows, 1, 2), tokenizers)
    score = make_scorer(bridge, Decoding(0, tokenizers.eos), bare=False)
    letters = np.array([[[7], [7]], [[8], [9]]])
    tokens, scores = score(params, batch, letters, letters > 0)
    assert tokens.shape == (2, 0)
    longer = np.pad(letters, ((0, 0), (0, 0), (0, 7)))
    _, cached = make_scorer(bridge, Decoding(5, tokenizers.eos), bare=False)(
        params, batch, longer, longer > 0)
    assert relative(scores, cached) < 1e-6


def test_numbers_are_compared_and_not_the_words_around_them(model, params):
    for text, number in (("So she has 1,250.50 dollars.", "1250.5"), ("x = -3", "-3"), ("", ""),
                         ("18", "18"), ("First 3, then 20.0", "20"), ("none", "")):
        assert last_number(text) == number
    task = Task("{text}", (), ("en",), extract=lambda text: "same")
    scored = Scorer(model.bridge, model.tokenizers, EvalConfig(batch_size=4, max_new_tokens=2))(
        params, EXAMPLES, task)
    assert all(scored.correct["exact_match"])


def test_wilson_interval_against_published_values():
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3.
    for correct, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605),
                                  (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)):
        assert np.allclose(wilson_interval(correct, n), (low, high), atol=5e-5)


@given(st.lists(st.booleans(), min_size=1, max_size=300))
def test_intervals_hold_their_accuracy(correct):
    result = accuracy(correct)
    low, high = result["ci95"]
    assert 0 <= low <= result["accuracy"] <= high <= 1 and result["n"] == len(correct)


def test_results_grow_and_do_not_mix(tmp_path):
    file, score = tmp_path / "eval" / "results.json", {"exact_match": accuracy([True])}
    merge_results(file, {"xnli": {"sw": score}}, {"step": 5})
    merged = merge_results(file, {"xnli": {"th": score}}, {"step": 5})
    assert set(merged["xnli"]) == {"sw", "th"} and json.loads(file.read_text()) == merged
    for number in (8, 9):  # another step's results leave the old ones where they can be found
        assert set(merge_results(file, {"xnli": {"en": score}}, {"step": number})["xnli"]) == {"en"}
    kept = json.loads((tmp_path / "eval" / "results.step5.json").read_text())
    assert set(kept["xnli"]) == {"sw", "th"}
    assert (tmp_path / "eval" / "results.step8.json").is_file()
