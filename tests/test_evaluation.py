"""Generation and scoring: what a prompt is answered does not depend on its neighbours."""

import dataclasses
import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from jaxfusion.data.batching import collate, find_shapes, tokenize
from jaxfusion.data.contamination import fingerprints
from jaxfusion.data.rows.examples import Example
from jaxfusion.data.tasks.catalogue import TASKS
from jaxfusion.data.tasks.spec import Task, last_number
from jaxfusion.errors import InputError
from jaxfusion.evaluation.generate import Decoding, choose_tokens, make_scorer
from jaxfusion.evaluation.options import make_options
from jaxfusion.evaluation.scoring import SHARED, Scorer, _correct, check_scorable
from jaxfusion.fields import EvalConfig
from jaxfusion.reports.statistics import accuracy, holm, mcnemar, sign_flip, wilson_interval
from jaxfusion.reports.terminal import merge_results
from jaxfusion.runs.score import unseen
from jaxfusion.training.state import merge

LABELS = ("bako", "dimofu gata")
TASK = Task("{text}", LABELS, ("en",))
QUERIES = [f"{'la ru ' * n}Label: " for n in (1, 9, 3, 4, 12)]
EXAMPLES = [Example(query, LABELS[i % 2], i % 2) for i, query in enumerate(QUERIES)]


@pytest.fixture(scope="module")
def model(tiny):
    return tiny_model(tiny, "global_softmax")


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
    """In any batch, bucket and padding."""
    config = EvalConfig(batch_size=4, max_encoder_tokens=128, max_new_tokens=6)
    together = Scorer(model.bridge, model.tokenizers, config, bare=bare)(params, EXAMPLES, TASK)
    config = EvalConfig(batch_size=1, max_new_tokens=6)
    one = Scorer(model.bridge, model.tokenizers, config, bare=bare)
    for i, example in enumerate(EXAMPLES):
        alone = one(params, [example], TASK)
        assert alone.answers[0] == together.answers[i]
        assert alone.correct["likelihood"][0] == together.correct["likelihood"][i]


def test_greedy_and_likelihood_equal_a_full_pass(model, params):
    """Each greedy token is the argmax, and each score the sum, of logits without any cache."""
    bridge, tokenizers = model.bridge, model.tokenizers
    rows = rows_of(model, EXAMPLES[:2], text_prompt="so")
    shapes = find_shapes(rows, (64,))
    batch = collate(*shapes.place(rows, 1, 2), tokenizers)
    # By option and row: some share beginnings, one is the beginning of another.
    options = [[[7, 9, 30, 2], [7, 9, 30, 2]], [[8], [9, 5]], [[7, 9, 31, 4, 4, 4], [7, 9]],
               [[7, 30, 2], [9, 5, 5]]]
    score = make_scorer(bridge, Decoding(5, tokenizers.eos), bare=False)
    tokens, scores, greedy = score(params, batch, make_options(options, 2))
    full = jax.jit(bridge.target_logits)

    def logits_after(i, answer):
        """Logits before each token of `answer` in row i, from one uncached pass."""
        row = type(rows[i])(rows[i].query, rows[i].text, list(answer))
        whole = collate(*find_shapes([row], (64,)).place([row], 1, 1), tokenizers)
        return full(params, whole)[0, : len(answer)]

    for i in range(2):
        answer = tokens[i].tolist()
        top = np.argsort(np.asarray(logits_after(i, answer)), axis=-1)[:, ::-1]
        ended = answer.index(tokenizers.eos) + 1 if tokenizers.eos in answer else len(answer)
        assert answer[:ended] == top[:ended, 0].tolist()
        for c, rows_option in enumerate(options):
            option = np.array(rows_option[i])
            log_probs = jax.nn.log_softmax(logits_after(i, option), axis=-1)
            expected = float(jnp.sum(log_probs[np.arange(len(option)), option]))
            assert abs(float(scores[c, i]) - expected) < 1e-4 * abs(expected)
            assert bool(greedy[c, i]) == bool((log_probs.argmax(axis=-1) == option).all())


def test_too_long_queries_are_counted(model, params):
    config = EvalConfig(batch_size=4, max_encoder_tokens=16, max_new_tokens=2)
    scored = Scorer(model.bridge, model.tokenizers, config)(params, EXAMPLES, TASK)
    assert scored.cut.queries > 0 and len(scored.answers) == len(EXAMPLES)


def test_free_text_has_greedy_scores_alone(model, params):
    config = EvalConfig(batch_size=4, max_new_tokens=2)
    task = Task("{text}", (), ("en",))
    scored = Scorer(model.bridge, model.tokenizers, config)(params, EXAMPLES, task)
    assert set(scored.correct) == {"exact_match"}


