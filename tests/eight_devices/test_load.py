"""Checkpoints read onto meshes of eight devices: each device gets its block and no more."""

import math
from dataclasses import replace

import jax
import numpy as np
import pytest
from helpers import DECODERS, plain, relative

from jaxfusion.hf.load import load_params
from jaxfusion.hf.save import write_tower
from jaxfusion.hf.tables import tower_table
from jaxfusion.miniatures.checkpoints import random_params
from jaxfusion.nn.decoder import Decoder
from jaxfusion.sharding.mesh import make_mesh
from jaxfusion.training.build import describe
from jaxfusion.training.state import merge

MESHES = {"fsdp": (1, 8, 1), "fsdp-tensor": (1, 2, 4), "all": (2, 2, 2)}


def read(path, config, mesh):
    """The checkpoint's parameters as they lie on the mesh."""
    wanted = describe(lambda: Decoder(config).init(
        jax.random.key(0), *(np.zeros((1, 8), np.int32),) * 3, method="score")["params"], mesh)
    return load_params(path, tower_table(config), wanted)


@pytest.mark.parametrize("case,mesh", [
    *((case, "all") for case in ("llama3", "phi3", "qwen25_window", "gemma3")),
    ("phi3", "fsdp"), ("phi3", "fsdp-tensor"),
])
def test_every_device_gets_its_block(case, mesh, tmp_path):
    config, mesh = DECODERS[case], make_mesh(*MESHES[mesh])
    params = random_params(config, 0)
    write_tower(tmp_path, config, params)
    flat = read(tmp_path, config, mesh)
    for name, x in flat.items():
        wanted = params
        for key in name.split("/"):
            wanted = wanted[key]
        np.testing.assert_array_equal(x, wanted, err_msg=name)
        for shard in x.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(wanted)[shard.index])
    # A tower's matrices are split over all of fsdp × tensor, but for what does not divide.
    kernel = flat["blocks/mlp/up/kernel"]
    share = math.prod(kernel.addressable_shards[0].data.shape) / kernel.size
    assert share == 1 / (mesh.shape["fsdp"] * mesh.shape["tensor"])


@pytest.mark.parametrize("case", ["llama3", "phi3", "qwen25_window", "gemma3"])
def test_logits_are_those_of_one_device(case, tmp_path):
    config = DECODERS[case]
    params = random_params(config, 0)
    write_tower(tmp_path, config, params)
    tokens = np.random.default_rng(0).integers(0, 101, (4, 24))
    logits = {}
    for name in ("one", "all"):
        mesh = make_mesh(devices=jax.devices()[:1]) if name == "one" else make_mesh(*MESHES["all"])
        with jax.set_mesh(mesh):
            flat = {f"decoder/{k}": x for k, x in read(tmp_path, config, mesh).items()}
            logits[name] = np.asarray(jax.jit(lambda flat: Decoder(config).apply(
                {"params": merge(flat, {})["decoder"]}, tokens, *plain(tokens), method="score")
            )(flat))
    assert relative(logits["all"], logits["one"]) < 1e-5


def test_what_does_not_divide_lies_whole(tmp_path):
    config = DECODERS["llama3"]
    assert (config.vocab_size, config.num_kv_heads) == (101, 2)
    write_tower(tmp_path, config, random_params(config, 0))
    flat = read(tmp_path, config, make_mesh(1, 2, 4))
    assert flat["embed/embedding"].addressable_shards[0].data.shape[0] == 101
    assert flat["blocks/attn/k/kernel"].addressable_shards[0].data.shape[2] == 2


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_every_mesh_has_the_same_integers(dtype, tmp_path):
    config = replace(DECODERS["qwen2"], d_model=64, d_ff=128, head_dim=32, num_kv_heads=6)
    write_tower(tmp_path, config, random_params(config, 0))
    found = {}
    for name, shape in {"one": (1, 1, 1), **MESHES}.items():
        mesh = make_mesh(*shape, devices=jax.devices()[: math.prod(shape)])
        wanted = describe(lambda: {"decoder": Decoder(config).init(
            jax.random.key(0), *(np.zeros((1, 8), np.int32),) * 3, method="score")["params"]},
            mesh, {"decoder": dtype})
        wanted = {path.removeprefix("decoder/"): x for path, x in wanted.items()}
        found[name] = load_params(tmp_path, tower_table(config), wanted)
        assert {path: x.sharding for path, x in found[name].items()} == {
            path: x.sharding for path, x in wanted.items()}
    kernel = found["all"]["blocks/mlp/up/kernel"]
    assert kernel.dtype == dtype and kernel.addressable_shards[0].data.size < kernel.size
    for name in MESHES:
        for path, x in found[name].items():
            np.testing.assert_array_equal(x, found["one"][path], err_msg=f"{name}: {path}")
