"""Softmax attention: in plain form, by cuDNN on GPUs, by Pallas kernels on TPUs.

The plain form is the reference of the other two. They read the tokens of a segment in the order of
their slots, so what a mask of positions allows there must be what slots allow: true of every row
whose segments have no gaps, as batches are made. In parts (`Causal`) the plain form does so, too.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxfusion.sharding.rules import fitting_spec

KERNELS = ("plain", "cudnn", "pallas")
# Large enough to silence a masked score, small enough that float32 sums of it stay finite.
MASKED = -1e30
BLOCK = 128  # slots that a Pallas kernel takes at a time, or a multiple
LANES = 128  # of a TPU's vector unit; splash attention wants heads as wide
QUERIES = 128  # slots that plain causal attention takes at a time, at least
PARTS = 8  # and in at most this many parts: each is compiled on its own


@dataclass(frozen=True)
class Pattern:
    """Who attends to whom, of the tokens of a segment.

    Attributes:
      causal: to earlier ones and itself alone.
      window: a token sees those fewer than this many positions away, back and, unless causal,
        ahead; None is all.
      scale: of the scores. cap: their bound, `cap * tanh(x / cap)`; None: unbounded.
    """

    causal: bool
    scale: float
    window: int | None = None
    cap: float | None = None


class LayerWindows:
    """What a tower's config says of its layers' windows, from `windows` and `num_layers`."""

    @property
    def kinds(self) -> tuple[int | None, ...]:
        """The different windows that layers have."""
        return tuple(sorted(set(self.windows or (None,)), key=lambda w: (w is None, w)))

    @property
    def kind_of_layer(self) -> tuple[int, ...]:
        """Each layer's window as a number into `kinds`."""
        return tuple(map(self.kinds.index, self.windows or (None,) * self.num_layers))


def segment_mask(segments: Int[Array, "B S"], window: int | None = None) -> Bool[Array, "B S S"]:
    """Who may look at whom, both ways: tokens of the same segment, fewer than `window` slots apart.
    Segment 0 is padding: it sees all tokens, as in transformers, and no token sees it."""
    query, key = segments[:, :, None], segments[:, None, :]
    same = ((query == key) | (query == 0)) & (key != 0)
    if window is None:
        return same
    slots = jnp.arange(segments.shape[1])
    return same & (jnp.abs(slots[:, None] - slots) < window)


def causal_mask(
    q_positions, q_segments, k_positions, k_segments, window: int | None = None
) -> Bool[Array, "B N C"]:
    """Who may look at whom: the last `window` positions of the same segment; segment 0 is padding.

    It does not depend on slots, so padding may be anywhere.
    """
    same = q_segments[:, :, None] == k_segments[:, None, :]
    back = q_positions[:, :, None] - k_positions[:, None, :]
    near = (back >= 0) if window is None else (back >= 0) & (back < window)
    return same & near & (k_segments != 0)[:, None, :]


def capped(x: Float[Array, "*B"], cap: float | None) -> Float[Array, "*B"]:
    """`cap * tanh(x / cap)`, or x where there is no cap (Gemma 2, arXiv:2408.00118)."""
    return x if cap is None else cap * jnp.tanh(x / cap)


@jax.tree_util.register_static
@dataclass(frozen=True)
class Causal:
    """That no query sees a key behind its own slot, where that is known when a program is compiled.

    Attributes:
      start: the key slot of the first query.
    """

    start: int