def test_labels_can_be_scored_without_answers(model, params):
    """The likelihoods are the same, and nothing is called wrong that was not asked for."""
    config = EvalConfig(batch_size=4, max_new_tokens=2)
    whole, labels = (Scorer(model.bridge, model.tokenizers, replace(config, max_new_tokens=n))(
        params, EXAMPLES, TASK) for n in (2, 0))
    assert set(labels.correct) == {"likelihood", "likelihood_norm"}
    np.testing.assert_allclose(labels.likelihoods, whole.likelihoods, rtol=1e-5)
    check_scorable(replace(config, max_new_tokens=0), "pocket_nli", TASK)
    with pytest.raises(InputError, match="task 'mgsm' has no labels and is scored by its answers"):
        check_scorable(replace(config, max_new_tokens=0), "mgsm", Task("{text}", (), ("en",)))


def test_an_answer_ends_at_every_end_token_that_the_llm_names(model, params, tiny, tmp_path):
    """Llama 3, Qwen2.5 and Gemma name several in `generation_config.json`."""
    rows = rows_of(model, EXAMPLES[:1])
    batch = collate(*find_shapes(rows, (64,)).place(rows, 1, 1), model.tokenizers)
    score = make_scorer(model.bridge, Decoding(4, model.tokenizers.eos), bare=False)
    tokens = score(params, batch, make_options([[[]]], 1))[0][0]
    kept = next(i for i in range(1, 4) if tokens[i] not in tokens[:i])
    llm = shutil.copytree(tiny / "decoder", tmp_path / "llm")
    (llm / "generation_config.json").write_text(json.dumps(
        {"eos_token_id": [model.tokenizers.eos, int(tokens[kept])]}))
    ending = tiny_model(tiny, "global_softmax", decoder=llm)
    scored = Scorer(ending.bridge, ending.tokenizers, EvalConfig(batch_size=1, max_new_tokens=4))(
        params, EXAMPLES[:1], TASK)
    assert scored.answers == [model.tokenizers.decoder.decode(
        tokens[:kept].tolist(), skip_special_tokens=True).strip()]


@pytest.mark.parametrize("name", ["belebele", "mgsm"])
def test_a_prompt_that_is_too_long_keeps_its_question(name, model, params, monkeypatch):
    """Which is at its end, behind a passage or the examples of a few-shot prompt."""
    asked = [Example("la ru " * 60 + end, "A", 0) for end in ("bako", "dimofu gata")]
    seen, in_shapes = [], Scorer.shapes
    monkeypatch.setattr(
        Scorer, "shapes", lambda self, rows: seen.extend(rows) or in_shapes(self, rows))
    Scorer(model.bridge, model.tokenizers, EvalConfig(
        batch_size=2, max_encoder_tokens=24, max_new_tokens=1))(params, asked, TASKS[name])
    first, second = (row.query for row in seen)
    assert len(first) == len(second) == 24 and first != second
    assert second == model.tokenizers.encode_queries([asked[1].query])[0][-24:]


def test_rows_go_together_only_where_they_are_translations():
    """Not where languages have equally many rows, as with any limit."""
    rows = {x: [Example(f"{x} {i}", "a", 0) for i in range(3)] for x in ("en", "ja")}
    seen = fingerprints(["en 1"])
    left = {name: {x: [row.query[-1] for row in found]
                   for x, found in unseen({name: rows}, seen, drop=True)[name].items()}
            for name in ("xnli", "xwinograd")}
    assert left["xnli"] == {"en": ["0", "2"], "ja": ["0", "2"]}
    assert left["xwinograd"] == {"en": ["0", "2"], "ja": ["0", "1", "2"]}


def test_what_all_prompts_of_the_llm_begin_with_is_read_once(model, params):
    """Examples before the question: the scores of each row alone, which shares nothing."""
    shots = "la ru bako dimofu gata " * 12
    asked = [Example(shots + x, "a", 0) for x in ("bako", "dimofu gata la", "ru ru", "la", "gata")]
    task = Task("{text}", ("la ru", "bako"), ("en",))
    config = EvalConfig(batch_size=2, max_new_tokens=4)
    scorer = Scorer(model.bridge, model.tokenizers, config, bare=True)
    rows, _ = scorer.rows(asked)
    assert scorer.shared(rows) >= SHARED and scorer.shared(rows[:1]) == 0
    assert scorer.shared(rows) < min(len(row.text) for row in rows) + len(model.tokenizers.start)
    together = scorer(params, asked, task)
    for i, example in enumerate(asked):
        alone = scorer(params, [example], task)
        assert alone.answers[0] == together.answers[i]
        assert relative(alone.likelihoods[0], together.likelihoods[i]) < 1e-5


