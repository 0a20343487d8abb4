"""Unlabelled text: how it is split, what is refused, and a run on it."""

import json
import shutil
import time
from dataclasses import replace

import jax
import ml_collections
import numpy as np
import pytest

from configs.common import finish
from jaxfusion.bridge.compare import check_comparison
from jaxfusion.bridge.job import train
from jaxfusion.config import default_config, from_config_dict
from jaxfusion.data.batching import Ragged
from jaxfusion.data.pipeline import Batches, iterate
from jaxfusion.data.rows.examples import Example
from jaxfusion.data.split_text import tokenize_texts
from jaxfusion.errors import InputError
from jaxfusion.fields import CompareConfig
from jaxfusion.miniatures.inputs import make_inputs
from jaxfusion.runs.score import evaluate

TEXTS = ["la bako mi " * n for n in (1, 20, 60, 200)] + ["සිංහල  text\n\nwith  “marks” " * 30, "x"]


def continue_texts(tokenizers, **kwargs):
    kwargs = {"max_encoder_tokens": 64, "max_decoder_tokens": 16, "seed": 3, **kwargs}
    return tokenize_texts([Example(text, "", -1) for text in TEXTS], tokenizers, **kwargs)


def test_the_two_parts_of_a_text_are_the_text(tokenizers):
    texts = continue_texts(tokenizers)
    assert texts.short == 1 and len(texts) == 5  # 'x' cannot be split
    eos = tokenizers.encoder.eos_token_id
    for epoch in range(3):
        for i, row in enumerate(split := texts.at(epoch)):
            head, rest = split.parts(i)
            assert head + rest == TEXTS[i] and rest
            whole = tokenizers.encoder(TEXTS[i], add_special_tokens=False)["input_ids"]
            assert row.query == [*whole[: len(row.query) - 1], eos]
            assert 2 <= len(row.query) <= 64 and len(row.query) == split.lengths[i]
            assert row.target == tokenizers.encode_texts([rest])[0][:16] and row.target
            assert len(row.query) >= min(32, len(whole))


def test_splits_are_fresh_in_every_epoch_and_the_same_again(tokenizers):
    texts = continue_texts(tokenizers)
    lengths = [texts.at(epoch).lengths.tolist() for epoch in range(4)]
    assert lengths == [continue_texts(tokenizers).at(e).lengths.tolist() for e in range(4)]
    assert len({tuple(x) for x in lengths}) == 4
    assert lengths[0] != continue_texts(tokenizers, seed=4).at(0).lengths.tolist()
    ids, begins = Ragged(), Ragged()
    for _ in range(5000):
        ids.append(texts.ids[3])
        begins.append(texts.begins[3])
    many = replace(texts, ids=ids, begins=begins, texts=texts.texts[3:4] * 5000)
    drawn = np.bincount(many.at(0).lengths, minlength=65)[32:]
    assert drawn.sum() == 5000 and drawn.min() > 90 and drawn.max() < 220  # evenly, 152 each


def test_batches_of_continued_text_resume_and_fit_their_shapes(tokenizers):
    texts = continue_texts(tokenizers)
    batches = Batches(texts, texts.shapes((40, 48)), tokenizers, 2, seed=0, steps=9)
    everything = [batch.dec_tokens for batch in iterate(batches)]
    assert {batch.shape[1] for batch in everything} <= {1 + s + 1 + 16 for s in (40, 48, 64)}
    resumed = iterate(batches)
    for _ in range(4):
        next(resumed)
    again = iterate(batches)
    again.set_state(resumed.get_state())
    for batch, expected in zip(again, everything[4:], strict=True):
        assert np.array_equal(batch.dec_tokens, expected)


