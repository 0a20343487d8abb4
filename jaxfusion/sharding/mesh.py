"""The device mesh: axes `data`, `fsdp`, `tensor`."""

import math
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding

from jaxfusion.errors import InputError
from jaxfusion.sharding.rules import spec

AXES = ("data", "fsdp", "tensor")


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh over `devices` (default: all); one size may be -1 and is inferred.

    Raises:
      InputError: the sizes' product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes, count = [data, fsdp, tensor], len(devices)
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) == 1 and known > 0 and count % known == 0:
        sizes[sizes.index(-1)] = count // known
    if min(sizes) < 1 or math.prod(sizes) != count:
        raise InputError(
            f"mesh data={data} fsdp={fsdp} tensor={tensor} does not match {count} device(s); "
            "their product must be the number of devices, and one of them may be -1"
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES),
                         devices=devices)


def sharding(mesh: Mesh, *names: str | None) -> NamedSharding:
    """The NamedSharding of an array whose axes have these logical names."""
    return NamedSharding(mesh, spec(names))
