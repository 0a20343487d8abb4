"""Rows, tokenizers, batches: what is read, what is refused, and that nothing gets lost."""

import json
import time
from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxfusion.data.batching import (
    TokenRow,
    collate,
    epoch_plan,
    find_bare_shapes,
    find_shapes,
    in_order,
    length_buckets,
    round_length,
    tokenize,
)
from jaxfusion.data.packing import find_packing, sizes, stratified_plan
from jaxfusion.data.pipeline import Batches, first_rows, iterate, subset
from jaxfusion.data.rows.examples import Example, read_examples
from jaxfusion.data.tasks.catalogue import TASKS, check_languages, get_task
from jaxfusion.errors import InputError


def write_sib(path, lines):
    file = path / "data" / "annotated" / "eng_Latn" / "train.tsv"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(["index_id\tcategory\ttext", *lines]) + "\n", "utf-8")


def read_sib(path):
    return read_examples("sib200", TASKS["sib200"], "train", "eng_Latn", str(path))


def test_tsv_rows_become_prompts_and_labels(tmp_path):
    write_sib(tmp_path, ['3\tsports\tHe said "run\r', "4\ttravel\tසිංහල"])
    first, second = read_sib(tmp_path)
    assert first == Example('He said "run', "sports", 3, "eng_Latn")
    assert second == Example("සිංහල", "travel", 1, "eng_Latn")


@pytest.mark.parametrize("line,message", [
    ("3\tsports", r"train\.tsv:3: 2 tab-separated fields, expected 3"),
    ("", r"train\.tsv:3: 0 tab-separated fields"),
    ("3\tsport\tx", r"train\.tsv:3: label 'sport' is not one of science/technology"),
    ("3\tsports\t  ", r"train\.tsv:3: column 'text' is empty"),
])
def test_a_malformed_row_is_named_with_file_and_line(tmp_path, line, message):
    write_sib(tmp_path, ["1\tsports\tfine", line, "2\tsports\tfine"])
    with pytest.raises(InputError, match=message):
        read_sib(tmp_path)


def test_other_encodings_and_missing_files_are_said(tmp_path):
    with pytest.raises(InputError, match=r"train\.tsv is missing"):
        read_sib(tmp_path)
    write_sib(tmp_path, [])
    with pytest.raises(InputError, match="is empty"):
        read_sib(tmp_path)
    file = tmp_path / "data" / "annotated" / "eng_Latn" / "train.tsv"
    file.write_bytes("index_id\tcategory\ttext\n1\tsports\tcafé\n".encode("latin-1"))
    with pytest.raises(InputError, match="is not UTF-8"):
        read_sib(tmp_path)


def test_jsonl_serves_every_task(tmp_path):
    rows = [{"premise": "a", "hypothesis": "b", "label": x} for x in (1, "2", "entailment")]
    file = tmp_path / "test-sw.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows), "utf-8")
    read = read_examples("xnli", TASKS["xnli"], "test", "sw", str(tmp_path))
    assert [x.label for x in read] == [1, 2, 0]
    assert read[0].query == "Premise: a Hypothesis: b Label: " and read[0].target == "Neutral"
    file.write_text('{"premise": "a", "label": 1}\n', "utf-8")
    with pytest.raises(InputError, match=r"column 'hypothesis' is missing"):
        read_examples("xnli", TASKS["xnli"], "test", "sw", str(tmp_path))
    file.write_text('{"premise": "a"\n', "utf-8")
    with pytest.raises(InputError, match=r"test-sw\.jsonl:1: not JSON"):
        read_examples("xnli", TASKS["xnli"], "test", "sw", str(tmp_path))


def test_unknown_tasks_and_languages_are_refused():
    with pytest.raises(InputError, match=r"unknown task 'xnly' \(did you mean 'xnli'\?\)"):
        get_task("xnly")
    with pytest.raises(InputError, match="has no language 'si'; it has en, ar"):
        check_languages("xnli", ("si",))