def test_letters_are_scored_by_the_prompts_own_logits(model, params):
    """Options of one token give what they give with a cache behind the prompt."""
    bridge, tokenizers = model.bridge, model.tokenizers
    rows = rows_of(model, EXAMPLES[:2])
    batch = collate(*find_shapes(rows, (64,)).place(rows, 1, 2), tokenizers)
    score = make_scorer(bridge, Decoding(0, tokenizers.eos), bare=False)
    letters = [[[7], [7]], [[8], [9]]]
    tokens, scores, _ = score(params, batch, make_options(letters, 2))
    assert tokens.shape == (2, 0)
    longer = [*letters, [[4, 5, 6], [3, 5, 6]]]
    _, cached, _ = make_scorer(bridge, Decoding(5, tokenizers.eos), bare=False)(
        params, batch, make_options(longer, 2))
    assert relative(scores, cached[:2]) < 1e-6


def test_options_are_a_tree_that_reads_each_beginning_once():
    options = make_options([[[5, 6, 7]], [[5, 6]], [[5, 8, 9]], [[4]], [[]]], batch_size=2)
    assert options.nodes.tolist() == [[5, 6, 8], [0, 0, 0]]
    assert options.depth[0].tolist() == [0, 1, 1]
    assert options.after[:3, 0, :3].tolist() == [[-1, 0, 1], [-1, 0, -1], [-1, 0, 2]]
    assert options.visible[0].astype(int).tolist() == [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    assert not options.visible[1].any() and not options.mask[:, 1].any()
    assert options.mask.sum(axis=2)[:, 0].tolist() == [3, 2, 3, 1, 0]
    assert make_options([[[4]], [[9]]], 1).nodes.shape == (1, 0)  # the prompt scores them


def test_draws_follow_the_nucleus_at_their_temperature():
    """Against probabilities by transformers' own warpers."""
    torch = pytest.importorskip("torch")
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    logits = np.random.default_rng(0).normal(size=(1, 12)).astype(np.float32) * 2
    warped = TopPLogitsWarper(0.8)(None, TemperatureLogitsWarper(0.7)(None, torch.tensor(logits)))
    wanted = torch.softmax(warped, -1).numpy()[0]
    decoding, rows = Decoding(1, 0, temperature=0.7, top_p=0.8), 20_000
    drawn = choose_tokens(jnp.tile(logits, (rows, 1)), decoding, jnp.arange(rows), 0)
    found = np.bincount(np.asarray(drawn), minlength=12) / rows
    assert (found[wanted == 0] == 0).all() and 1 < (wanted > 0).sum() < 12
    assert np.abs(found - wanted).max() < 4 * np.sqrt(0.25 / rows)


def test_draws_depend_on_seed_row_and_step_alone():
    logits = jnp.zeros((4, 50))

    def draw(numbers, seed=0, step=0):
        decoding = Decoding(1, 0, temperature=1.0, seed=seed)
        return choose_tokens(logits, decoding, jnp.array(numbers), step).tolist()

    first = draw([0, 1, 2, 3])
    assert draw([3, 2, 1, 0]) == first[::-1] and len(set(first)) > 1
    assert draw([0, 1, 2, 3], seed=1) != first != draw([0, 1, 2, 3], step=1)


def test_a_drawn_answer_is_the_same_in_any_batch(model, params):
    def answers(batch_size, examples, numbers=None):
        config = EvalConfig(batch_size=batch_size, max_new_tokens=5, temperature=0.8, top_p=0.9)
        return Scorer(model.bridge, model.tokenizers, config)(
            params, examples, TASK, numbers=numbers).answers

    together = answers(4, EXAMPLES)
    assert answers(2, EXAMPLES[3:], [3, 4]) == together[3:]
    assert len(set(answers(4, EXAMPLES[:1] * 4))) > 1  # one prompt, drawn four times


def test_an_answer_ends_at_a_stop_string(model, params):
    def answer(stop=()):
        config = EvalConfig(batch_size=2, max_new_tokens=12, stop=stop)
        scorer = Scorer(model.bridge, model.tokenizers, config)
        return scorer, scorer(params, EXAMPLES[:2], TASK).answers

    _, whole = answer()
    for length in (1, 2):  # of a stop string, so that some lie across two tokens
        stop = whole[0][3 : 3 + length]
        scorer, cut = answer((stop,))
        assert cut == [text.split(stop)[0].strip() for text in whole]
        pieces = [model.tokenizers.decoder.decode([int(i)]) for i in np.flatnonzero(scorer._ends)]
        assert all(stop in piece for piece in pieces)


@pytest.mark.parametrize("bare", [False, True])
def test_padding_on_the_left_changes_nothing(model, params, bare):
    rows = rows_of(model, EXAMPLES, text_prompt="so")
    right = collate(*find_shapes(rows, (64,)).place(rows, 1, len(rows)), model.tokenizers)
    free = np.array([row.argmin() if row.min() == 0 else len(row) for row in right.dec_segments])
    assert len(set(free)) > 2

    def roll(x):
        return np.stack([np.roll(row, x.shape[1] - n) for row, n in zip(x, free, strict=True)])

    left = dataclasses.replace(right, **{
        name: roll(getattr(right, name))
        for name in ("dec_tokens", "dec_source", "dec_positions", "dec_segments")})
    score = make_scorer(model.bridge, Decoding(8, model.tokenizers.eos), bare=bare)
    options = make_options([[[7, 9]] * len(rows), [[7, 8, 4]] * len(rows)], len(rows))
    (ours, one, _), (theirs, other, _) = (score(params, x, options) for x in (right, left))
    assert np.array_equal(ours, theirs) and relative(one, other) < 1e-5


def test_likelihood_by_length_is_that_of_a_character(model):
    task = Task("{text}", ("no", "certainly"), ("en",))
    scores = np.array([[-4.0, -9.0], [-1.0, -9.0]])
    examples = [Example("x", "certainly", 1)] * 2
    found = _correct(task, examples, ["certainly ", "no"], scores)
    assert found["likelihood"] == [False, False]
    assert found["likelihood_norm"] == [True, False] and found["exact_match"] == [True, False]


def test_paired_tests_against_values_known():
    # 101 against 59 discordant pairs: 0.0011 (binomial); and small ones by hand.
    pairs = np.array([[0, 1]] * 101 + [[1, 0]] * 59 + [[1, 1]] * 40)
    assert mcnemar(*pairs.T) == pytest.approx(0.00112, abs=2e-5)
    assert mcnemar(np.zeros(5), np.ones(5)) == 2 / 32
    assert mcnemar(np.ones(5), np.ones(5)) == 1
    assert sign_flip([pairs[:, 1] - pairs[:, 0]]) == pytest.approx(0.0011, abs=8e-4)
    assert sign_flip(np.zeros((2, 5))) == 1
    # Holm (1979): the smallest of three is multiplied by 3, and none falls below one before it.
    assert holm([0.01, 0.04, 0.03]) == [0.03, 0.06, 0.06]


def test_means_are_tested_by_rows_with_all_their_languages():
    """Copies of a language are no new evidence; other rows are."""
    rows = np.array([[1.0] * 14 + [-1.0] * 6])
    alone = mcnemar(rows[0] < 0, rows[0] > 0)
    assert sign_flip(np.repeat(rows, 5, axis=0)) == pytest.approx(alone, abs=0.02)
    assert sign_flip([rows[0], np.repeat(rows[0], 3)]) < alone / 2


def test_numbers_are_compared_and_not_the_words_around_them(model, params):
    for text, number in (("So she has 1,250.50 dollars.", "1250.5"), ("x = -3", "-3"), ("", ""),
                         ("18", "18"), ("First 3, then 20.0", "20"), ("none", ""),
                         ("5-3", "3"), ("x−4", "4"), ("= −4", "-4"), ("উত্তর ১৮", "18"),
                         ("答えは1２です", "12"), ("๑๒", "12")):
        assert last_number(text) == number
    task = Task("{text}", (), ("en",), extract=lambda text: "same")
    scored = Scorer(model.bridge, model.tokenizers, EvalConfig(batch_size=4, max_new_tokens=2))(
        params, EXAMPLES, task)
    assert all(scored.correct["exact_match"])
    nothing = _correct(Task("{text}", (), ("en",), extract=last_number),
                       [Example("x", "no number", -1)], ["none"], np.zeros((1, 0)))
    assert nothing["exact_match"] == [False]


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


def test_results_grow_and_do_not_mix(tmp_path, caplog):
    caplog.set_level("INFO")
    file, score = tmp_path / "eval" / "results.json", {"exact_match": accuracy([True])}
    merge_results(file, {"xnli": {"sw": score}}, {"step": 5})
    merged = merge_results(file, {"xnli": {"th": score}}, {"step": 5})
    assert set(merged["xnli"]) == {"sw", "th"} and json.loads(file.read_text()) == merged
    for number in (8, 9):  # another step's results leave the old ones where they can be found
        assert set(merge_results(file, {"xnli": {"en": score}}, {"step": number})["xnli"]) == {"en"}
    assert "json is of other settings (step): renamed to results.step5.json" in caplog.text
    kept = json.loads((tmp_path / "eval" / "results.step5.json").read_text())
    assert set(kept["xnli"]) == {"sw", "th"}
    assert (tmp_path / "eval" / "results.step8.json").is_file()
