"""Where an LLM keeps its languages: means of the last prompt token's states, layer by layer."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from safetensors import safe_open
from safetensors.numpy import save_file

from jaxfusion.data.batching import TokenRow, find_bare_shapes, in_order
from jaxfusion.data.tokenizers import Tokenizers
from jaxfusion.errors import InputError
from jaxfusion.lens.subspace import Subspaces, displacements, factorise
from jaxfusion.nn.decoder import Decoder
from jaxfusion.sharding.rules import replicated


@dataclass(frozen=True)
class Probe:
    """Means and variances of each language's states.

    Attributes:
      languages: K of them, the central one first.
      means, variances: [L K E], float64; layer l is `h_l` as Hugging Face numbers states, the last
        after the final norm.
      rows: prompts of each language.
    """

    languages: tuple[str, ...]
    means: Float[np.ndarray, "L K E"]
    variances: Float[np.ndarray, "L K E"]
    rows: int

    @property
    def layers(self) -> int:
        return len(self.means)

    def subspaces(self, layer: int, rank: int | None = None) -> Subspaces:
        """Of layer 1 … L.

        Raises:
          InputError: there is no such layer, or the languages have no such rank.
        """
        if not 1 <= layer <= self.layers:
            raise InputError(f"layer {layer} is none of 1 to {self.layers}")
        return factorise(self.means[layer - 1], rank)

    def displacements(self, layer: int, rank: int | None = None) -> Float[np.ndarray, "K E"]:
        """`Δ_k` of every language at a layer; 0 for the central one."""
        return displacements(self.subspaces(layer, rank), self.means[layer - 1], 0)


def probe(
    decoder: Decoder, params: Any, rows: dict[str, Sequence[TokenRow]], tokenizers: Tokenizers,
    buckets: Sequence[int], batch_size: int,
) -> Probe:
    """Reads every prompt once; of the states only sums are kept.

    Args:
      params: of the decoder. rows: prompts by language, the central one first.
    """
    read = jax.jit(lambda params, *x: replicated(
        decoder.apply({"params": params}, *x, method="states_at")))
    means, variances = [], []
    for texts in rows.values():
        shapes = find_bare_shapes(texts, buckets)
        total = square = 0.0
        for numbers, batch in in_order(texts, shapes, tokenizers, batch_size):
            slots = last_slots(batch.dec_segments)
            states = read(params, batch.dec_tokens, batch.dec_positions, batch.dec_segments, slots)
            states = np.asarray(states, np.float64)[:, : len(numbers)]
            total = total + states.sum(axis=1)
            square = square + (states**2).sum(axis=1)
        means.append(total / len(texts))
        variances.append(square / len(texts) - means[-1] ** 2)
    return Probe(tuple(rows), np.stack(means, axis=1), np.stack(variances, axis=1),
                 len(next(iter(rows.values()))))


def last_slots(segments: np.ndarray) -> np.ndarray:
    """The last real slot of every row, wherever the padding is."""
    length = segments.shape[1]
    return length - 1 - np.argmax(segments[:, ::-1] != 0, axis=1)


def save(found: Probe, file: Path, about: dict[str, Any]) -> None:
    """Writes a probe as safetensors with what made it; per layer also `m_a`, `M_s` and `Δ`."""
    tensors = {"means": found.means, "variances": found.variances}
    for layer in range(1, found.layers + 1):
        spaces = found.subspaces(layer)
        tensors |= {f"layer.{layer}.agnostic": spaces.agnostic,
                    f"layer.{layer}.specific": spaces.specific,
                    f"layer.{layer}.singular_values": spaces.singular_values,
                    f"layer.{layer}.displacements": found.displacements(layer)}
    about = {"languages": json.dumps(found.languages), "rows": str(found.rows),
             "about": json.dumps(about)}
    partial_file = file.with_name(f".{file.name}.partial")
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, partial_file, about)
    partial_file.rename(file)


def load(file: Path) -> Probe:
    """Reads what `save` wrote."""
    with safe_open(file, framework="numpy") as opened:
        about = opened.metadata()
        return Probe(tuple(json.loads(about["languages"])), opened.get_tensor("means"),
                     opened.get_tensor("variances"), int(about["rows"]))
