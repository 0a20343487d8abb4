"""A trained bridge, opened once and read layer by layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from jaxfusion.data.sources import Example
from jaxfusion.evaluation.layers import layer_weigher, mean_states, token_weights
from jaxfusion.nn.bridge import Params
from jaxfusion.sharding.mesh import make_mesh
from jaxfusion.training.evaluate import load_config, load_trained
from jaxfusion.training.state import Model, merge


@dataclass(frozen=True)
class Opened:
    """A workdir's best checkpoint on the devices; see `open_bridge`."""

    model: Model
    params: Params
    mesh: Mesh

    def layers_of(self, text: str) -> dict[str, Any] | None:
        """`tokens` of a text and their `weights`, as `token_weights`."""
        return self._read(token_weights, _example(text))

    def weights_of(self, texts: Sequence[str]) -> list[float] | None:
        """The mean weight of each layer over the texts' tokens, as `layer_weigher`."""
        weigh = layer_weigher(*self._inside)
        with jax.set_mesh(self.mesh):
            return weigh and weigh(self.params, [_example(x) for x in texts])

    def states_of(self, texts: Sequence[str]) -> Float[np.ndarray, "L N D"]:
        """Every text's mean state in each layer of the encoder, as `mean_states`."""
        return self._read(mean_states, [_example(x) for x in texts])

    @property
    def _inside(self):
        return self.model.bridge, self.model.tokenizers, self.model.config.eval

    def _read(self, read, examples):
        with jax.set_mesh(self.mesh):
            return read(*self._inside, self.params, examples)


def _example(text: str) -> Example:
    return Example(text, "", -1)


def open_bridge(workdir: Path) -> Opened:
    """Loads a trained bridge.

    Raises:
      InputError: no such run, or no checkpoint in it.
    """
    config = load_config(workdir)
    mesh = make_mesh(**vars(config.mesh))
    with jax.set_mesh(mesh):
        _, model = load_trained(config, workdir, mesh)
    return Opened(model, merge(model.trainable, model.frozen), mesh)
