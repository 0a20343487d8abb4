"""Which Hugging Face tensor is which parameter of ours: one row serves loading and export."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jaxfusion.nn.decoder import DecoderConfig
from jaxfusion.nn.mt5 import MT5Config

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Transform:
    """How a tensor of theirs becomes one of ours, and back; `shape` is always ours."""

    to_ours: Callable[[np.ndarray, Shape], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]
    their_shape: Callable[[Shape], Shape]


TRANSFORMS = {
    "same": Transform(lambda x, shape: x, lambda x: x, lambda shape: shape),
    # A PyTorch Linear [out, in] whose output axis we split, e.g. into heads: [in, heads, H].
    "linear_in": Transform(
        lambda x, shape: x.T.reshape(shape),
        lambda x: x.reshape(x.shape[0], -1).T,
        lambda shape: (math.prod(shape[1:]), shape[0]),
    ),
    # A PyTorch Linear [out, in] whose input axis we split: [heads, H, out].
    "linear_out": Transform(
        lambda x, shape: x.T.reshape(shape),
        lambda x: x.reshape(-1, x.shape[-1]).T,
        lambda shape: (shape[-1], math.prod(shape[:-1])),
    ),
}


@dataclass(frozen=True)
class Row:
    """One parameter of ours and where Hugging Face keeps it.

    Attributes:
      theirs: tensor name; `{i}` is the block, whose tensors we stack along a leading axis.
      ours: path in the tower's parameter tree.
      transform: a name in `TRANSFORMS`.
      also: other names the same tensor may have.
    """

    theirs: str
    ours: str
    transform: str = "same"
    also: tuple[str, ...] = ()

    @property
    def stacked(self) -> bool:
        return "{i}" in self.theirs


@dataclass(frozen=True)
class Table:
    """All rows of a family, and patterns of their tensors that we leave alone on purpose."""

    rows: tuple[Row, ...]
    ignored: tuple[str, ...] = ()

    def ignores(self, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)


def mt5_table(config: MT5Config) -> Table:
    """mT5, umT5 and T5 v1.1: the encoder's tensors of an encoder or an encoder-decoder."""
    block, blocks = "encoder.block.{i}.layer", "blocks"
    bias = "0.SelfAttention.relative_attention_bias.weight"
    if config.bias_per_layer:
        bias_row = Row(f"{block}.{bias}", f"{blocks}/relative_bias/embedding")
    else:
        bias_row = Row(f"encoder.block.0.layer.{bias}", "relative_bias/embedding")
    rows = (
        Row("shared.weight", "embed/embedding", also=("encoder.embed_tokens.weight",)),
        bias_row,
        Row(f"{block}.0.layer_norm.weight", f"{blocks}/attn_norm/scale"),
        *(Row(f"{block}.0.SelfAttention.{x}.weight", f"{blocks}/attn/{x}/kernel", "linear_in")
          for x in "qkv"),
        Row(f"{block}.0.SelfAttention.o.weight", f"{blocks}/attn/o/kernel", "linear_out"),
        Row(f"{block}.1.layer_norm.weight", f"{blocks}/mlp_norm/scale"),
        Row(f"{block}.1.DenseReluDense.wi_0.weight", f"{blocks}/mlp/gate/kernel", "linear_in"),
        Row(f"{block}.1.DenseReluDense.wi_1.weight", f"{blocks}/mlp/up/kernel", "linear_in"),
        Row(f"{block}.1.DenseReluDense.wo.weight", f"{blocks}/mlp/down/kernel", "linear_out"),
        Row("encoder.final_layer_norm.weight", "final_norm/scale"),
    )
    return Table(rows, ignored=(r"decoder\..*", r"lm_head\.weight"))


def llama_table(config: DecoderConfig) -> Table:
    """Llama 2, 3, 3.1, 3.2 and their fine-tunes."""
    block, blocks = "model.layers.{i}", "blocks"
    rows = (
        Row("model.embed_tokens.weight", "embed/embedding"),
        Row(f"{block}.input_layernorm.weight", f"{blocks}/attn_norm/scale"),
        *(Row(f"{block}.self_attn.{x}_proj.weight", f"{blocks}/attn/{x}/kernel", "linear_in")
          for x in "qkv"),
        Row(f"{block}.self_attn.o_proj.weight", f"{blocks}/attn/o/kernel", "linear_out"),
        Row(f"{block}.post_attention_layernorm.weight", f"{blocks}/mlp_norm/scale"),
        Row(f"{block}.mlp.gate_proj.weight", f"{blocks}/mlp/gate/kernel", "linear_in"),
        Row(f"{block}.mlp.up_proj.weight", f"{blocks}/mlp/up/kernel", "linear_in"),
        Row(f"{block}.mlp.down_proj.weight", f"{blocks}/mlp/down/kernel", "linear_out"),
        Row("model.norm.weight", "final_norm/scale"),
    )
    ignored = (r".*\.rotary_emb\.inv_freq",)
    if config.tie_embeddings:
        return Table(rows, (*ignored, r"lm_head\.weight"))
    return Table((*rows, Row("lm_head.weight", "head/embedding")), ignored)


def table(config: MT5Config | DecoderConfig) -> Table:
    """The table of a tower's family."""
    return mt5_table(config) if isinstance(config, MT5Config) else llama_table(config)
