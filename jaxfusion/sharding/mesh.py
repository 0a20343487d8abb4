"""The device mesh: axes `data`, `fsdp`, `tensor`."""

import math

import jax
from jax.sharding import AxisType, Mesh, NamedSharding

from jaxfusion.errors import InputError
from jaxfusion.sharding.rules import spec

AXES = ("data", "fsdp", "tensor")


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over all devices; one size may be -1 and is filled in.

    Raises:
      InputError: the sizes' product is not the number of devices.
    """
    sizes, devices = [data, fsdp, tensor], jax.device_count()
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) == 1 and known > 0 and devices % known == 0:
        sizes[sizes.index(-1)] = devices // known
    if min(sizes) < 1 or math.prod(sizes) != devices:
        raise InputError(
            f"mesh data={data} fsdp={fsdp} tensor={tensor} does not fit {devices} device(s); "
            "their product must be the number of devices, and one of them may be -1"
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def sharding(mesh: Mesh, *names: str | None) -> NamedSharding:
    """The NamedSharding of an array whose axes bear these logical names."""
    return NamedSharding(mesh, spec(names))
