"""Parameters of a bridge that do not train: what they were in the run is what is scored, exported
and trained on.
"""

import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
from helpers import TEXTS, equal, make_config, next_logits, relative, theirs_of
from safetensors.numpy import load_file

from jaxfusion.bridge.job import prepare, train
from jaxfusion.errors import InputError
from jaxfusion.fields import GroupConfig
from jaxfusion.hf.load import SINGLE
from jaxfusion.runs.adopt import adopt
from jaxfusion.runs.export.bridge import export
from jaxfusion.runs.open_run import open_run
from jaxfusion.sharding.mesh import make_mesh
from jaxfusion.training.frozen import FROZEN_FILE
from jaxfusion.training.load import load_model


def config_of(cache_dir, *patterns, fusion="global_softmax", **fields):
    """A run of four steps in which only these parameters train."""
    config = make_config(cache_dir, f"{fusion},debug", train__steps=4, train__eval_every=4,
                         train__checkpoint_every=2, **fields)
    groups = {"bridge": GroupConfig(patterns, 1e-2, 0.0)}
    return replace(config, optimizer=replace(config.optimizer, groups=groups))


def params_of(workdir):
    """All parameters of a workdir's model, by path, and the model."""
    model = open_run(workdir).model
    return jax.device_get(model.frozen | model.trainable), model


def agrees(workdir, out):
    """Whether an export gives what the workdir's model gives."""
    model = params_of(workdir)[1]
    export(workdir, out)
    theirs, tokenizer = theirs_of(out)
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        found = theirs(**inputs).logits[:, -1].numpy()
    return relative(found, next_logits(model, model.tokenizers.encode_queries(TEXTS))) < 1e-5


def test_a_scale_that_does_not_train_goes_along(cache_dir, tmp_path, unscored):
    """The quickstart's `global_softmax`: `fusion/t` is in no checkpoint."""
    config = config_of(cache_dir, "fusion/w", "projector/.*")
    train(config, tmp_path / "run")
    assert agrees(tmp_path / "run", tmp_path / "out")
    t = load_file(tmp_path / "out" / SINGLE)["fusion.t"]
    assert t == np.float32(1e-5)
    adopt(str(tmp_path / "out"), tmp_path / "again")
    assert equal(params_of(tmp_path / "again")[0], params_of(tmp_path / "run")[0])
    export(tmp_path / "again", tmp_path / "twice")
    assert (tmp_path / "out" / SINGLE).read_bytes() == (tmp_path / "twice" / SINGLE).read_bytes()
    # A workdir of an earlier release has no such file: the start is the seed's.
    (tmp_path / "run" / FROZEN_FILE).unlink()
    export(tmp_path / "run", tmp_path / "earlier")
    assert (tmp_path / "out" / SINGLE).read_bytes() == (tmp_path / "earlier" / SINGLE).read_bytes()


@pytest.mark.slow
def test_a_second_stage_keeps_what_the_first_has_trained(cache_dir, tmp_path):
    """Frozen in the second stage: trained in the first, in the bridge and in a backbone, or the
    start of the first one's seed."""
    first = config_of(cache_dir, "fusion/w", "encoder/final_norm/.*", train__seed=1)
    train(first, tmp_path / "first")
    before, _ = params_of(tmp_path / "first")
    second = config_of(cache_dir, "projector/end", train__init_from=str(tmp_path / "first"))
    second = replace(second, encoder=first.encoder, decoder=first.decoder)
    train(replace(second, train=replace(second.train, steps=2)), tmp_path / "second")
    shutil.rmtree(tmp_path / "first")  # nothing else is needed from now on
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        run = prepare(second, mesh, fresh=False, workdir=tmp_path / "second")
    train(second, tmp_path / "second")  # goes on
    after, _ = params_of(tmp_path / "second")
    changed = {path for path in after if not np.array_equal(after[path], before[path])}
    assert changed == {"projector/end"}
    assert equal(jax.device_get(run.frozen), {path: after[path] for path in run.frozen})
    fresh = load_model(second, mesh).frozen
    assert not np.array_equal(fresh["projector/out/kernel"], after["projector/out/kernel"])
    assert not np.array_equal(fresh["encoder/final_norm/scale"],
                              after["encoder/final_norm/scale"])
    assert agrees(tmp_path / "second", tmp_path / "out")
    (tmp_path / "second" / FROZEN_FILE).unlink()
    for use in (params_of, lambda workdir: export(workdir, tmp_path / "other")):
        with pytest.raises(InputError, match=r"first, which is not there.*put .* back"):
            use(tmp_path / "second")


@pytest.mark.slow
def test_a_warm_start_that_does_not_train_is_kept(cache_dir, tmp_path):
    config = config_of(cache_dir, "fusion/w", projector__warm_start=True)
    train(config, tmp_path / "run")
    after, _ = params_of(tmp_path / "run")
    fresh = load_model(config, make_mesh()).frozen
    assert not np.array_equal(fresh["projector/out/kernel"], after["projector/out/kernel"])
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        start = prepare(config, mesh)
    assert np.array_equal(start.frozen["projector/out/kernel"], after["projector/out/kernel"])
    assert agrees(tmp_path / "run", tmp_path / "out")


def test_damage_of_what_was_frozen_is_told(cache_dir, tmp_path, unscored):
    train(config_of(cache_dir, "projector/.*", fusion="global_softmax"), tmp_path / "run")
    (tmp_path / "run" / FROZEN_FILE).write_bytes(b"no tensors")
    with pytest.raises(InputError, match=r"frozen\.safetensors is damaged"):
        params_of(tmp_path / "run")
    with pytest.raises(InputError, match=r"frozen\.safetensors is damaged"):
        export(tmp_path / "run", tmp_path / "out")
