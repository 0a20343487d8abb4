"""Compares a full training step of the bridge: ours, PyTorch's, and ours without its ideas.

    python benchmarks/train_step.py --size small --out train_step.json

Encoder and LLM are frozen, the Transformer Softmax and the projector train; the weights are random
and the same for all, float32, no dropout, AdamW with clipped gradients. All take the same batch,
one of an epoch over examples with lengths like XNLI's. The contenders:

  jaxfusion       collapsed fusion, logits only at target slots, examples packed into rows
  unpacked        the same with one example per row, padded to a bucket
  torch           the fusion as written, logits at every slot, padded to the longest row
  plain_jax       the same as torch, compiled by XLA: separates our ideas' gain from the compiler's
  collapsed_only  plain_jax with the collapsed fusion
  targets_only    plain_jax with logits only at target slots
"""

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch_reference
from flax import linen as nn
from flax import traverse_util
from timing import alternate, compiled, machine, medians, parser, report, show, speedup
from transformers import LlamaForCausalLM, MT5EncoderModel
from transformers.utils.logging import disable_progress_bar

from jaxfusion.data.batching import Shapes, TokenRow, collate, find_shapes
from jaxfusion.data.packing import find_packing, stratified_plan
from jaxfusion.data.tokenizers import Tokenizers
from jaxfusion.fields import DataConfig, GroupConfig, OptimizerConfig
from jaxfusion.miniatures.checkpoints import SIZES, random_params, write_random_tower
from jaxfusion.nn.bridge import Batch, Bridge, Params
from jaxfusion.nn.decoder import Decoder, DecoderConfig
from jaxfusion.nn.encoder import Encoder, EncoderConfig
from jaxfusion.nn.projector import Projector
from jaxfusion.training.optimizer import group_of_each, make_optimizer
from jaxfusion.training.state import State
from jaxfusion.training.step import make_train_step

# Vocabulary sizes: mT5's own takes most of a small encoder, and costs nothing but memory.
VOCABULARIES = {"pocket": (32_000, 32_000), "small": (250_112, 32_000)}
OPTIMIZER = OptimizerConfig(schedule="constant", warmup_fraction=0.0)
EPOCH = 32  # batches, whose lengths decide the shapes
BOS, EOS = 1, 2
MAX_TOKENS = 200  # of a query, as the papers train
TOKENIZERS = Tokenizers(None, SimpleNamespace(bos_token_id=BOS, eos_token_id=EOS), bos=True)
TOLERANCE = 1e-4  # by which losses may differ from PyTorch's, relative


class WrittenFusion(Bridge):
    """The bridge with the fusion as written by its authors."""

    def fuse(self, params: Params, batch: Batch, key: jax.Array | None = None):
        states = self.encoder.apply(
            {"params": params["encoder"]}, batch.enc_tokens, batch.enc_segments, states=True
        )
        fused, weights = written_fusion(params["fusion"], jnp.moveaxis(states, 0, 2))
        return jnp.where((batch.enc_segments != 0)[:, :, None], fused, 0.0), weights


class FullLogits(Bridge):
    """The bridge with the usual loss: logits at every slot of the decoder."""

    def loss(self, params: Params, batch: Batch, key: jax.Array | None = None):
        inputs, _ = self.read(params, batch, key)
        hidden, _ = self.decode(params, inputs, batch.dec_positions, batch.dec_segments)
        log_probs = jax.nn.log_softmax(self.logits(params, hidden), axis=-1)
        at = (jnp.arange(len(inputs))[:, None], batch.target_slots)
        labels = jnp.zeros(inputs.shape[:2], jnp.int32).at[at].add(batch.target_tokens)
        wanted = jnp.zeros(inputs.shape[:2], bool).at[at].max(batch.target_mask)
        taken = jnp.take_along_axis(log_probs, labels[:, :, None], axis=-1)[..., 0]
        count = jnp.sum(wanted)
        return -jnp.sum(jnp.where(wanted, taken, 0.0)) / count, count


class PlainBridge(WrittenFusion, FullLogits):
    """Neither of our ideas."""


