"""LayAlign: the aligner in the LLM's layers against a PyTorch transcription of the paper."""

from dataclasses import replace
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn
from flax import traverse_util
from helpers import make_config, relative
from test_bridge import DECODER, ENCODER, QUERY, TARGET, TEXT, make_batch, make_bridge
from torch.nn import functional

from jaxfusion.bridge.job import prepare
from jaxfusion.data.batching import BatchShape, TokenRow, collate
from jaxfusion.errors import InputError
from jaxfusion.evaluation.generate import Decoding, make_scorer
from jaxfusion.evaluation.options import make_options
from jaxfusion.fields import ROLES
from jaxfusion.nn.aligner import Aligner
from jaxfusion.nn.bridge import OWN
from jaxfusion.sharding.mesh import make_mesh

FAMILIES = {"llama": DECODER, "qwen3": replace(DECODER, family="qwen3", qk_norm=True),
            "qwen2": replace(DECODER, family="qwen2", qkv_bias=True)}


def aligned_bridge(kind, decoder=DECODER, **options):
    return make_bridge("last", "mapping", decoder=decoder,
                       aligner=Aligner(kind, decoder.num_layers, decoder.d_model), **options)


def params_of(bridge, gates=True):
    """Parameters with gates that are open."""
    params = nn.unbox(jax.jit(bridge.init, static_argnums=1)(
        jax.random.key(0), (*ROLES, *OWN)))
    if gates:
        params["aligner"]["gate"] = jnp.array([0.7, -0.4])
    return params


def transcription(bridge, params, states, inputs, targets):
    """The loss of one row, in PyTorch, from encoder states [n S D] and the LLM's inputs [N E]."""
    c, (p, a) = bridge.decoder.config, (params["decoder"], params["aligner"])
    z = torch.relu(torch.einsum("nsd,nm->msd", states, a["mix"]["kernel"])
                   + a["mix"]["bias"][:, None, None])
    if bridge.aligner.kind == "mlp":
        z = torch.relu(z @ a["hidden"]["kernel"] + a["hidden"]["bias"])
    sources = z @ a["out"]["kernel"] + a["out"]["bias"]

    def norm(x, scale):
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + c.norm_eps) * scale

    def heads(layer, name, x):
        y = torch.einsum("se,ekh->skh", x, layer["attn"][name]["kernel"])
        if c.qkv_bias:
            y = y + layer["attn"][name]["bias"]
        if c.qk_norm and name != "v":
            y = norm(y, layer["attn"][f"{name}_norm"]["scale"])
        return y

    half = c.head_dim // 2
    angles = torch.arange(len(inputs))[:, None] * c.rope.theta ** (-torch.arange(half) / half)

    def rotate(x):
        first, second = x[..., :half], x[..., half:]
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def attend(q, k, v, mask=None):
        k, v = (x.repeat_interleave(c.num_heads // c.num_kv_heads, dim=1) for x in (k, v))
        scores = torch.einsum("nkh,skh->kns", q, k) / c.head_dim**0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return torch.einsum("kns,skh->nkh", scores.softmax(-1), v)

    x = inputs
    for i in range(c.num_layers):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], p["blocks"])
        h = norm(x, layer["attn_norm"]["scale"])
        q, k, v = rotate(heads(layer, "q", h)), rotate(heads(layer, "k", h)), heads(layer, "v", h)
        causal = torch.ones(len(x), len(x), dtype=torch.bool).tril()
        mixed = attend(q, k, v, causal)
        mixed = mixed + a["gate"][i] * attend(q, heads(layer, "k", sources[2 * i]),
                                              heads(layer, "v", sources[2 * i + 1]))
        x = x + torch.einsum("nkh,khe->ne", mixed, layer["attn"]["o"]["kernel"])
        h = norm(x, layer["mlp_norm"]["scale"])
        mlp = {name: layer["mlp"][name]["kernel"] for name in ("gate", "up", "down")}
        x = x + (functional.silu(h @ mlp["gate"]) * (h @ mlp["up"])) @ mlp["down"]
    hidden = norm(x, p["final_norm"]["scale"])
    logits = hidden[-len(targets) - 1 : -1] @ p["head"]["embedding"].T
    return functional.cross_entropy(logits, torch.tensor(targets))


IN_EVERY_RUN = {("llama", "mlp", True), ("qwen2", "linear", True), ("qwen3", "mlp", False)}


@pytest.mark.parametrize("family,kind,paper", [
    x if x in IN_EVERY_RUN else pytest.param(*x, marks=pytest.mark.slow)
    for x in product(FAMILIES, ("linear", "mlp"), (False, True))])
def test_loss_and_gradients_are_a_transcription_s(family, kind, paper):
    """Within 1e-5, with two slots of padding, which the authors' code would read in a longer
    batch."""
    bridge = aligned_bridge(kind, FAMILIES[family], align_padding=paper)
    params = params_of(bridge)
    batch = make_batch(QUERY, TEXT, TARGET, slots=7, length=12)
    loss, grads = jax.jit(jax.value_and_grad(
        lambda own: bridge.loss({**params, **own}, batch)[0]))(
            {"aligner": params["aligner"]})
    states = bridge.encoder.apply(
        {"params": params["encoder"]}, batch.enc_tokens, batch.enc_segments, states=True,
        embeddings=True)[:, 0]
    states = (states[:-1] if paper else states[1:])[:, : len(QUERY)]
    inputs, _ = bridge.read(params, batch)
    as_torch = lambda x: torch.tensor(np.asarray(x))  # noqa: E731
    theirs = jax.tree.map(as_torch, params)
    leaves = traverse_util.flatten_dict(theirs["aligner"], sep="/")
    for leaf in leaves.values():
        leaf.requires_grad_()
    value = transcription(bridge, theirs, as_torch(states), as_torch(inputs[0]), TARGET)
    value.backward()
    assert relative(loss, value.item()) < 1e-5
    for path, grad in traverse_util.flatten_dict(grads["aligner"], sep="/").items():
        wanted = leaves[path].grad.numpy()
        assert np.abs(grad - wanted).max() < 1e-5 * np.abs(wanted).max() + 1e-8, path


