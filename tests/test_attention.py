"""Attention by kernels against the plain form: values and gradients, packed rows and padding."""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import DECODERS, ENCODERS, apply, relative
from jax.experimental.pallas.tpu import force_tpu_interpret_mode

from jaxfusion.miniatures.checkpoints import random_params
from jaxfusion.nn import attention
from jaxfusion.nn.attention import Pattern, cudnn_attention, pallas_attention, plain_attention
from jaxfusion.nn.cache import init_cache
from jaxfusion.nn.decoder import Decoder
from jaxfusion.nn.encoder import Encoder

ROWS, LENGTH, HEADS, WIDTH = 2, 200, 4, 64
PATTERNS = {
    "causal": (Pattern(True, 0.125), False), "window": (Pattern(True, 0.125, window=17), False),
    "cap": (Pattern(True, 0.125, cap=5.0), False), "bias": (Pattern(False, 1.0), True),
    "both_ways": (Pattern(False, 0.125), False),
    "window_both_ways": (Pattern(False, 0.125, window=17), False),
}
# The call that a GPU makes, in the form that any device runs.
KERNELS = {"cudnn": partial(cudnn_attention, implementation="xla"),
           "pallas": partial(pallas_attention, interpret=True)}


def segments():
    """A row with padding behind, and one with two examples and padding."""
    found = np.zeros((ROWS, LENGTH), np.int32)
    found[0, :150] = found[1, :80] = 1
    found[1, 80:190] = 2
    return found


def masked(ids, pattern):
    back = np.arange(LENGTH)[:, None] - np.arange(LENGTH)
    seen = (ids[:, :, None] == ids[:, None]) & (ids != 0)[:, None]
    seen = seen & (back >= 0) if pattern.causal else seen
    return seen & (abs(back) < pattern.window) if pattern.window else seen


@pytest.mark.parametrize("kernel,case", [
    (kernel, case) for kernel in KERNELS for case in PATTERNS if (kernel, case) != ("cudnn", "cap")
])
def test_kernels_equal_the_plain_form(kernel, case):
    pattern, biased = PATTERNS[case]
    rng, ids = np.random.default_rng(0), segments()
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    keys = HEADS if biased else HEADS // 2
    q = draw(ROWS, LENGTH, HEADS, WIDTH)
    k, v = (draw(ROWS, LENGTH, keys, WIDTH) for _ in range(2))
    bias = draw(HEADS, LENGTH, LENGTH) if biased else None

    def run(attend):
        def loss(q, k, v):
            out = jnp.where((ids != 0)[:, :, None, None], attend(q, k, v), 0.0)
            return jnp.sum(jnp.sin(out)), out

        grad = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
        # Splash attention has an interpreter of its own, flash attention needs jax's.
        with force_tpu_interpret_mode() if (kernel, biased) == ("pallas", True) else nullcontext():
            (_, out), grads = jax.jit(grad)(q, k, v)
        return [out, *grads]

    plain = run(lambda *x: plain_attention(*x, masked(ids, pattern), scale=pattern.scale,
                                           bias=bias, cap=pattern.cap))
    other = run(lambda *x: KERNELS[kernel](*x, ids, pattern, bias))
    assert all(relative(ours, theirs) < 1e-5 for ours, theirs in zip(other, plain, strict=True))


@pytest.mark.parametrize("case", ["causal", "window", "cap"])
def test_long_rows_in_parts_equal_whole_rows(case, monkeypatch):
    """Values and gradients, behind a beginning that is cached already, with free slots behind."""
    monkeypatch.setattr(attention, "QUERIES", 24)
    (pattern, _), rng, start = PATTERNS[case], np.random.default_rng(0), 40
    mask = masked(segments(), pattern)
    mask[0, 150:], mask[1, 190:] = False, False  # padding sees none
    queries = slice(start, 190)
    q, k, v = (jnp.asarray(rng.normal(size=(ROWS, LENGTH, heads, 16)), jnp.float32)
               for heads in (4, 2, 2))

    def run(causal, mask):
        def loss(q, k, v):
            out = plain_attention(q[:, queries], k, v, mask[:, queries], scale=pattern.scale,
                                  cap=pattern.cap, causal=causal)
            real = np.any(mask[:, queries], axis=2)
            return jnp.sum(jnp.sin(out), where=real[:, :, None, None])

        value, grads = jax.value_and_grad(loss, argnums=(0, 1, 2))(q, k, v)
        return float(value), grads

    (ours, grads), (theirs, expected) = run(attention.Causal(start), mask), run(None, mask)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert all(relative(x, y) < 1e-5 for x, y in zip(grads, expected, strict=True))
    behind = mask.copy()
    behind[1, 60, 180] = True  # what is behind a query is not read, whatever a mask says
    assert run(attention.Causal(start), behind)[0] == ours != run(None, behind)[0]


