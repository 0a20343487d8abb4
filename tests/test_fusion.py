"""The fusions against the papers' definitions, written out plainly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_reference as reference
from flax import linen as nn
from helpers import relative

from jaxfusion.nn import fusion
from jaxfusion.nn.fusion import GlobalSoftmax, TransformerSoftmax

L, B, S, D, F = 5, 2, 7, 16, 24


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def random_like(params, dtype):
    """Random values for every parameter: zeros at the start would hide a missing term."""
    leaves, tree = jax.tree.flatten(nn.unbox(params))
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(tree, [
        jnp.asarray(rng.normal(size=leaf.shape) * 0.5, dtype) for leaf in leaves
    ])


def compare(dtype, dropout_mask=None):
    """Largest relative differences of features, and of every parameter's gradient."""
    module = TransformerSoftmax(L, D, F, dropout=0.5 if dropout_mask is not None else 0.0,
                                dtype=dtype)
    rng = np.random.default_rng(1)
    states = jnp.asarray(rng.normal(size=(L, B, S, D)), dtype)
    target = jnp.asarray(rng.normal(size=(B, S, D)), dtype)
    mask = np.arange(S) < np.array([[S], [S - 3]])
    params = random_like(module.init(jax.random.key(0), states, mask)["params"], dtype)

    def ours(params):
        out, _ = module.apply({"params": params}, states, mask,
                              deterministic=dropout_mask is None,
                              rngs={"dropout": jax.random.key(0)})
        return jnp.sum(out * target), out

    (_, out), grads = jax.jit(jax.value_and_grad(ours, has_aux=True))(params)
    theirs = reference.TransformerSoftmax(L, D, F, dropout=0.0)
    theirs.to(torch.float64 if dtype == jnp.float64 else torch.float32)
    reference.copy_params({"fusion": params}, fusion=theirs)
    if dropout_mask is not None:
        drop_attention(theirs.layer, torch.from_numpy(dropout_mask))
    features = theirs(torch.from_numpy(np.array(states)).permute(1, 2, 0, 3))
    features = features * torch.from_numpy(mask)[:, :, None]
    torch.sum(features * torch.from_numpy(np.array(target))).backward()
    yield "features", relative(out, features.detach())
    attention = theirs.layer.self_attn
    names = ("q", "k", "v")
    kernels = np.split(attention.in_proj_weight.grad.numpy(), 3)
    biases = np.split(attention.in_proj_bias.grad.numpy(), 3)
    pairs = {
        **{f"{n}_kernel": (grads[f"{n}_kernel"].T, g)
           for n, g in zip(names, kernels, strict=True)},
        **{f"{n}_bias": (grads[f"{n}_bias"], g)
           for n, g in zip(names, biases, strict=True) if n != "k"},
        "o_kernel": (grads["o_kernel"].T, attention.out_proj.weight.grad),
        "o_bias": (grads["o_bias"], attention.out_proj.bias.grad),
        "cls": (grads["cls"], theirs.cls.grad),
        "positions": (grads["positions"], theirs.positions.grad),
        "up": (grads["up"]["kernel"].T, theirs.layer.linear1.weight.grad),
        "down": (grads["down"]["bias"], theirs.layer.linear2.bias.grad),
        "norm1": (grads["attn_norm"]["scale"], theirs.layer.norm1.weight.grad),
        "norm2": (grads["mlp_norm"]["bias"], theirs.layer.norm2.bias.grad),
        "weigh": (grads["weigh"]["kernel"].T, theirs.weigh.weight.grad),
    }
    for name, (mine, other) in pairs.items():
        yield name, relative(mine, other)
    # The key bias adds the same to every score: no gradient but rounding.
    assert float(jnp.max(jnp.abs(grads["k_bias"]))) < 1e-4


