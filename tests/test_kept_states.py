"""Kept states of a frozen encoder: the same losses and scores as without, and each text read once.
"""

import logging
from dataclasses import replace

import jax
import numpy as np
import pytest
from helpers import equal, make_config, relative

from jaxfusion.bridge.job import prepare
from jaxfusion.errors import InputError
from jaxfusion.evaluation import kept_states
from jaxfusion.evaluation.kept_states import KeptStates, keep_states
from jaxfusion.sharding.mesh import make_mesh
from jaxfusion.training.state import merge
from jaxfusion.training.step import gradient
from jaxfusion.training.trainer import put_batch


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(kept_states, "cache_dir", lambda: tmp_path / "cache")
    kept_states._kept.cache_clear()


def run_of(cache_dir, words, keep, **fields):
    return prepare(make_config(cache_dir, words, encoder__keep_states=keep, **fields), make_mesh())


def steps_of(run, steps=3):
    """Loss and gradients of the first batches, all with the same key."""
    step = jax.jit(lambda *x: gradient(run.loss, *x))
    return [jax.device_get(step(run.trainable, run.frozen, put_batch(run.batches[i], make_mesh()),
                                jax.random.key(0))) for i in range(steps)]


@pytest.mark.parametrize(("words", "fields"), [
    pytest.param("last,debug", {"data__pack": True}, marks=pytest.mark.slow),
    pytest.param("last,debug", {"fusion__name": "layer", "fusion__layer": 1},
                 marks=pytest.mark.slow),
    pytest.param("global_softmax,debug", {"data__pack": True}, marks=pytest.mark.slow),
    pytest.param("global_softmax,debug", {"fusion__backward": "second_pass"},
                 marks=pytest.mark.slow),
    ("transformer_softmax,debug", {"fusion__dropout": 0.1}),
    pytest.param("global_softmax,debug", {"fusion__noise": 0.3}, marks=pytest.mark.slow),
    pytest.param("last,debug", {"encoder__dtype": "bfloat16"}, marks=pytest.mark.slow),
])
def test_losses_gradients_and_scores_are_those_without(cache_dir, words, fields, monkeypatch):
    plain = run_of(cache_dir, words, 0.0, **fields)
    kept = run_of(cache_dir, words, 0.1, **fields)
    assert plain.batches[0].enc_states is None and kept.batches[0].enc_states is not None
    # The states come from batches of other shapes; bfloat16 rounds them otherwise.
    within = 2e-2 if "encoder__dtype" in fields else 1e-5
    for (loss, count, grads), (loss_kept, count_kept, grads_kept) in zip(
            steps_of(plain), steps_of(kept), strict=True):
        assert relative(loss_kept, loss) < within and count == count_kept
        for path, grad in grads.items():
            assert np.abs(grads_kept[path] - grad).max() <= within * np.abs(grad).max() + 1e-7
    assert plain.score(plain.trainable) == kept.score(kept.trainable)


def test_each_text_is_read_once_in_a_process(cache_dir, monkeypatch):
    """By whatever fusion reads the same layers, in every epoch; a resumed run has the same bits."""
    reads = []
    add = KeptStates.add

    def counted(self, params, rows, tokenizers):
        before = self.used
        found = add(self, params, rows, tokenizers)
        reads.append(self.used - before)
        return found

    monkeypatch.setattr(KeptStates, "add", counted)
    first = run_of(cache_dir, "global_softmax,debug", 0.1)
    second = run_of(cache_dir, "transformer_softmax,debug", 0.1)
    assert reads[0] > 0 and reads[1] == 0
    states = [run.batches[0].enc_states for run in (first, second)]
    assert np.array_equal(*states)
    kept_states._kept.cache_clear()
    again = run_of(cache_dir, "global_softmax,debug", 0.1)
    assert np.array_equal(states[0], again.batches[0].enc_states) and reads[2] == reads[0]
    run_of(cache_dir, "last,debug", 0.1)
    assert reads[3] == reads[0]  # other layers


def test_another_encoders_states_are_not_taken(cache_dir):
    run = run_of(cache_dir, "last,debug", 0.1)
    params = merge(run.trainable, run.frozen)
    before = kept_states._content(params["encoder"])
    other = jax.tree.map(lambda x: x, params["encoder"])
    other["embed"]["embedding"] = other["embed"]["embedding"].at[5, 0].add(1e-2)
    assert kept_states._content(other) != before


def test_what_does_not_fit_is_said_and_computed(cache_dir, caplog):
    with caplog.at_level(logging.WARNING, "jaxfusion"):
        run = run_of(cache_dir, "last,debug", 1e-5)
    assert run.batches[0].enc_states is None
    assert "more than encoder.keep_states = 0.0" in caplog.text and "texts take" in caplog.text
    assert steps_of(run, 1)[0][0] > 0


def test_a_disk_that_is_full_is_said_and_nothing_half_kept(cache_dir, monkeypatch, caplog):
    """Texts of the batches before the failure are read again, not taken from holes in the file."""
    class Full:
        def __init__(self, file, room):
            self.file, self.room = file, room

        def write(self, data):
            self.room -= len(data)
            if self.room < 0:
                raise OSError(28, "No space left on device")
            return self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

    start, made = KeptStates.__init__, []

    def full(self, *args):
        start(self, *args)
        self.file = Full(self.file, 100_000)
        made.append(self)

    monkeypatch.setattr(KeptStates, "__init__", full)
    with caplog.at_level(logging.WARNING, "jaxfusion"):
        assert run_of(cache_dir, "last,debug", 0.1).batches[0].enc_states is None
    assert "No space left" in caplog.text and made[0].places == {} and made[0].used == 0


def test_a_cache_directory_that_cannot_be_is_said(cache_dir, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(kept_states, "cache_dir", lambda: tmp_path / "file" / "cache")
    with caplog.at_level(logging.WARNING, "jaxfusion"):
        assert run_of(cache_dir, "last,debug", 0.1).batches[0].enc_states is None
    assert "cannot be kept in" in caplog.text


@pytest.mark.parametrize(("fields", "why"), [
    ({"encoder__dropout": 0.1}, "encoder.dropout is 0.1"),
    ({"optimizer__groups": {"all": {"patterns": ("(encoder/embed|projector)/.*",),
                                    "learning_rate": 1e-3, "weight_decay": 0.0}}},
     "parameters of it are trained"),
    ({"aligner__name": "mlp", "aligner__recipe": "paper_code"}, "reads padding"),
])
def test_states_that_change_are_not_kept(cache_dir, fields, why):
    with pytest.raises(InputError, match=why):
        run_of(cache_dir, "last,debug", 0.1, **fields)


def test_padding_has_no_states(cache_dir):
    run = run_of(cache_dir, "global_softmax,debug", 0.1)
    batch = run.batches[0]
    assert (batch.enc_states[batch.enc_segments == 0] == 0).all()
    assert (np.abs(batch.enc_states[batch.enc_segments != 0]).max(axis=(1, 2)) > 0).all()
    none = replace(batch, enc_states=None)
    assert equal(vars(none)["enc_tokens"], batch.enc_tokens)
    assert keep_states(None, {}, [], None, 0.0) is None