def test_long_texts_are_split_soon(tokenizers):
    long = ["a" * 100_000, "la bako " * 12_500, "සිංහල " * 16_000]
    clock = time.monotonic()
    texts = tokenize_texts([Example(text, "", -1) for text in long], tokenizers,
                           max_encoder_tokens=50, max_decoder_tokens=50, seed=0)
    assert all(len(row.target) == 50 for row in texts.at(0))
    assert time.monotonic() - clock < 6
    with pytest.raises(InputError, match="none of the 2 texts has two encoder tokens"):
        tokenize_texts([Example("x", "", -1)] * 2, tokenizers, max_encoder_tokens=9,
                       max_decoder_tokens=9, seed=0)


def make_config(folder, **data):
    """A debug run of 4 steps on the text files of a directory."""
    config = default_config()
    config.tasks = {"plain": {"prompt": "{text}", "unlabelled": True,
                              "source": str(folder / "{split}.jsonl")}}
    config.data.task = "plain"
    config = finish(config, "last,debug").unlock()
    config.data.path = ml_collections.config_dict.placeholder(str)
    config.data.max_encoder_tokens, config.data.buckets = 40, (40,)
    config.data.max_decoder_tokens = 16
    config.train.steps, config.train.log_every = 4, 1
    config.train.eval_every = config.train.checkpoint_every = 2
    config.data.update(data)
    return make_inputs(from_config_dict(config))


def test_a_run_on_text_resumes_exactly_and_is_kept_by_its_likelihood(tmp_path, cache_dir):
    for split, number in (("train", 12), ("dev", 5)):
        lines = [json.dumps({"text": f"la bako mi {i} " * (i + 5)}) for i in range(number)]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    config, workdir = make_config(tmp_path), tmp_path / "run"
    whole = jax.device_get(train(config, workdir))
    found = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    scores = [x["dev/log_likelihood"] for x in found if "dev/log_likelihood" in x]
    assert len(scores) == 2 and -12 < scores[0] < scores[1] < 0
    # From step 3 on it is the second epoch, which splits the same texts elsewhere.
    shutil.rmtree(workdir / "checkpoints" / "4")
    again = jax.device_get(train(config, workdir))
    assert int(again.step) == 4
    assert jax.tree.all(jax.tree.map(np.array_equal, whole.trainable, again.trainable))
    with pytest.raises(InputError, match="task 'plain' is unlabelled text and cannot be scored"):
        evaluate(workdir)


@pytest.mark.parametrize("data", [{"pack": True}, {"text_prompt": "Go on:"}])
def test_what_makes_no_sense_for_text_is_refused(tmp_path, cache_dir, data):
    with pytest.raises(InputError, match=r"leave data\.pack, text_prompt and chat_template out"):
        train(make_config(tmp_path, **data), tmp_path / "run")
    config = make_config(tmp_path)
    with pytest.raises(InputError, match="'plain' is text to learn from, where nothing can be com"):
        check_comparison(CompareConfig(base=config), {"a": config})


@pytest.mark.parametrize("prefix", ["ba du ", "ba du fe ru " * 5])
def test_a_prefix_stands_in_front_of_every_split(prefix, tokenizers):
    """Also one that is longer than the least length of a split."""
    told = replace(tokenizers, query_prefix=prefix)
    texts = TEXTS[1:4]
    before = len(told.encoder(prefix, add_special_tokens=False)["input_ids"])
    split = tokenize_texts([Example(x, "", -1) for x in texts], told, max_encoder_tokens=90,
                           max_decoder_tokens=16, seed=0).at(0)
    for i, row in enumerate(split):
        read, rest = split.parts(i)
        whole = told.encode_queries([read.rstrip()])[0]
        assert row.query == whole and len(whole) == split.lengths[i] > before + 1
        assert read and rest and read + rest == split.whole.texts[i]
    with pytest.raises(InputError, match=r"within data\.max_encoder_tokens = 9: nothing to split"):
        tokenize_texts([Example(x, "", -1) for x in texts], replace(
            tokenizers, query_prefix="ba du fe ru " * 12), max_encoder_tokens=9,
            max_decoder_tokens=16, seed=0)