def test_real_xnli_splits_share_no_premise(real_data):
    seen = {}
    for split in ("train", "dev", "test"):
        rows = read_examples("xnli", TASKS["xnli"], split, "en", str(real_data / "xnli"))
        seen[split] = {row.query.split(" Hypothesis: ")[0] for row in rows}
        labels = [row.label for row in rows]
        assert len(rows) % 3 == 0 and labels.count(0) == labels.count(1) == labels.count(2)
    assert not (seen["train"] & seen["dev"] or seen["train"] & seen["test"])


# Batches

EXAMPLES = [Example(f"{'la ' * n}Label: ", "bako", 0) for n in (1, 3, 30, 2, 60, 8)]


def make_rows(tokenizers, **limits):
    limits = {"max_encoder_tokens": 200, "max_decoder_tokens": 50, **limits}
    return tokenize(EXAMPLES, tokenizers, text_prompt="", with_target=True, **limits)


def test_too_long_examples_are_counted_and_keep_their_end(tokenizers):
    whole, cut = make_rows(tokenizers)
    assert not cut.any
    rows, cut = make_rows(tokenizers, max_encoder_tokens=20, max_decoder_tokens=2)
    longer = sum(len(row.query) > 20 for row in whole)
    assert cut.queries == longer > 0 and cut.targets == len(EXAMPLES)
    assert all(row.query[-1] == tokenizers.encoder.eos_token_id for row in rows)
    assert max(len(row.query) for row in rows) == 20
    assert f"{longer} queries at 20 encoder tokens" in str(cut)


def test_a_question_at_the_end_is_kept(tokenizers):
    """Few-shot contexts behind a bridge lost their question."""
    asked = [Example("la ba " * 50 + f"Label: {x}", "bako", 0) for x in ("bako", "lala")]
    limits = {"text_prompt": "", "max_encoder_tokens": 12, "max_decoder_tokens": 9,
              "with_target": False}
    rows, cut = tokenize(asked, tokenizers, keeps_end=True, **limits)
    whole = tokenizers.encode_queries([x.query for x in asked])
    assert [row.query for row in rows] == [ids[-12:] for ids in whole] and cut.queries == 2
    assert rows[0].query != rows[1].query
    rows, _ = tokenize(asked, tokenizers, **limits)
    assert rows[0].query == rows[1].query


def test_a_target_takes_the_room_that_its_query_leaves(tokenizers):
    """LangBridge cuts both together, and puts no end token behind a target."""
    long = [Example("la", "bako " * 60, 0), Example("la " * 100, "bako " * 60, 0)]
    langbridge = replace(tokenizers, ends_targets=False)
    rows, cut = tokenize(long, langbridge, text_prompt="", with_target=True,
                         max_encoder_tokens=30, max_decoder_tokens=5, max_total_tokens=50)
    start = len(tokenizers.start)
    for row, example in zip(rows, long, strict=True):
        whole, = langbridge.encode_answers([""], [example.target])
        assert row.target == whole[: 50 - len(row.query) - start]
    assert cut.targets == 2 and tokenizers.eos not in rows[0].target
    assert tokenizers.ending == [tokenizers.eos] and langbridge.ending == []
    assert "targets at 50 tokens with their queries" in str(cut)
    full = [Example("la " * 100, "bako", 0)]
    rows, _ = tokenize(full, tokenizers, text_prompt="", with_target=True, max_encoder_tokens=40,
                       max_decoder_tokens=5, max_total_tokens=20)
    assert rows[0].target == []  # and no end of the target, counted from behind


