"""Maps logical axis names of parameters and activations to mesh axes, in one table."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from jaxfusion.errors import InputError, near_match

# Logical name -> mesh axis (or axes). None: replicated.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "rows": ("data", "fsdp"),  # of an evaluation batch, which need not divide evenly
    "looked_up": "data",  # the batch during a look-up in a table that is sharded over fsdp
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
    # Of a bridge's own parts: with their optimiser state, hundreds of megabytes.
    "bridge_in": None,
    "bridge_out": "fsdp",
}


def spec(names: Sequence[str | None]) -> PartitionSpec:
    """The PartitionSpec of an array whose axes have these logical names (None: not sharded).

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
    """As `spec`, but an axis that does not divide evenly over its devices is replicated.

    That is common: vocabularies of 32,001 rows, or fewer key heads than tensor devices. A training
    batch must divide.
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
    """Constrains an activation's sharding by logical names; without a mesh, returns `x`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        spec(names)  # check the names even without a mesh
        return x
    return jax.lax.with_sharding_constraint(x, fitting_spec(names, x.shape, mesh))


def replicated(tree: Any) -> Any:
    """Replicates arrays on every device."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, PartitionSpec()), tree)