@pytest.mark.parametrize("case", ["llama3", "gemma3"])
def test_a_decoder_reads_long_rows_in_parts(case, monkeypatch):
    """In training, and with a cache from a first token on or behind what was read before."""
    config, params = DECODERS[case], {"params": random_params(DECODERS[case], 0)}
    tokens = np.random.default_rng(0).integers(0, 101, (2, 24))
    positions, ones = np.broadcast_to(np.arange(24), (2, 24)), np.ones((2, 24), int)
    decoder = Decoder(config)

    def run():
        embedded = decoder.apply(params, tokens, method="embed")
        whole = decoder.apply(params, embedded, positions, ones)[0]
        cache, parts = init_cache(config, 2, 30, jnp.float32), []
        for part, start in ((slice(0, 8), 0), (slice(8, 24), 8)):
            out, cache = decoder.apply(params, embedded[:, part], positions[:, part],
                                       ones[:, part], cache, start)
            parts.append(out)
        return whole, jnp.concatenate(parts, axis=1)

    expected = run()
    monkeypatch.setattr(attention, "QUERIES", 4)
    parts, attend = [], attention._attend
    monkeypatch.setattr(attention, "_attend", lambda q, k, *rest, **settings: (
        parts.append((q.shape[1], k.shape[1])), attend(q, k, *rest, **settings))[1])
    assert all(relative(ours, theirs) < 1e-5 for ours, theirs in zip(run(), expected, strict=True))
    assert {(4, 4), (4, 24), (4, 12)} <= set(parts)


@pytest.mark.parametrize("case", ["llama3", "mistral_v01", "qwen25_window", "gemma3"])
def test_a_decoder_is_the_same_by_kernels(case, monkeypatch):
    """Every window of a family reaches its kernel; packed rows, so positions restart."""
    config, params = DECODERS[case], {"params": random_params(DECODERS[case], 0)}
    tokens = np.random.default_rng(0).integers(0, 101, (2, 24))
    ids = np.array([[1] * 14 + [2] * 8 + [0] * 2, [1] * 20 + [0] * 4])
    positions = np.array([[*range(14), *range(8), 0, 0], [*range(20), 0, 0, 0, 0]])
    plain = apply(config, params, tokens, positions, ids, method="score")
    for name, kernel in KERNELS.items():
        monkeypatch.setitem(attention.FUSED, name, kernel)
        monkeypatch.setattr("jaxfusion.nn.decoder.usable", lambda kernel, *_: kernel)
        decoder = Decoder(config, attention=name)
        fused = jax.jit(partial(decoder.apply, method="score"))(params, tokens, positions, ids)
        assert relative(fused[ids != 0], plain[ids != 0]) < 1e-5


@pytest.mark.parametrize("family", ["mt5", "umt5", "xlm-roberta", "modernbert"])
def test_an_encoder_is_the_same_by_kernels(family, monkeypatch):
    """Every window of a family reaches its kernel; packed rows, so positions restart."""
    config, params = ENCODERS[family], {"params": random_params(ENCODERS[family], 0)}
    tokens = np.random.default_rng(0).integers(0, 97, (2, 24))
    ids = np.array([[1] * 14 + [2] * 8 + [0] * 2, [1] * 20 + [0] * 4])
    plain = Encoder(config).apply(params, tokens, ids)
    for name, kernel in KERNELS.items():
        monkeypatch.setitem(attention.FUSED, name, kernel)
        monkeypatch.setattr("jaxfusion.nn.encoder.usable", lambda kernel, *_: kernel)
        # Splash attention has an interpreter of its own, flash attention needs jax's.
        biased = config.positions == "relative"
        with force_tpu_interpret_mode() if biased else nullcontext():
            fused = jax.jit(Encoder(config, attention=name).apply)(params, tokens, ids)
        assert relative(fused[ids != 0], plain[ids != 0]) < 1e-5


def test_what_a_kernel_cannot_do_is_done_plainly():
    usable = attention.usable
    assert usable("cudnn", 2, 128, 64, jnp.bfloat16) == "cudnn"
    assert usable("cudnn", 2, 127, 64, jnp.bfloat16) == "plain"
    assert usable("cudnn", 2, 128, 64, jnp.float32) == "plain"
    assert usable("cudnn", 2, 128, 64, jnp.bfloat16, cap=5.0) == "plain"
    assert usable("pallas", 2, 127, 64, jnp.float32, cap=5.0) == "pallas"


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("case", ["causal", "window", "bias", "window_both_ways"])
def test_cudnn_itself_equals_the_plain_form(case):
    pattern, biased = PATTERNS[case]
    rng, ids = np.random.default_rng(0), segments()
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)  # noqa: E731
    keys = HEADS if biased else HEADS // 2
    q, k, v = draw(ROWS, LENGTH, HEADS, WIDTH), *(draw(ROWS, LENGTH, keys, WIDTH) for _ in "kv")
    bias = draw(HEADS, LENGTH, LENGTH).astype(jnp.float32) if biased else None
    ours = jax.jit(lambda *x: cudnn_attention(*x, ids, pattern, bias))(q, k, v)
    plain = plain_attention(q, k, v, masked(ids, pattern), scale=pattern.scale, bias=bias)
    real = ids != 0
    assert relative(ours[real].astype(np.float32), plain[real].astype(np.float32)) < 2e-2


@pytest.mark.parametrize("capability, head_dim, kernel", [
    ("7.5", 64, "plain"), ("8.0", 64, "cudnn"), ("8.0", 256, "plain"), ("9.0", 256, "cudnn")])
def test_cudnn_is_for_gpus_and_heads_that_it_has_kernels_for(
        monkeypatch, capability, head_dim, kernel):
    gpu = SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    assert attention.usable("cudnn", 4, 128, head_dim, jnp.bfloat16) == kernel