def plain_attention(
    q: Float[Array, "B S N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    mask: Bool[Array, "B S T"],
    *,
    scale: float,
    bias: Float[Array, "N S T"] | None = None,
    cap: float | None = None,
    dropout: Callable[[Array], Array] = lambda weights: weights,
    causal: Causal | None = None,
) -> Float[Array, "B S N H"]:
    """Softmax attention with an optional additive bias; query heads may share key-value heads.

    The softmax runs in float32. A query that may attend nowhere gets a mean over all values; such
    queries are padding, and nothing reads them.

    Args:
      causal: what the mask says, too. Long rows are read in parts then, which leave out the keys
        behind them: half the work, and a fraction of the memory.
    """
    attend = partial(_attend, scale=scale, cap=cap, dropout=dropout)
    length = q.shape[1]
    if causal is None or bias is not None or length < 2 * QUERIES:
        return attend(q, k, v, mask, bias)
    size, parts = max(QUERIES, -(-length // PARTS)), []
    for first in range(0, length, size):
        part, seen = slice(first, first + size), causal.start + first + size
        parts.append(attend(q[:, part], k[:, :seen], v[:, :seen], mask[:, part, :seen], None))
    return jnp.concatenate(parts, axis=1)


def _attend(q, k, v, mask, bias, *, scale, cap, dropout) -> Array:
    batch, length, heads, _ = q.shape
    groups = heads // k.shape[2]
    grouped = q.reshape(batch, length, k.shape[2], groups, -1)
    scores = jnp.einsum("bskgh,btkh->bkgst", grouped, k, preferred_element_type=jnp.float32)
    scores = capped(scores * scale, cap)
    if bias is not None:
        scores = scores + bias.reshape(k.shape[2], groups, *bias.shape[1:])
    scores = jnp.where(mask[:, None, None], scores, MASKED)
    weights = dropout(jax.nn.softmax(scores, axis=-1)).astype(v.dtype)
    return jnp.einsum("bkgst,btkh->bskgh", weights, v).reshape(batch, length, heads, -1)


def usable(
    kernel: str, rows: int, length: int, head_dim: int, dtype: jnp.dtype, cap: float | None = None
) -> str:
    """The kernel, or `plain` where it cannot do what is asked."""
    if why_plain(kernel, head_dim, dtype, cap) or (kernel == "cudnn" and length % 2):
        return "plain"
    if kernel != "plain" and not _mesh().empty and (
        rows % math.prod(_mesh().shape[axis] for axis in ("data", "fsdp"))
    ):
        return "plain"
    return kernel


def why_plain(
    kernel: str, head_dim: int, dtype: jnp.dtype, cap: float | None = None
) -> str | None:
    """Why a kernel can compute no batch of a tower; None where it can."""
    if kernel != "cudnn":
        return None
    if jnp.dtype(dtype).itemsize != 2:
        return f"cuDNN takes bfloat16 and float16, not {jnp.dtype(dtype).name}"
    if cap is not None:
        return "cuDNN bounds no scores, and this family's are"
    if head_dim % 8 or head_dim > _cudnn_width():
        return (f"cuDNN takes heads of 8, 16 … {_cudnn_width()} dimensions here, not {head_dim}"
                if _cudnn_width() else "this GPU is too old for cuDNN's attention")
    return None


def _cudnn_width() -> int:
    """The widest head that cuDNN's flash attention takes, which depends on the GPU; 0 on one that
    is older than Ampere (as the T4), where it takes none."""
    capability = float(getattr(jax.devices()[0], "compute_capability", "9.0"))
    return 256 if capability >= 9.0 else 128 if capability >= 8.0 else 0


def cudnn_attention(
    q: Float[Array, "B S N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"],
    segments: Int[Array, "B S"], pattern: Pattern, bias: Float[Array, "N S S"] | None = None,
    implementation: str = "cudnn",
) -> Float[Array, "B S N H"]:
    """As `plain_attention`, by `jax.nn.dot_product_attention`.

    Args:
      implementation: `xla` runs the same call on any device.
    """
    def attend(q, k, v, segments, bias):
        # cuDNN knows windows of causal attention alone; the mask holds the others.
        mask = segment_mask(segments, None if pattern.causal else pattern.window)
        window = (pattern.window - 1, 0) if pattern.causal and pattern.window else None
        return jax.nn.dot_product_attention(
            q, k, v, None if bias is None else bias[None].astype(q.dtype), mask[:, None],
            scale=pattern.scale, is_causal=pattern.causal, local_window_size=window,
            implementation=implementation,
        )

    return _on_each_device(attend, q, k, v, segments, bias)


def pallas_attention(
    q: Float[Array, "B S N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"],
    segments: Int[Array, "B S"], pattern: Pattern, bias: Float[Array, "N S S"] | None = None,
    interpret: bool = False,
) -> Float[Array, "B S N H"]:
    """As `plain_attention`, by jax's kernels for TPUs, on each device's rows and heads.

    Flash attention for patterns with a bias, splash attention for the others.

    Args:
      interpret: runs splash attention on any device; for the other one there is jax's
        `force_tpu_interpret_mode`.
    """
    length = q.shape[1]
    pad = -length % BLOCK
    q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (q, k, v))
    segments = jnp.pad(segments, ((0, 0), (0, pad)))
    if bias is not None:
        bias = jnp.pad(bias, ((0, 0), (0, pad), (0, pad)))
    kernel = partial(_splash, interpret) if bias is None else _flash
    out = _on_each_device(partial(kernel, pattern), q, k, v, segments, bias)
    return out[:, :length]


def _on_each_device(kernel: Callable[..., Array], q, k, v, segments, bias) -> Array:
    """A kernel on the rows and heads of each device of the mesh: the compiler cannot split it."""
    if _mesh().empty:
        return kernel(q, k, v, segments, bias)
    heads = fitting_spec(("heads", "kv_heads"), (q.shape[2], k.shape[2]), _mesh())
    if heads[0] != heads[1]:  # each device needs the keys of its own query heads
        k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    rows = fitting_spec(("batch", None, "heads", None), q.shape, _mesh())
    specs = (rows, rows, rows, fitting_spec(("batch", None), segments.shape, _mesh()),
             None if bias is None else fitting_spec(("heads", None, None), bias.shape, _mesh()))
    # Kernels say nothing of how their results vary over the mesh.
    split = jax.shard_map(kernel, in_specs=specs, out_specs=rows, check_vma=False)
    return split(q, k, v, segments, bias)


# By name; the plain form takes a mask in place of segments and pattern.
FUSED = {"cudnn": cudnn_attention, "pallas": pallas_attention}


def _mesh():
    return jax.sharding.get_abstract_mesh()


def _splash(interpret: bool, pattern: Pattern, q, k, v, segments, bias) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as splash,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    length, width = q.shape[1], q.shape[-1]
    shape = (length, length)
    if pattern.window is None:
        one = masks.CausalMask(shape) if pattern.causal else masks.FullMask(shape)
    else:
        reach = pattern.window - 1
        one = masks.LocalMask(shape, (reach, 0 if pattern.causal else reach), 0)
    block = _block(length)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block,
        block_kv_dkv=block, block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([one] * q.shape[2]), block_sizes=sizes, head_shards=1, q_seq_shards=1,
        attn_logits_soft_cap=pattern.cap, interpret=interpret,
    )
    spare = ((0, 0), (0, 0), (0, 0), (0, -width % LANES))
    q, k, v = (jnp.pad(x, spare).swapaxes(1, 2) for x in (q * pattern.scale, k, v))
    out = jax.vmap(kernel)(q, k, v, splash.SegmentIds(segments, segments))
    return out.swapaxes(1, 2)[..., :width]


def _flash(pattern: Pattern, q, k, v, segments, bias) -> Array:
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    block = _block(q.shape[2])
    names = flash.BlockSizes.__dataclass_fields__
    sizes = flash.BlockSizes(**{name: 1 if name == "block_b" else block for name in names})

    def one(row):
        q, k, v, ids = (x[None] for x in row)
        return flash.flash_attention(
            q, k, v, None if bias is None else bias[None], flash.SegmentIds(ids, ids),
            sm_scale=pattern.scale, block_sizes=sizes)[0]

    # Row by row, which a TPU does anyway: the kernel wants a copy of the bias for each row at once.
    return jax.lax.map(one, (q, k, v, segments)).swapaxes(1, 2)


def _block(length: int) -> int:
    """The largest of a few block sizes that divides the length."""
    return next(size for size in (512, 256, BLOCK) if length % size == 0)