def test_closed_gates_change_no_bit():
    aligned = aligned_bridge("mlp")
    params, batch = params_of(aligned, gates=False), make_batch(QUERY, TEXT, TARGET, slots=7,
                                                               length=12)
    without = replace(aligned, aligner=None)
    # The same encoder program for both: a stack of states rounds otherwise than the last one.
    states = jax.jit(lambda p: without.encoder.apply(
        {"params": p["encoder"]}, batch.enc_tokens, batch.enc_segments, states=True))(params)
    states = np.moveaxis(np.asarray(states), 0, 2)
    every, last = (replace(batch, enc_states=x) for x in (states, states[:, :, -1:]))
    assert np.array_equal(jax.jit(aligned.target_logits)(params, every),
                          jax.jit(without.target_logits)(params, last))
    with pytest.raises(ValueError, match="4 layers, expected the 1 that"):
        without.target_logits(params, every)


def test_every_gate_and_source_learns_after_one_step():
    """The first gradient moves the gates alone; open gates move the rest."""
    bridge, batch = aligned_bridge("linear"), make_batch(QUERY, TEXT, TARGET, slots=7, length=12)
    for gates in (False, True):
        params = params_of(bridge, gates)
        grads = jax.jit(jax.grad(lambda own, params=params: bridge.loss(
            {**params, "aligner": own}, batch)[0]))(params["aligner"])
        moved = {path: bool(np.abs(x).max() > 0)
                 for path, x in traverse_util.flatten_dict(grads, sep="/").items()}
        assert moved == {path: gates or path == "gate" for path in moved}


def test_packed_rows_and_padding_change_nothing():
    bridge = aligned_bridge("mlp")
    params = params_of(bridge)
    rows = [TokenRow([5, 9, 11, 3, 30], [8, 4], [12, 40, 2]), TokenRow([7, 3], [8], [9, 2])]
    tokenizers = type("Tokenizers", (), {"start": [1]})
    packed = collate([rows], BatchShape(1, 12, 32, 8), tokenizers)
    loss = jax.jit(bridge.loss)
    alone = [loss(params, collate([[row]], BatchShape(1, 16, 40, 8), tokenizers)) for row in rows]
    together, count = loss(params, packed)
    mean = sum(float(value) * float(n) for value, n in alone) / float(count)
    assert relative(together, mean) < 1e-5


def test_cached_decoding_equals_a_full_pass():
    """Greedy tokens are the argmax of full passes, and options score what those score."""
    bridge = aligned_bridge("linear")
    params = params_of(bridge)
    tokenizers = type("Tokenizers", (), {"start": [1]})
    rows = [TokenRow([5, 9, 11, 3, 30], [8, 4], []), TokenRow([7, 3], [8, 4], [])]
    batch = collate([[row] for row in rows], BatchShape(2, 8, 16, 1), tokenizers)
    options = [[[7, 9, 30]] * 2, [[7, 8]] * 2]
    tokens, scores, _ = make_scorer(bridge, Decoding(4, eos=-1), False)(
        params, batch, make_options(options, 2))
    for i, row in enumerate(rows):
        for answer, score in [(tokens[i].tolist(), None)] + [
                (option[i], scores[c, i]) for c, option in enumerate(options)]:
            whole = collate([[replace(row, target=answer)]], BatchShape(1, 8, 24, 4), tokenizers)
            logits = jax.jit(bridge.target_logits)(params, whole)[0, : len(answer)]
            if score is None:
                assert logits.argmax(-1).tolist() == answer
            else:
                chances = jax.nn.log_softmax(logits)[np.arange(len(answer)), np.array(answer)]
                assert relative(score, chances.sum()) < 1e-5


@pytest.mark.parametrize(("fields", "why"), [
    ({"aligner__recipe": "paper_code", "data__pack": True}, "set data.pack=False"),
    ({"optimizer__groups": {"all": {"patterns": ("projector/.*",)}}}, "no group"),
])
def test_what_cannot_be_aligned_is_refused(cache_dir, fields, why):
    with pytest.raises(InputError, match=why):
        prepare(make_config(cache_dir, aligner__name="mlp", **fields), make_mesh())


def test_states_are_read_from_the_first_one_on():
    """The aligner of the authors' code reads embeddings; the stack has them in front."""
    bridge = aligned_bridge("linear", align_padding=True)
    params = params_of(bridge)
    batch = make_batch(QUERY, TEXT, TARGET, slots=5, length=12)
    stack = bridge.encoder.apply({"params": params["encoder"]}, batch.enc_tokens,
                                 batch.enc_segments, states=True, embeddings=True)
    assert len(stack) == ENCODER.num_layers + 1 == len(bridge.read_layers)
    table = params["encoder"]["embed"]["embedding"]
    assert relative(stack[0, 0], table[np.array(QUERY)]) < 1e-6
