"""Meshes of eight devices: where every parameter lies, and that all of them train alike."""

import json
import math
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from configs.common import finish
from jaxfusion.bridge import job as bridge
from jaxfusion.bridge.job import train
from jaxfusion.config import default_config, from_config_dict
from jaxfusion.errors import InputError, Stopped
from jaxfusion.fields import ROLES
from jaxfusion.hf.known_shapes import backbone_shape
from jaxfusion.miniatures.checkpoints import SIZES, write_checkpoints
from jaxfusion.miniatures.inputs import make_inputs
from jaxfusion.runs import open_run
from jaxfusion.runs.score import evaluate
from jaxfusion.sharding.mesh import make_mesh
from jaxfusion.training import digest, hooks
from jaxfusion.training import workdir as workdirs
from jaxfusion.training.state import plan_model

GOLDEN = Path(__file__).with_name("specs.json")
MESHES = {"one": (1, 1, 1), "data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 1, 8),
          "all": (2, 2, 2)}


def plan(mesh, encoder="google/mt5-xl", decoder="meta-llama/Llama-2-7b-hf"):
    config = default_config()
    config.projector.name, config.mesh.data = "ffn", 1
    shapes = {"encoder": backbone_shape("encoder", encoder),
              "decoder": backbone_shape("decoder", decoder)}
    return plan_model(from_config_dict(config), shapes, mesh)


def test_every_parameter_lies_where_it_did():
    """The golden table; when a spec is meant to change, write it anew with what this test shows."""
    found = {path: [str(leaf.shape), str(tuple(leaf.sharding.spec))]
             for path, leaf in sorted(plan(make_mesh(1, 4, 2)).params.items())}
    assert found == json.loads(GOLDEN.read_text("utf-8")), json.dumps(found)


@pytest.mark.parametrize("decoder", [
    "meta-llama/Llama-2-7b-hf", "meta-llama/Llama-3.1-8B-Instruct", "meta-math/MetaMath-7B-V1.0",
    "Qwen/Qwen2.5-7B-Instruct", "microsoft/Phi-3.5-mini-instruct",
])
def test_no_large_parameter_lies_whole_on_every_device(decoder):
    for path, leaf in plan(make_mesh(1, 4, 2), decoder=decoder).params.items():
        held = math.prod(leaf.sharding.shard_shape(leaf.shape))
        size = math.prod(leaf.shape)
        assert held < size or size * leaf.dtype.itemsize <= 1 << 20, (path, leaf)


def test_what_a_mesh_cannot_do_is_said(caplog):
    with pytest.raises(InputError, match=r"mesh.tensor is 8, .* the 28 heads of the decoder"):
        plan(make_mesh(1, 1, 8), decoder="Qwen/Qwen2.5-7B-Instruct")
    plan(make_mesh(1, 1, 8), decoder="microsoft/Orca-2-7b")
    assert "held whole, as mesh" in caplog.text and "vocab (32003)" in caplog.text
    caplog.clear()
    plan(make_mesh(1, 1, 8), decoder="meta-llama/Llama-3.1-8B-Instruct")
    assert "held whole" not in caplog.text


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """Tiny towers with eight heads, and fewer of keys."""
    path = tmp_path_factory.mktemp("towers") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        encoder, decoder = SIZES["tiny"]
        patch.setitem(SIZES, "eight", (
            replace(encoder, num_heads=8, head_dim=8),
            replace(decoder, num_heads=8, num_kv_heads=2, head_dim=8)))
        write_checkpoints(path, "eight")
    return path


def make_config(towers, arg, **fields):
    config = finish(default_config(), f"{arg},debug").unlock()
    for role in ROLES:
        config[role].checkpoint = str(towers / role)
    config.data.dev_rows = 8
    config.train.steps = config.train.eval_every = config.train.checkpoint_every = 20
    config.train.log_every = 1
    config.optimizer.groups.bridge.learning_rate = 1e-3
    config.fusion.dropout = 0.0
    for name, value in fields.items():
        config.train[name] = value
    return make_inputs(from_config_dict(config))


def losses(config, workdir, sizes, monkeypatch):
    """The loss of every step on a mesh of the first so many devices."""
    devices = jax.devices()[: math.prod(sizes)]
    monkeypatch.setattr(bridge, "_dev_scorer", lambda *_: lambda _: {"exact_match": 0.0})
    monkeypatch.setattr(workdirs, "make_mesh", lambda **_: make_mesh(*sizes, devices=devices))
    train(config, workdir)
    lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {x["step"]: x["loss"] for x in lines if "loss" in x}


def test_all_meshes_train_alike(towers, cache_dir, tmp_path, monkeypatch):
    config = make_config(towers, "transformer_softmax")
    found = {name: losses(config, tmp_path / name, sizes, monkeypatch)
             for name, sizes in MESHES.items()}
    assert len(found["one"]) == 20 and found["one"][20] < 0.9 * found["one"][1]
    for name in MESHES:
        worst = max(abs(found[name][i] / found["one"][i] - 1) for i in found["one"])
        assert worst < 1e-5, (name, worst)


def test_a_run_goes_on_elsewhere(towers, cache_dir, tmp_path, monkeypatch):
    """Another mesh, in parts, half the precision of what is frozen: the same batches."""
    whole = losses(make_config(towers, "last"), tmp_path / "whole", (1, 1, 1), monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(hooks.Signals, "stop", lambda self, step: step == 10)
        with pytest.raises(Stopped):
            losses(make_config(towers, "last"), tmp_path / "run", (2, 2, 2), patch)
    config = make_config(towers, "last", accumulate=2)
    again = losses(config, tmp_path / "run", (1, 4, 1), monkeypatch)
    assert max(abs(again[i] / whole[i] - 1) for i in whole) < 1e-5
    config = make_config(towers, "last", steps=22)
    config = replace(config, encoder=replace(config.encoder, dtype="bfloat16"))
    more = losses(config, tmp_path / "run", (1, 1, 4), monkeypatch)
    assert list(more) == list(range(1, 23)) and all(abs(more[i] - more[20]) < 1 for i in (21, 22))


@pytest.mark.parametrize("axes", [("fsdp", "tensor"), ("tensor", "fsdp"), (None, "fsdp")])
def test_digests_do_not_depend_on_how_an_array_is_split(axes):
    """Finding 31: a checkpoint is checked on another mesh than the one that saved it."""
    x = np.random.default_rng(0).standard_normal((16, 24)).astype(np.float32)
    mesh = make_mesh(1, 4, 2)
    with jax.set_mesh(mesh):
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        found = digest.sums_on_device(jax.device_put(x, place))
        assert found.is_fully_replicated
        np.testing.assert_array_equal(found, digest.sums_on_host(x))


def test_scores_do_not_depend_on_the_mesh(towers, cache_dir, tmp_path, monkeypatch):
    config = make_config(towers, "transformer_softmax", steps=2)
    losses(config, tmp_path / "run", (1, 2, 4), monkeypatch)
    drawn = {"temperature": 0.8, "top_p": 0.9, "max_new_tokens": 4}
    results, details = evaluate(tmp_path / "run", limit=12, decoding=drawn)
    (scores,) = results.values()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_run, "make_mesh", lambda **_: make_mesh(devices=jax.devices()[:1]))
        alone, same = evaluate(tmp_path / "run", limit=12, decoding=drawn)
    assert {name: alone[name] for name in results} == results
    for part in ("correct", "answers"):
        found, wanted = ([y[part] for task in x.values() for y in task.values()]
                         for x in (details, same))
        assert found == wanted
    assert next(iter(scores.values()))["likelihood"]["n"] == 12
