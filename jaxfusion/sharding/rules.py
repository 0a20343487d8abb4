"""Logical axis names of parameters and activations, and the mesh axes they map to: one table."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from jaxfusion.errors import InputError, near_match

# Logical name -> mesh axis (or axes). None: held whole on every device.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "rows": ("data", "fsdp"),  # of a batch for evaluation, which need not divide
    "looked_up": "data",  # the batch while a table that is split over fsdp is read
    "length": None,
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "norm": None,
    "buckets": None,
    # Of fusion and projector: with what the optimiser keeps, hundreds of megabytes.
    "bridge_in": None,
    "bridge_out": "fsdp",
}


def spec(names: Sequence[str | None]) -> PartitionSpec:
    """The PartitionSpec of an array whose axes bear these logical names (None: not sharded).

    Raises:
      InputError: a name is not in `RULES`; replicating it silently would hide the mistake.
    """
    for name in names:
        if name is not None and name not in RULES:
            raise InputError(f"unknown logical axis '{name}'{near_match(name, RULES)}")
    return PartitionSpec(*(None if name is None else RULES[name] for name in names))


def fitting_spec(
    names: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """As `spec`, but an axis that its devices cannot share evenly is held whole.

    Vocabularies of 32,001 rows are common, and so are fewer key heads than tensor devices. A batch
    is not: it has to divide.
    """
    axes = [
        axis if axis is None or name == "batch" or size % _devices(axis, mesh) == 0 else None
        for name, axis, size in zip(names, spec(names), shape, strict=True)
    ]
    return PartitionSpec(*axes)


def _devices(axis: str | tuple[str, ...], mesh: Mesh | AbstractMesh) -> int:
    names = (axis,) if isinstance(axis, str) else axis
    return math.prod(mesh.shape[name] for name in names)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Pins an activation's sharding by logical names; without a mesh set, returns `x` as it is."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        spec(names)  # names are checked without a mesh, too
        return x
    return jax.lax.with_sharding_constraint(x, fitting_spec(names, x.shape, mesh))


def replicated(tree: Any) -> Any:
    """Arrays that every device, and so every process, holds whole."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec()), tree)
