"""Maps Hugging Face tensors to our parameters: one row serves loading and export."""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import numpy as np

from jaxfusion.nn.decoder import DecoderConfig
from jaxfusion.nn.encoder import EncoderConfig

Shape = tuple[int, ...]
Index = tuple[slice, ...]


@dataclass(frozen=True)
class Transform:
    """Converts a tensor of theirs to ours and back; `shape` is always ours.

    `their_index` maps a block of our tensor to a block of theirs: of several axes that they merge
    into one, only the first may be sharded.
    """

    to_ours: Callable[[np.ndarray, Shape], np.ndarray]
    to_theirs: Callable[[np.ndarray], np.ndarray]
    their_shape: Callable[[Shape], Shape]
    their_index: Callable[[Index, Shape], Index]


def _joined(index: Index, shape: Shape) -> slice:
    """The block as a slice of the flattened axes of `shape`."""
    start, stop, _ = index[0].indices(shape[0])
    if any(cut.indices(n) != (0, n, 1) for cut, n in zip(index[1:], shape[1:], strict=True)):
        raise ValueError(f"axes {shape} cut at {index}: only the first may be sharded")
    return slice(start * math.prod(shape[1:]), stop * math.prod(shape[1:]))


TRANSFORMS = {
    "same": Transform(
        lambda x, shape: x, lambda x: x, lambda shape: shape, lambda index, shape: index
    ),
    # A PyTorch Linear [out, in] whose output axis we split, e.g. into heads: [in, heads, H].
    "linear_in": Transform(
        lambda x, shape: x.T.reshape(shape),
        lambda x: x.reshape(x.shape[0], -1).T,
        lambda shape: (math.prod(shape[1:]), shape[0]),
        lambda index, shape: (_joined(index[1:], shape[1:]), index[0]),
    ),
    # A PyTorch Linear [out, in] whose input axis we split: [heads, H, out].
    "linear_out": Transform(
        lambda x, shape: x.T.reshape(shape),
        lambda x: x.reshape(-1, x.shape[-1]).T,
        lambda shape: (shape[-1], math.prod(shape[:-1])),
        lambda index, shape: (index[-1], _joined(index[:-1], shape[:-1])),
    ),
    # A vector that they store with two leading axes of size 1.
    "vector": Transform(
        lambda x, shape: x.reshape(shape), lambda x: x.reshape(1, 1, -1),
        lambda shape: (1, 1, *shape), lambda index, shape: (slice(0, 1), slice(0, 1), *index),
    ),
    # A bias [out] whose axis we split into heads.
    "heads": Transform(
        lambda x, shape: x.reshape(shape), lambda x: x.reshape(-1),
        lambda shape: (math.prod(shape),),
        lambda index, shape: (_joined(index, shape),),
    ),
}


@dataclass(frozen=True)
class Entry:
    """One parameter of ours and its Hugging Face tensor.

    Attributes:
      theirs: tensor name; `{i}` is the block; we stack the tensors of all blocks along a leading
        axis.
      ours: path in the tower's parameter tree.
      transform: a name in `TRANSFORMS`.
      also: alternative names of the same tensor.
      part: start, stop and total number of rows, if ours is a part of theirs.
      first: number of the first block that has the tensor, a norm's scale; ours is 1 in those
        before.
    """

    theirs: str
    ours: str
    transform: str = "same"
    also: tuple[str, ...] = ()
    part: tuple[int, int, int] | None = None
    first: int = 0

    @property
    def stacked(self) -> bool:
        """Whether our parameter stacks the tensors of all blocks."""
        return "{i}" in self.theirs

    def names(self, layers: int) -> list[tuple[str, ...]]:
        """The possible names of each tensor that the row stacks (or of its only tensor)."""
        numbers = range(self.first, layers) if self.stacked else [0]
        return [tuple(name.format(i=i) for name in (self.theirs, *self.also)) for i in numbers]


@dataclass(frozen=True)
class Table:
    """All rows of a family, and patterns of tensors that we skip on purpose."""

    rows: tuple[Entry, ...]
    ignored: tuple[str, ...] = ()

    def ignores(self, name: str) -> bool:
        """Whether a tensor of theirs is skipped on purpose."""
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)


def encoder_table(config: EncoderConfig) -> Table:
    """The family's tensors, by their names in the encoder alone."""
    return {"bert": _bert_table, "xlm-roberta": _bert_table, "m2m_100": _m2m100_table,
            "modernbert": _modernbert_table}.get(config.family, _t5_table)(config)