def written_fusion(p: Params, states: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The full post-norm layer over `[cls, h_1 + p_1, …, h_L + p_L]` of every token.

    Args:
      p: the fusion's parameters.
      states: [B S L D], as PyTorch stacks them.

    Returns:
      Features [B S D] and layer weights [B S L].
    """
    batch, length, _, width = states.shape
    cls = jnp.broadcast_to(p["cls"], (batch, length, 1, width))
    x = jnp.concatenate([cls, states + p["positions"]], axis=2)
    q, k, v = (x @ p[f"{name}_kernel"] + p[f"{name}_bias"] for name in "qkv")
    scores = jnp.einsum("bsld,bsmd->bslm", q, k) / math.sqrt(width)
    mixed = jnp.einsum("bslm,bsmd->bsld", jax.nn.softmax(scores, axis=-1), v)
    x = _layer_norm(p["attn_norm"], x + mixed @ p["o_kernel"] + p["o_bias"])
    hidden = jax.nn.relu(_linear(p["up"], x))
    x = _layer_norm(p["mlp_norm"], x + _linear(p["down"], hidden))
    weights = jax.nn.softmax(_linear(p["weigh"], x[:, :, 0]), axis=-1)
    return jnp.einsum("bsl,bsld->bsd", weights, states), weights


def _linear(p: Params, x: jax.Array) -> jax.Array:
    return x @ p["kernel"] + p["bias"]


def _layer_norm(p: Params, x: jax.Array) -> jax.Array:
    return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False).apply({"params": p}, x)


class JaxTrainer:
    """Training steps of a bridge; every call advances the (donated) state by one step."""

    def __init__(self, kind: type[Bridge], towers, params: Params, batch: Batch):
        bridge, flat = make_bridge(kind, towers), traverse_util.flatten_dict(params, sep="/")
        groups = group_of_each(flat, OPTIMIZER.groups)
        optimizer = make_optimizer(OPTIMIZER, groups, steps=1)
        trainable = {path: jnp.copy(flat[path]) for path in groups}
        self.state = State(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable))
        frozen = {path: x for path, x in flat.items() if path not in groups}
        self.rest = (frozen, batch, jax.random.key(0))
        step = make_train_step(bridge.loss, optimizer, {})
        self.program, self.compile_seconds = compiled(step, self.state, *self.rest)

    def __call__(self) -> float:
        """One step; returns the loss before it."""
        self.state, metrics = jax.block_until_ready(self.program(self.state, *self.rest))
        self.loss = float(metrics["loss"])
        return self.loss


class TorchTrainer:
    """Training steps of the PyTorch reference."""

    compile_seconds = 0.0

    def __init__(self, towers, params: Params, rows: list[TokenRow]):
        self.bridge = load_torch(towers, params)
        self.rows = ([row.query for row in rows], [row.target for row in rows])
        self.trained = [p for p in self.bridge.parameters() if p.requires_grad]
        group: GroupConfig = OPTIMIZER.groups["bridge"]
        self.optimizer = torch.optim.AdamW(
            self.trained, group.learning_rate, (OPTIMIZER.b1, OPTIMIZER.b2), OPTIMIZER.eps,
            group.weight_decay,
        )

    def __call__(self) -> float:
        """One step; returns the loss before it."""
        self.optimizer.zero_grad()
        loss = self.bridge(*self.rows, BOS)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, OPTIMIZER.clip_norm)
        self.optimizer.step()
        self.loss = loss.item()
        return self.loss


def make_bridge(kind: type[Bridge], towers: tuple[EncoderConfig, DecoderConfig]) -> Bridge:
    """A bridge of this kind over towers of these shapes."""
    encoder, decoder = towers
    return kind(
        Encoder(encoder), Decoder(decoder), Projector("linear", decoder.d_model, end_std=0.0),
        "transformer_softmax", fusion_dropout=0.0,
    )


def make_params(towers: tuple[EncoderConfig, DecoderConfig]) -> Params:
    """Random parameters of all four parts; `load_torch` reads the same towers."""
    trained = nn.unbox(make_bridge(Bridge, towers).init(jax.random.key(0)))
    encoder, decoder = (random_params(config, seed=0) for config in towers)
    return {"encoder": encoder, "decoder": decoder, **trained}


def load_torch(
    towers: tuple[EncoderConfig, DecoderConfig], params: Params
) -> torch_reference.TorchBridge:
    """The PyTorch bridge with the same parameters; the towers are read from Hugging Face files."""
    with TemporaryDirectory() as place:
        paths = [Path(place) / role for role in ("encoder", "decoder")]
        for path, config in zip(paths, towers, strict=True):
            path.mkdir()
            write_random_tower(path, config, seed=0)
        encoder = MT5EncoderModel.from_pretrained(paths[0], dropout_rate=0.0)
        llm = LlamaForCausalLM.from_pretrained(paths[1])
    fusion = torch_reference.TransformerSoftmax(
        towers[0].num_layers, towers[0].d_model, dropout=0.0
    )
    bridge = torch_reference.TorchBridge(encoder, llm, fusion)
    torch_reference.copy_params(params, fusion=fusion, bridge=bridge)
    return bridge.train()


def make_examples(number: int, towers: tuple[EncoderConfig, DecoderConfig]) -> list[TokenRow]:
    """Examples with lengths like XNLI's: queries of 45 tokens on average, answers of 3 or 4."""
    rng = np.random.default_rng(0)
    spread = 0.5
    drawn = rng.lognormal(math.log(45) - spread**2 / 2, spread, number)
    lengths = np.clip(np.rint(drawn), 8, MAX_TOKENS).astype(int)

    def draw(vocab_size: int, n: int, end: int) -> list[int]:
        return [*rng.integers(3, vocab_size, n).tolist(), end]

    encoder, decoder = (config.vocab_size for config in towers)
    return [
        TokenRow(draw(encoder, n - 1, end=1), [], draw(decoder, int(rng.integers(3, 5)), EOS))
        for n in lengths
    ]


def make_batches(
    examples: list[TokenRow], size: int
) -> tuple[list[TokenRow], dict[str, Batch]]:
    """One batch of an epoch: its examples, and their layouts by name.

    The shapes of `packed` and `bucketed` fit the full epoch; `longest` fits only this batch.
    """
    bos = len(TOKENIZERS.start)
    plan = stratified_plan(np.array([len(row.query) for row in examples]), size, seed=0, epoch=0)
    rows = [examples[i] for i in plan[0]]
    targets = max(len(row.target) for row in rows)
    layouts = {
        "packed": find_packing(examples, size, bos, seed=0, longest_row=2 * MAX_TOKENS),
        "bucketed": find_shapes(examples, DataConfig().buckets),
        "longest": Shapes((max(len(row.query) for row in rows),), (targets,), targets),
    }
    return rows, {
        name: collate(*layout.place(rows, bos, size), TOKENIZERS)
        for name, layout in layouts.items()
    }


def make_contenders(
    towers: tuple[EncoderConfig, DecoderConfig], rows: list[TokenRow], batches: dict[str, Batch]
) -> dict[str, Callable[[], float]]:
    """All contenders at the start of their training."""
    params = make_params(towers)
    return {
        "jaxfusion": JaxTrainer(Bridge, towers, params, batches["packed"]),
        "unpacked": JaxTrainer(Bridge, towers, params, batches["bucketed"]),
        "torch": TorchTrainer(towers, params, rows),
        "plain_jax": JaxTrainer(PlainBridge, towers, params, batches["longest"]),
        "collapsed_only": JaxTrainer(FullLogits, towers, params, batches["longest"]),
        "targets_only": JaxTrainer(WrittenFusion, towers, params, batches["longest"]),
    }


def compare(losses: dict[str, float]) -> dict[str, float]:
    """The losses, and the largest relative difference from PyTorch's.

    Raises:
      SystemExit: the contenders do not compute the same.
    """
    worst = max(abs(loss / losses["torch"] - 1) for loss in losses.values())
    if worst > TOLERANCE:
        sys.exit(f"error: losses differ by {worst:.1e}, at most {TOLERANCE} is allowed: {losses}")
    return {**losses, "largest_relative_difference": worst}


def measure(
    contenders: dict[str, Callable[[], float]], examples: int, repeats: int
) -> dict[str, Any]:
    """Checks that all contenders have the same loss, times them, and checks once more."""
    first = compare({name: step() for name, step in contenders.items()})
    seconds = alternate(contenders, repeats)
    median = medians(seconds)
    return {
        "first_loss": first,
        "last_loss": compare({name: step.loss for name, step in contenders.items()}),
        "compile_seconds": {name: step.compile_seconds for name, step in contenders.items()},
        "seconds": seconds,
        "median_seconds": median,
        "examples_per_second": {name: examples / time for name, time in median.items()},
        "jaxfusion_times_faster_than": {
            name: speedup(seconds, "jaxfusion", name) for name in contenders if name != "jaxfusion"
        },
    }


def main() -> None:
    flags = parser(__doc__, repeats=7)
    flags.add_argument("--size", choices=list(VOCABULARIES), default="pocket")
    flags.add_argument("--batch", type=int, default=8, help="examples in a batch")
    args = flags.parse_args()
    disable_progress_bar()
    towers = tuple(
        replace(config, vocab_size=size)
        for config, size in zip(SIZES[args.size], VOCABULARIES[args.size], strict=True)
    )
    rows, batches = make_batches(make_examples(EPOCH * args.batch, towers), args.batch)
    result = {
        "benchmark": "train_step", "machine": machine(), "size": args.size,
        "encoder_lengths": [len(row.query) for row in rows],
        "decoder_rows_and_slots": {name: x.dec_tokens.shape for name, x in batches.items()},
    }
    result |= measure(make_contenders(towers, rows, batches), args.batch, args.repeats)
    faster = result["jaxfusion_times_faster_than"]
    table = [
        [name, f"{1e3 * time:.0f} ms", f"{result['examples_per_second'][name]:.1f}",
         f"{faster[name]['of_medians']:.2f}×" if name in faster else "",
         f"{result['compile_seconds'][name]:.1f} s"]
        for name, time in result["median_seconds"].items()
    ]
    show(f"Training step, size {args.size}, {args.batch} examples",
         ["", "step", "examples/s", "jaxfusion is faster", "compilation"], table)
    report(result, args.out)


if __name__ == "__main__":
    main()