def test_a_batch_holds_its_rows(tokenizers):
    rows, _ = make_rows(tokenizers)
    shapes = find_shapes(rows, (16, 32, 64, 128))
    batch = collate(*shapes.place(rows[:2], 1, 3), tokenizers)
    assert batch.enc_tokens.shape == (3, 16)
    for i, row in enumerate(rows[:2]):
        n, k = len(row.query), len(row.target)
        real = batch.dec_segments[i] == 1
        assert batch.enc_tokens[i][batch.enc_segments[i] == 1].tolist() == row.query
        expected = [-1, *range(n), 16, *[-1] * k]
        assert batch.dec_source[i][real].tolist() == expected
        assert batch.dec_tokens[i][real].tolist() == [1, *[0] * (n + 1), *row.target]
        assert batch.dec_positions[i][real].tolist() == list(range(n + 2 + k))
        # The slot before each target predicts it.
        slots = batch.target_slots[i][batch.target_mask[i]]
        assert batch.dec_tokens[i][slots + 1].tolist() == row.target
    assert not batch.enc_segments[2].any() and not batch.target_mask[2].any()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 9), st.integers(0, 5))
def test_an_epoch_sees_every_row_once(buckets, batch_size, epoch):
    plan = epoch_plan(np.array(buckets), batch_size, seed=3, epoch=epoch)
    assert sorted(np.concatenate(plan)) == list(range(len(buckets)))
    assert sorted(map(len, plan))[1:] == [batch_size] * (len(plan) - 1)


def test_epochs_differ_and_seeds_differ():
    plan = lambda seed, epoch: np.concatenate(  # noqa: E731
        epoch_plan(np.zeros(50, int), 5, seed, epoch)
    ).tolist()
    assert plan(0, 0) == plan(0, 0)
    assert plan(0, 0) != plan(0, 1) and plan(0, 0) != plan(1, 0)


def test_batches_resume_where_they_were(tokenizers):
    rows, _ = make_rows(tokenizers)
    batches = Batches(rows, find_shapes(rows, (16, 64, 128)), tokenizers, 4, seed=0, steps=9)
    everything = [batch.enc_tokens for batch in iterate(batches)]
    assert len(everything) == 9
    data = iterate(batches)
    for _ in range(4):
        next(data)
    resumed = iterate(batches)
    resumed.set_state(data.get_state())
    for batch, expected in zip(resumed, everything[4:], strict=True):
        assert np.array_equal(batch.enc_tokens, expected)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 70), st.integers(0, 9), st.integers(0, 4)), min_size=1))
def test_shapes_hold_every_row(lengths):
    rows = [TokenRow([5] * q, [6] * t, [7] * k) for q, t, k in lengths]
    shapes = find_shapes(rows, (8, 16, 32))
    for row in rows:
        bucket = shapes.bucket(row)
        assert len(row.query) <= shapes.buckets[bucket]
        assert len(row.text) + len(row.target) <= shapes.texts[bucket]
        assert len(row.target) <= shapes.targets


def test_evaluation_order_covers_all(tokenizers):
    rows, _ = make_rows(tokenizers)
    numbers = [n for n, _ in in_order(rows, find_shapes(rows, (16, 64, 128)), tokenizers, 4)]
    assert sorted(np.concatenate(numbers)) == list(range(len(rows)))
    full, rest = divmod(len(rows), 4)
    assert rest and [*map(len, numbers)] == [rest, *[4] * full]  # the short one is the cheapest
    bare = [TokenRow([], [3] * n, []) for n in (3, 40, 70)]
    shapes = find_bare_shapes(bare, length_buckets(100))
    assert shapes.buckets == (0, 0, 0) and shapes.texts == (32, 40, 80)
    assert length_buckets(200) == (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 200)
    assert length_buckets(20) == (20,)
    assert all(n <= round_length(n) <= max(8, 1.25 * n) for n in range(1, 2000))


def test_balanced_subset():
    examples = [Example("q", "t", label) for label in (0, 1, 2, 0, 0, 1, 2, 0)]
    labels = [x.label for x in subset(examples, 6, balanced=True, seed=1)]
    assert sorted(labels) == [0, 0, 1, 1, 2, 2]
    assert subset(examples, None, balanced=True, seed=0) == examples
    with pytest.raises(InputError, match=r"takes 3 rows of each.* 2 of class 1; .* to 6 or less"):
        subset(examples, 9, balanced=True, seed=0)
    with pytest.raises(InputError, match="only 8 rows"):
        subset(examples, 9, balanced=False, seed=0)


