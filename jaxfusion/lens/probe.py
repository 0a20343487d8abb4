"""Probes an LLM's languages: mean states of the last prompt token, layer by layer."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jaxtyping import Array, Float
from safetensors import SafetensorError, safe_open

from jaxfusion.data.batching import TokenRow, find_bare_shapes, find_shapes, in_order
from jaxfusion.data.tokenizers import Tokenizers
from jaxfusion.errors import InputError, first_line
from jaxfusion.files import read_checked, write_checked
from jaxfusion.lens.subspace import Subspaces, directions, displacements, factorise
from jaxfusion.nn.bridge import Batch, Bridge, Params
from jaxfusion.sharding.rules import constrain, replicated
from jaxfusion.training.origin import PARTS, different, is_known

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Probe:
    """Means and variances of each language's states.

    Attributes:
      languages: K of them, the central one first.
      means, variances: [L K E], float64; layer l is `h_l` in Hugging Face's numbering, the last one
        after the final norm.
      rows: prompts of each language.
    """

    languages: tuple[str, ...]
    means: Float[np.ndarray, "L K E"]
    variances: Float[np.ndarray, "L K E"]
    rows: int

    @property
    def layers(self) -> int:
        """The number of layers, L."""
        return len(self.means)

    def subspaces(self, layer: int, rank: int | None = None) -> Subspaces:
        """The subspaces of layer 1 … L.

        Raises:
          InputError: no such layer, or the rank is too high for the languages.
        """
        if not 1 <= layer <= self.layers:
            raise InputError(f"layer {layer} is not in 1 to {self.layers}")
        return factorise(self.means[layer - 1], rank)

    def displacements(self, layer: int, rank: int | None = None) -> Float[np.ndarray, "K E"]:
        """`Δ_k` of every language at a layer; 0 for the central one."""
        return displacements(self.subspaces(layer, rank), self.means[layer - 1], 0)


class Sums:
    """Streaming count, mean and squared deviations of one language's states (Chan, Golub and
    LeVeque, 1979), so that no large sums cancel."""

    def __init__(self):
        self.rows, self.mean, self.square = 0, 0.0, 0.0

    def add(self, states: Float[np.ndarray, "L B E"]) -> None:
        """Adds the states of a batch of rows."""
        rows, mean = states.shape[1], states.mean(axis=1)
        total, delta = self.rows + rows, mean - self.mean
        self.square = self.square + ((states - mean[:, None]) ** 2).sum(axis=1) + (
            delta**2 * (self.rows * rows / total))
        self.mean, self.rows = self.mean + delta * (rows / total), total

    @staticmethod
    def probe(languages: tuple[str, ...], sums: "Sequence[Sums]") -> Probe:
        """The probe from the sums of each language.

        Raises:
          InputError: a mean that is not finite.
        """
        for name, language_sums in zip(languages, sums, strict=True):
            if len(bad := np.flatnonzero(~np.isfinite(language_sums.mean).all(axis=1))):
                raise InputError(f"the states of '{name}' overflow in layer {bad[0] + 1}; set "
                                 "decoder.dtype='float32', and do not use lens.recipe="
                                 "'paper_code', which reads in float16")
        return Probe(languages, np.stack([x.mean for x in sums], axis=1),
                     np.stack([x.square / x.rows for x in sums], axis=1), sums[0].rows)


def probe(
    bridge: Bridge, params: Params, rows: dict[str, Sequence[TokenRow]], tokenizers: Tokenizers,
    buckets: Sequence[int], batch_size: int,
) -> Probe:
    """Reads every prompt once and accumulates its states.

    Args:
      bridge: the LLM alone, or behind a bridge.
      rows: prompts by language, the central one first.
    """
    read = _reader(bridge)
    find = find_bare_shapes if bridge.encoder is None else find_shapes
    sums = []
    for texts in rows.values():
        language_sums = Sums()
        for numbers, batch in in_order(texts, find(texts, buckets), tokenizers, batch_size):
            states = np.asarray(read(params, batch), np.float64)
            language_sums.add(states[:, : len(numbers)])
        sums.append(language_sums)
    return Sums.probe(tuple(rows), sums)


@lru_cache(4)  # probes before and after share their compiled programs
def _reader(bridge: Bridge) -> Callable[[Params, Batch], Array]:
    return jax.jit(lambda *x: replicated(last_states(bridge, *x)))


def last_states(bridge: Bridge, params: Params, batch: Batch) -> Float[Array, "L B E"]:
    """`h_1 … h_L` at every row's last real slot, with padding on either side."""
    batch = jax.tree.map(lambda x: constrain(x, "rows", None), batch)
    length = batch.dec_segments.shape[1]
    last = length - 1 - jnp.argmax(batch.dec_segments[:, ::-1] != 0, axis=1)
    read = jax.nn.one_hot(last, length)[:, None]
    return bridge.states(params, batch, read)[0][:, :, 0]


def save_probe(probe: Probe, file: Path, identity: dict[str, str], about: dict[str, Any]) -> None:
    """Writes a probe as safetensors; for each layer also `m_a`, `M_s` and `Δ`.

    Args:
      identity: of model and tokenizer, checked by `load_probe`.
      about: the config that made it.
    """
    tensors = {"means": probe.means, "variances": probe.variances}
    for layer in range(1, probe.layers + 1):
        rank = directions(probe.means[layer - 1])
        spaces = probe.subspaces(layer, rank)
        tensors |= {f"layer.{layer}.agnostic": spaces.agnostic,
                    f"layer.{layer}.specific": spaces.specific,
                    f"layer.{layer}.singular_values": spaces.singular_values,
                    f"layer.{layer}.displacements": probe.displacements(layer, rank)}
    header = {"languages": json.dumps(probe.languages), "rows": str(probe.rows),
              "identity": json.dumps(identity), "about": json.dumps(about)}
    write_checked(file, safetensors.numpy.save(
        {name: np.ascontiguousarray(x) for name, x in tensors.items()}, header))


def load_probe(file: Path, languages: tuple[str, ...], identity: dict[str, str]) -> Probe:
    """Reads what `save_probe` wrote.

    Raises:
      InputError: the probe is missing or damaged, or has other languages, model or tokenizer.
    """
    try:
        read_checked(file, "remove it to probe again")
    except OSError as error:
        raise InputError(f"{file} is not a probe of a Lens run: {first_line(error)}") from None
    try:
        with safe_open(file, framework="numpy") as opened:
            header = opened.metadata()
            probe = Probe(tuple(json.loads(header["languages"])), opened.get_tensor("means"),
                          opened.get_tensor("variances"), int(header["rows"]))
            saved_identity = json.loads(header["identity"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file} is not a probe of a Lens run: {first_line(error)}") from None
    if not is_known(saved_identity, identity):
        logger.warning("%s has no record of the model that it was made with: whether it is this "
                       "one is not known", file)
    elif ("bridge" in saved_identity) != ("bridge" in identity):
        saved_identity, identity = ({"bridge": "none", **x} for x in (saved_identity, identity))
    for part in different(saved_identity, identity):
        raise InputError(f"{file} was made with {PARTS[part]} than this config's; remove "
                         "data.probe to probe again, or, if it is the workdir's own, start again "
                         "with another --workdir")
    if probe.languages != languages:
        raise InputError(f"{file} has languages {', '.join(probe.languages)}, expected "
                         f"{', '.join(languages)}, the central language first")
    return probe
