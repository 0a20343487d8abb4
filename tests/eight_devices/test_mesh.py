"""Meshes of eight devices: where every parameter lies, and that all of them train alike."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import leave_unscored, losses

from configs.common import finish
from jaxfusion.bridge.job import train
from jaxfusion.config import default_config, from_config_dict
from jaxfusion.data.rows.examples import Example
from jaxfusion.data.tasks.spec import Task
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
from jaxfusion.training.build import plan_model

GOLDEN = Path(__file__).with_name("specs.json")
MESHES = {"one": (1, 1, 1), "data": (8, 1, 1), "fsdp": (1, 8, 1), "tensor": (1, 1, 8),
          "all": (2, 2, 2)}


def plan(mesh, encoder="google/mt5-xl", decoder="meta-llama/Llama-2-7b-hf"):
    config = default_config()
    config.eval.max_encoder_tokens = 200
    config.projector.name, config.mesh.data = "ffn", 1
    shapes = {"encoder": backbone_shape("encoder", encoder),
              "decoder": backbone_shape("decoder", decoder)}
    return plan_model(from_config_dict(config), shapes, mesh)


ENCODERS = ("google/mt5-xl", "google-bert/bert-base-multilingual-cased", "BAAI/bge-m3",
            "facebook/nllb-200-distilled-600M", "jhu-clsp/mmBERT-base")


def test_every_parameter_lies_where_it_did():
    """The golden tables; after an intended change of a spec, write what this test shows there."""
    found = {
        encoder: {path: [str(leaf.shape), str(tuple(leaf.sharding.spec))]
                  for path, leaf in sorted(plan(make_mesh(1, 4, 2), encoder).params.items())
                  if encoder == ENCODERS[0] or path.startswith("encoder/")}
        for encoder in ENCODERS}
    assert found == json.loads(GOLDEN.read_text("utf-8")), json.dumps(found)


@pytest.mark.parametrize("name", [
    "meta-llama/Llama-2-7b-hf", "meta-llama/Llama-3.1-8B-Instruct", "meta-math/MetaMath-7B-V1.0",
    "Qwen/Qwen2.5-7B-Instruct", "microsoft/Phi-3.5-mini-instruct", *ENCODERS[1:],
])
def test_no_large_parameter_lies_whole_on_every_device(name):
    towers = {"encoder" if name in ENCODERS else "decoder": name}
    for path, leaf in plan(make_mesh(1, 4, 2), **towers).params.items():
        held = math.prod(leaf.sharding.shard_shape(leaf.shape))
        size = math.prod(leaf.shape)
        assert held < size or size * leaf.dtype.itemsize <= 1 << 20, (path, leaf)


def test_what_a_mesh_cannot_do_is_said(caplog):
    with pytest.raises(InputError, match=r"mesh.tensor is 8, .* the 28 heads of the decoder"):
        plan(make_mesh(1, 1, 8), decoder="Qwen/Qwen2.5-7B-Instruct")
    plan(make_mesh(1, 1, 8), decoder="microsoft/Orca-2-7b")
    assert "replicated, as mesh" in caplog.text and "vocab (32003)" in caplog.text
    caplog.clear()
    plan(make_mesh(1, 1, 8), decoder="meta-llama/Llama-3.1-8B-Instruct")
    assert "replicated, as" not in caplog.text


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


def make_config(towers, **fields):
    config = finish(default_config(), "transformer_softmax,debug").unlock()
    for role in ROLES:
        config[role].checkpoint = str(towers / role)
    config.data.dev_rows = 8
    config.train.steps = config.train.eval_every = config.train.checkpoint_every = 6
    config.train.log_every = 1
    config.optimizer.groups.bridge.learning_rate = 1e-3
    config.fusion.dropout = 0.0
    for name, value in fields.items():
        config.train[name] = value
    return make_inputs(from_config_dict(config))


def train_on(sizes, config, workdir, stop=None):
    """The loss of every step on a mesh of the first devices; with `stop`, up to that step."""
    devices = jax.devices()[: math.prod(sizes)]
    with pytest.MonkeyPatch.context() as patch:
        leave_unscored(patch)
        patch.setattr(workdirs, "make_mesh", lambda **_: make_mesh(*sizes, devices=devices))
        if stop is not None:
            patch.setattr(hooks.Signals, "should_stop", lambda self, step: step == stop)
            with pytest.raises(Stopped):
                train(config, workdir)
        else:
            train(config, workdir)
    return losses(workdir)


@pytest.fixture(scope="module")
def runs(towers, cache_dir, tmp_path_factory):
    """A folder of runs of six steps, by the name of their mesh, and their losses."""
    folder, config = tmp_path_factory.mktemp("meshes"), make_config(towers)
    return folder, {name: train_on(MESHES[name], config, folder / name)
                    for name in ("one", "tensor", "all")}


def check_alike(found):
    for name in found:
        worst = max(abs(found[name][i] / found["one"][i] - 1) for i in found["one"])
        assert worst < 1e-5, (name, worst)


def test_meshes_train_alike(runs):
    _, found = runs
    assert len(found["one"]) == 6 and found["one"][6] < 0.95 * found["one"][1]
    check_alike(found)


@pytest.mark.slow
def test_all_meshes_train_alike_for_longer(towers, cache_dir, tmp_path):
    config = make_config(towers, steps=20)
    found = {name: train_on(MESHES[name], config, tmp_path / name) for name in MESHES}
    assert len(found["one"]) == 20 and found["one"][20] < 0.9 * found["one"][1]
    check_alike(found)


def test_a_run_goes_on_elsewhere(runs, towers, tmp_path):
    """Another mesh, in parts, half the precision of what is frozen: the same batches."""
    whole = runs[1]["one"]
    train_on((2, 2, 2), make_config(towers), tmp_path / "run", stop=3)
    again = train_on((1, 4, 1), make_config(towers, accumulate=2), tmp_path / "run")
    assert max(abs(again[i] / whole[i] - 1) for i in whole) < 1e-5
    config = make_config(towers, steps=8)
    config = replace(config, encoder=replace(config.encoder, dtype="bfloat16"))
    more = train_on((1, 1, 4), config, tmp_path / "run")
    assert list(more) == list(range(1, 9)) and all(abs(more[i] - more[6]) < 1 for i in (7, 8))


@pytest.mark.parametrize("axes", [("fsdp", "tensor"), ("tensor", "fsdp"), (None, "fsdp")])
def test_digests_do_not_depend_on_how_an_array_is_split(axes):
    """A checkpoint is checked on another mesh than the one that saved it."""
    x = np.random.default_rng(0).standard_normal((16, 24)).astype(np.float32)
    mesh = make_mesh(1, 4, 2)
    with jax.set_mesh(mesh):
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
        found = digest.sums_on_device(jax.device_put(x, place))
        assert found.is_fully_replicated
        np.testing.assert_array_equal(found, digest.sums_on_host(x))


def test_scores_do_not_depend_on_the_mesh(runs, tmp_path):
    workdir = shutil.copytree(runs[0] / "all", tmp_path / "run")
    asked = {"limit": 12, "languages": ("en", "ar"),
             "decoding": {"temperature": 0.8, "top_p": 0.9, "max_new_tokens": 4}}
    results, details = evaluate(workdir, **asked)
    (scores,) = results.values()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_run, "make_mesh", lambda **_: make_mesh(devices=jax.devices()[:1]))
        alone, same = evaluate(workdir, **asked)
    assert {name: alone[name] for name in results} == results
    for part in ("correct", "answers"):
        found, wanted = ([y[part] for task in x.values() for y in task.values()]
                         for x in (details, same))
        assert found == wanted
    assert list(scores) == ["en", "ar"]
    assert all(x["likelihood"]["n"] == 12 for x in scores.values())


@pytest.mark.slow
def test_free_answers_do_not_depend_on_the_mesh(runs):
    """Rows of a batch that is split over devices make room for others."""
    task = Task("{text}", (), ("en",))
    rows = [Example("la ru " * (1 + i % 7), "", -1) for i in range(27)]

    def answers() -> list[str]:
        run = open_run.open_run(runs[0] / "all", {
            "temperature": 0.8, "max_new_tokens": 6, "batch_size": 8})
        with run.on_mesh():
            return run.scorer(task)(run.params, rows, task).answers

    found = answers()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_run, "make_mesh", lambda **_: make_mesh(devices=jax.devices()[:1]))
        assert answers() == found
    assert len(set(found)) > 5