def drop_attention(layer, mask):
    """Attention of the layer, written out, with a given mask [B S L+1] on the cls row's weights."""
    attention = layer.self_attn

    def forward(x, *args, **kwargs):
        q, k, v = torch.nn.functional.linear(
            x, attention.in_proj_weight, attention.in_proj_bias
        ).chunk(3, dim=-1)
        weights = torch.softmax(q @ k.transpose(1, 2) / x.shape[-1] ** 0.5, dim=-1)
        factors = torch.ones_like(weights)
        factors[:, 0] = mask.reshape(-1, mask.shape[-1])
        return attention.out_proj((weights * factors) @ v), None

    attention.forward = forward


def test_collapsed_equals_plain_float32():
    for name, difference in compare(jnp.float32):
        assert difference < 1e-5, name


def test_collapsed_equals_plain_float64(x64):
    for name, difference in compare(jnp.float64):
        assert difference < 1e-10, name


def test_attention_dropout_scales_the_value_bias(x64, monkeypatch):
    """The same function under a fixed mask on the attention weights, other dropout off."""
    rng = np.random.default_rng(2)
    mask = rng.integers(0, 2, (B, S, L + 1)) * 2.0  # kept ones are doubled: a rate of one half

    def dropout(rate, deterministic):
        ours = jnp.moveaxis(jnp.asarray(mask), -1, 0)
        return lambda x: x * ours if x.shape == ours.shape else x

    monkeypatch.setattr(fusion.nn, "Dropout", dropout)
    for name, difference in compare(jnp.float64, mask):
        assert difference < 1e-10, name


def test_parameter_count_is_the_papers():
    module = TransformerSoftmax(num_layers=24, d_model=1024)
    shapes = jax.eval_shape(
        module.init, jax.random.key(0), jnp.zeros((24, 1, 1, 1024)), jnp.ones((1, 1), bool)
    )
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 8_450_072


def test_padding_gets_zero_and_no_gradient():
    module = TransformerSoftmax(L, D, F)
    states = jax.random.normal(jax.random.key(0), (L, B, S, D))
    mask = np.arange(S) < np.array([[S], [2]])
    params = module.init(jax.random.key(1), states, mask)
    out, weights = module.apply(params, states, mask)
    assert (np.asarray(out)[~mask] == 0).all() and (np.asarray(out)[mask] != 0).any()
    assert np.allclose(weights.sum(axis=0), 1.0, atol=1e-6)
    reach = jax.grad(lambda h: jnp.sum(module.apply(params, h, mask)[0] ** 2))(states)
    assert (np.asarray(reach)[:, ~mask] == 0).all()


def test_global_softmax_starts_uniform_at_scale_100():
    module = GlobalSoftmax(L)
    params = nn.unbox(module.init(jax.random.key(0)))
    assert np.allclose(module.apply(params), 1 / L, atol=1e-7)
    # One step of 3e-5 on one logit moves its weight by about 100 × 3e-5 of itself.
    params["params"]["w"] = params["params"]["w"].at[0].add(3e-5)
    moved = module.apply(params)[0] * L - 1
    assert 0.5 * 100 * 3e-5 < moved < 1.5 * 100 * 3e-5


def test_global_softmax_equals_pytorch():
    module, theirs = GlobalSoftmax(L), reference.GlobalSoftmax(L)
    params = nn.unbox(module.init(jax.random.key(0)))["params"]
    params = {"w": jnp.linspace(-0.02, 0.02, L), "t": params["t"] + 3e-5}
    reference.copy_params({"fusion": params}, fusion=theirs)
    states = np.random.default_rng(0).normal(size=(L, B, S, D)).astype(np.float32)
    ours = jnp.einsum("l,lbsd->bsd", module.apply({"params": params}), states)
    features = theirs(torch.from_numpy(states).permute(1, 2, 0, 3))
    assert relative(ours, features.detach()) < 1e-5


def test_noise_is_of_the_stated_size():
    features = jnp.geomspace(0.1, 10, 50)[None, :, None] * jnp.ones((1, 1, 2000))
    noise = fusion.add_noise(features, 0.5, jax.random.key(0)) - features
    assert np.allclose(noise.std(axis=-1) / features[..., 0], 0.5, rtol=0.1)