def _t5_table(config: EncoderConfig) -> Table:
    """mT5, umT5 and T5 v1.1: the encoder's tensors of an encoder or an encoder-decoder."""
    block, blocks = "encoder.block.{i}.layer", "blocks"
    bias = "0.SelfAttention.relative_attention_bias.weight"
    if config.bias_per_layer:
        bias_row = Entry(f"{block}.{bias}", f"{blocks}/relative_bias/embedding")
    else:
        bias_row = Entry(f"encoder.block.0.layer.{bias}", "relative_bias/embedding")
    rows = (
        # MADLAD-400's files have the shared table under the last name, the decoder's.
        Entry("shared.weight", "embed/embedding",
              also=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")),
        bias_row,
        Entry(f"{block}.0.layer_norm.weight", f"{blocks}/attn_norm/scale"),
        *(Entry(f"{block}.0.SelfAttention.{x}.weight", f"{blocks}/attn/{x}/kernel", "linear_in")
          for x in "qkv"),
        Entry(f"{block}.0.SelfAttention.o.weight", f"{blocks}/attn/o/kernel", "linear_out"),
        Entry(f"{block}.1.layer_norm.weight", f"{blocks}/mlp_norm/scale"),
        Entry(f"{block}.1.DenseReluDense.wi_0.weight", f"{blocks}/mlp/gate/kernel", "linear_in"),
        Entry(f"{block}.1.DenseReluDense.wi_1.weight", f"{blocks}/mlp/up/kernel", "linear_in"),
        Entry(f"{block}.1.DenseReluDense.wo.weight", f"{blocks}/mlp/down/kernel", "linear_out"),
        Entry("encoder.final_layer_norm.weight", "final_norm/scale"),
    )
    return Table(rows, ignored=(r"decoder\..*", r"lm_head\.weight"))


def _bert_table(config: EncoderConfig) -> Table:
    """BERT and XLM-R. Google's first checkpoints call a norm's scale and bias gamma and beta."""
    block, blocks = "encoder.layer.{i}", "blocks"
    attn, embed = f"{block}.attention", "embeddings"
    rows = [
        Entry(f"{embed}.word_embeddings.weight", "embed/embedding"),
        Entry(f"{embed}.position_embeddings.weight", "positions"),
        Entry(f"{embed}.token_type_embeddings.weight", "token_types"),
        *_norm(f"{embed}.LayerNorm", "embed_norm"),
        *_heads((f"{attn}.self.{x}" for x in ("query", "key", "value")), f"{blocks}/attn"),
        *_out(f"{attn}.output.dense", f"{blocks}/attn/o"),
        *_norm(f"{attn}.output.LayerNorm", f"{blocks}/attn_norm"),
        *_dense(f"{block}.intermediate.dense", f"{blocks}/mlp/up"),
        *_dense(f"{block}.output.dense", f"{blocks}/mlp/down"),
        *_norm(f"{block}.output.LayerNorm", f"{blocks}/mlp_norm"),
    ]
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    rows = [replace(row, also=tuple(row.theirs.replace(new, name) for new, name in old.items()
                                    if row.theirs.endswith(new))) for row in rows]
    start = "bert." if config.family == "bert" else "roberta."
    return Table(_also_in(rows, start), ignored=(
        r".*embeddings\.position_ids", r"(.*\.)?pooler\..*", r"(cls|lm_head|classifier)\..*"))


def _m2m100_table(config: EncoderConfig) -> Table:
    """M2M100 and NLLB: the encoder's tensors, of it alone or of an encoder-decoder."""
    block, blocks = "layers.{i}", "blocks"
    shared = ("model.shared.weight", "model.encoder.embed_tokens.weight", "shared.weight")
    rows = [
        *_heads((f"{block}.self_attn.{x}_proj" for x in "qkv"), f"{blocks}/attn"),
        *_out(f"{block}.self_attn.out_proj", f"{blocks}/attn/o"),
        *_norm(f"{block}.self_attn_layer_norm", f"{blocks}/attn_norm"),
        *_dense(f"{block}.fc1", f"{blocks}/mlp/up"), *_dense(f"{block}.fc2", f"{blocks}/mlp/down"),
        *_norm(f"{block}.final_layer_norm", f"{blocks}/mlp_norm"),
        *_norm("layer_norm", "final_norm"),
    ]
    embed = Entry("embed_tokens.weight", "embed/embedding", also=shared)
    return Table((embed, *_also_in(rows, "model.encoder.", "encoder.")), ignored=(
        r"(model\.)?decoder\..*", r"lm_head\..*", r".*embed_positions\.weights?",
        r"encoder\.embed_tokens\.weight"))


def _modernbert_table(config: EncoderConfig) -> Table:
    """ModernBERT merges q, k and v into one tensor, gate and up too; its first block has no norm
    in front of attention."""
    block, blocks, width = "layers.{i}", "blocks", config.d_model
    parts = [*((f"{block}.attn.Wqkv.weight", f"attn/{x}", (i * width, (i + 1) * width, 3 * width))
               for i, x in enumerate("qkv")),
             *((f"{block}.mlp.Wi.weight", f"mlp/{x}", (i * config.d_ff, (i + 1) * config.d_ff,
                                                       2 * config.d_ff))
               for i, x in enumerate(("gate", "up")))]
    rows = [
        Entry("embeddings.tok_embeddings.weight", "embed/embedding"),
        Entry("embeddings.norm.weight", "embed_norm/scale"),
        Entry(f"{block}.attn_norm.weight", f"{blocks}/attn_norm/scale", first=1),
        *(Entry(theirs, f"{blocks}/{ours}/kernel", "linear_in", part=part)
          for theirs, ours, part in parts),
        Entry(f"{block}.attn.Wo.weight", f"{blocks}/attn/o/kernel", "linear_out"),
        Entry(f"{block}.mlp_norm.weight", f"{blocks}/mlp_norm/scale"),
        Entry(f"{block}.mlp.Wo.weight", f"{blocks}/mlp/down/kernel", "linear_out"),
        Entry("final_norm.weight", "final_norm/scale"),
    ]
    return Table(_also_in(rows, "model."), ignored=(r"(head|decoder|classifier)\..*",))


def _also_in(rows: Iterable[Entry], *starts: str) -> tuple[Entry, ...]:
    """Rows whose tensors' names may begin with one of these."""
    return tuple(replace(row, also=(*row.also, *(
        start + name for start in starts for name in (row.theirs, *row.also)))) for row in rows)


def _heads(theirs: Iterable[str], ours: str) -> list[Entry]:
    """The maps of queries, keys and values, with biases."""
    return [row for x, name in zip("qkv", theirs, strict=True) for row in (
        Entry(f"{name}.weight", f"{ours}/{x}/kernel", "linear_in"),
        Entry(f"{name}.bias", f"{ours}/{x}/bias", "heads"))]


def _out(theirs: str, ours: str) -> list[Entry]:
    """The map of what all heads give, with its bias."""
    return [Entry(f"{theirs}.weight", f"{ours}/kernel", "linear_out"),
            Entry(f"{theirs}.bias", f"{ours}/bias")]


def decoder_table(config: DecoderConfig) -> Table:
    """Every supported family of LLMs: they use the same tensor names."""
    block, blocks = "model.layers.{i}", "blocks"
    attn, mlp = f"{block}.self_attn", f"{block}.mlp"
    mlp_norm = "pre_feedforward" if config.post_norms else "post_attention"
    rows = [
        Entry("model.embed_tokens.weight", "embed/embedding"),
        Entry(f"{block}.input_layernorm.weight", f"{blocks}/attn_norm/scale"),
        *_inputs(config),
        Entry(f"{attn}.o_proj.weight", f"{blocks}/attn/o/kernel", "linear_out"),
        Entry(f"{block}.{mlp_norm}_layernorm.weight", f"{blocks}/mlp_norm/scale"),
        Entry(f"{mlp}.down_proj.weight", f"{blocks}/mlp/down/kernel", "linear_out"),
        Entry("model.norm.weight", "final_norm/scale"),
    ]
    if config.qkv_bias:
        rows += [Entry(f"{attn}.{x}_proj.bias", f"{blocks}/attn/{x}/bias", "heads") for x in "qkv"]
    if config.qk_norm:
        rows += [Entry(f"{attn}.{x}_norm.weight", f"{blocks}/attn/{x}_norm/scale") for x in "qk"]
    if config.post_norms:
        rows += [Entry(f"{block}.{theirs}_layernorm.weight", f"{blocks}/{ours}_post_norm/scale")
                 for theirs, ours in (("post_attention", "attn"), ("post_feedforward", "mlp"))]
    ignored = (r".*\.rotary_emb\.inv_freq",)
    if config.tie_embeddings:
        return Table(tuple(rows), (*ignored, r"lm_head\.weight"))
    return Table((*rows, Entry("lm_head.weight", "head/embedding")), ignored)


def _inputs(config: DecoderConfig) -> list[Entry]:
    """The input projections of a block; Phi-3 merges q, k, v into one tensor, gate and up too."""
    block, blocks = "model.layers.{i}", "blocks"
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    widths = {"self_attn": [n * config.head_dim for n in heads], "mlp": [config.d_ff] * 2}
    rows = []
    for room, names, fused in (("self_attn", "qkv", "qkv_proj"), ("mlp", ("gate", "up"),
                                                                  "gate_up_proj")):
        ends = list(accumulate(widths[room], initial=0))
        for name, part in zip(names, pairwise(ends), strict=True):
            ours = f"{blocks}/{room.removeprefix('self_')}/{name}/kernel"
            if config.family == "phi3":
                rows.append(Entry(f"{block}.{room}.{fused}.weight", ours, "linear_in",
                                  part=(*part, ends[-1])))
            else:
                rows.append(Entry(f"{block}.{room}.{name}_proj.weight", ours, "linear_in"))
    return rows


def bridge_table(fusion: str, projector: str, aligner: str = "none") -> Table:
    """A bridge's own parts, with the names of `modeling_jaxfusion.py`."""
    rows: list[Entry] = []
    if fusion == "global_softmax":
        rows += [Entry(f"fusion.{x}", f"fusion/{x}") for x in "wt"]
    if fusion == "transformer_softmax":
        rows += [Entry(f"fusion.{x}", f"fusion/{x}") for x in ("cls", "positions")]
        for x in "qkvo":
            rows += [Entry(f"fusion.{x}.weight", f"fusion/{x}_kernel", "linear_in"),
                     Entry(f"fusion.{x}.bias", f"fusion/{x}_bias")]
        for x in ("up", "down", "weigh"):
            rows += _dense(f"fusion.{x}", f"fusion/{x}")
        for x in ("attn_norm", "mlp_norm"):
            rows += _norm(f"fusion.{x}", f"fusion/{x}")
    if projector == "resampler":
        rows += [Entry("projector.latents", "projector/latents")]
        rows += [Entry(f"projector.{x}.weight", f"projector/{x}/kernel", "linear_in")
                 for x in ("q", "k", "v", "o", "out")]
        for x in ("feature_norm", "latent_norm", "norm"):
            rows += _norm(f"projector.{x}", f"projector/{x}")
    dense = {"linear": ("out",), "resampler": ("up", "down")}.get(projector, ("hidden", "out"))
    for x in dense:
        rows += _dense(f"projector.{x}", f"projector/{x}")
    if aligner != "none":
        rows += [Entry("aligner.gate", "aligner/gate")]
        for x in ("mix", "hidden", "out") if aligner == "mlp" else ("mix", "out"):
            rows += _dense(f"aligner.{x}", f"aligner/{x}")
    return Table((*rows, Entry("projector.end", "projector/end")))


# LangBridge's names of the projectors.
ALIGNMENTS = {"linear": "linear", "ffn": "ffn", "latent": "resampler"}


def langbridge_names(role: str, names: Iterable[str]) -> dict[str, str]:
    """LangBridge's names of a tower's tensors: usual name -> its name."""
    if role == "encoder":
        return {name: f"lb.enc.{name}" for name in names}
    return {name: f"lb.{name}" if name == "lm_head.weight"
            else f"lb.lm.{name.removeprefix('model.')}" for name in names}


def langbridge_table(projector: str) -> Table:
    """LangBridge's alignment modules (github.com/kaistAI/LangBridge, alignment_modules.py)."""
    start = "lb.alignment"
    if projector == "linear":
        rows = _dense(f"{start}.linear", "projector/out")
    elif projector == "ffn":
        rows = [*_dense(f"{start}.ffn.0", "projector/hidden"),
                *_dense(f"{start}.ffn.2", "projector/out")]
    else:
        attn, ffn = f"{start}.layers.0.0", f"{start}.layers.0.1"
        rows = [
            Entry(f"{start}.latents", "projector/latents"),
            *_norm(f"{attn}.norm_media", "projector/feature_norm"),
            *_norm(f"{attn}.norm_latents", "projector/latent_norm"),
            *(Entry(f"{attn}.to_{theirs}.weight", f"projector/{ours}/kernel", "linear_in")
              for theirs, ours in (("q", "q"), ("k", "k"), ("v", "v"), ("out", "o"))),
            *_dense(f"{ffn}.0", "projector/up"), *_dense(f"{ffn}.2", "projector/down"),
            Entry(f"{start}.out_proj.weight", "projector/out/kernel", "linear_in"),
            *_norm(f"{start}.norm", "projector/norm"),
        ]
    return Table((*rows, Entry(f"{start}.enc_eos", "projector/end")))


def mindmerger_table(start: str) -> Table:
    """MindMerger's mapping (github.com/CONE-MT/MindMerger), with names that begin with `start`."""
    return Table((
        *_dense(f"{start}mlp.linear1", "projector/hidden"),
        *_dense(f"{start}mlp.linear2", "projector/out"),
        Entry(f"{start}end_boundary", "projector/end", "vector"),
    ))


def _dense(theirs: str, ours: str) -> list[Entry]:
    return [Entry(f"{theirs}.weight", f"{ours}/kernel", "linear_in"),
            Entry(f"{theirs}.bias", f"{ours}/bias")]


def _norm(theirs: str, ours: str) -> list[Entry]:
    return [Entry(f"{theirs}.weight", f"{ours}/scale"), Entry(f"{theirs}.bias", f"{ours}/bias")]


def tower_table(config: EncoderConfig | DecoderConfig) -> Table:
    """The table of a tower's family."""
    return encoder_table(config) if isinstance(config, EncoderConfig) else decoder_table(config)