# Packing


def test_packed_rows_lose_nothing_and_fill_their_slots():
    rng = np.random.default_rng(0)
    # Lengths like XNLI's: about 45 tokens, a long tail.
    lengths = np.clip(rng.lognormal(3.7, 0.45, 2000).astype(int), 8, 200)
    rows = [TokenRow(list(range(2, 2 + n)), [], [7, 8, 9, 2]) for n in lengths]
    packing = find_packing(rows, 64, before=1, seed=0, longest_row=400)
    plan = stratified_plan(lengths, 64, seed=0, epoch=1)
    real = total = 0
    for numbers in plan[:-1]:
        groups, shape = packing.place([rows[i] for i in numbers], 1, 64)
        packed = sorted(id(row) for group in groups for row in group)
        assert packed == sorted(id(rows[i]) for i in numbers)
        used = [sum(sizes(row, 1) for row in group) for group in groups]
        assert (np.max(used, axis=0) <= [shape.slots, shape.length, shape.targets]).all()
        real += np.sum(used, axis=0)[:2].sum()
        total += shape.rows * (shape.slots + shape.length)
    assert real / total > 0.94


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 99), min_size=1, max_size=60), st.integers(1, 9), st.integers(0, 5))
def test_a_stratified_epoch_sees_every_row_once(lengths, batch_size, epoch):
    plan = stratified_plan(np.array(lengths), batch_size, seed=3, epoch=epoch)
    assert sorted(np.concatenate(plan)) == list(range(len(lengths)))
    assert max(map(len, plan)) <= batch_size and len(plan) == -(-len(lengths) // batch_size)


def test_rows_of_100_000_characters_are_cut_and_counted_soon(tokenizers):
    long = ["a" * 100_000, "la bako " * 12_500, "සිංහල " * 16_000, "\n" * 99_999 + "x"]
    clock = time.monotonic()
    rows, cut = tokenize([Example(text, "bako", 0) for text in long], tokenizers, text_prompt="",
                         with_target=True, max_encoder_tokens=50, max_decoder_tokens=50)
    assert time.monotonic() - clock < 8
    assert cut.queries >= 3 and max(len(row.query) for row in rows) == 50


def test_the_saved_position_is_of_the_batches_taken_not_of_those_on_the_devices(tokenizers):
    rows, _ = make_rows(tokenizers)
    batches = Batches(rows, find_shapes(rows, (16, 64, 128)), tokenizers, 2, seed=0, steps=9)
    put = []

    def on_device(batch):
        put.append(batch)
        return jax.device_put(batch.enc_tokens)

    data = iterate(batches, on_device)
    first = next(data)
    deadline = time.monotonic() + 10
    while len(put) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(put) > 1 and isinstance(first, jax.Array)  # the next one is there already
    again = iterate(batches, on_device)
    again.set_state(data.get_state())
    assert np.array_equal(next(again), batches[1].enc_tokens)


def test_the_first_rows_of_a_stream_are_balanced_if_asked():
    stream = [Example(str(i), "t", label) for i, label in enumerate((0, 0, 0, 1, 0, 1, 2, 2, 0))]
    taken = first_rows(iter(stream), 6, 3, balanced=True)
    assert [int(x.query) for x in taken] == [0, 1, 3, 5, 6, 7]
    assert first_rows(iter(stream), 4, 3, balanced=False) == stream[:4]
    assert first_rows(iter(stream), 4, 0, balanced=True) == stream[:4]  # free text has no classes
    for take in (lambda: first_rows(iter(stream), 2, 3, balanced=True),
                 lambda: subset(stream, 2, balanced=True, seed=0)):
        with pytest.raises(InputError, match="at least one row for each of the 3 classes"):
            take()
    with pytest.raises(InputError, match="too few of class 1"):
        first_rows(iter(stream), 9, 3, balanced=True)
    with pytest.raises(InputError, match="train_rows is 10, but the stream ended after 9"):
        first_rows(iter(stream), 10, 3, balanced=False)
