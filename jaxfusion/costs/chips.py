"""Peak performance of chips, and TPU slices to compile for without the hardware."""

import importlib.util
import os
from dataclasses import dataclass

import jax

from jaxfusion.cli import keep_libtpu_quiet
from jaxfusion.errors import InputError, first_line

GIB = 2.0**30


@dataclass(frozen=True)
class Chip:
    """Published peaks of one chip.

    Attributes:
      flops: bfloat16 FLOP per second.
      memory: bytes available to a program.
      bandwidth: bytes per second to and from that memory.
      network: bytes per second that one chip sends on a ring, in both directions together.
    """

    flops: float
    memory: float
    bandwidth: float
    network: float


# Share of a GPU's memory that train.py lets jax reserve.
GPU_SHARE = 0.92
# By jax's device kind. TPUs: cloud.google.com/tpu/docs (system architecture), with the memory that
# the compiler allows (30.75 GiB of v4's 32); a ring uses two links. GPUs: NVIDIA's data sheets of
# the SXM modules, dense, NVLink in one direction.
CHIPS = {
    "TPU v4": Chip(275e12, 30.75 * GIB, 1.228e12, 90e9),
    "TPU v5 lite": Chip(197e12, 15.75 * GIB, 0.819e12, 90e9),
    "TPU v5": Chip(459e12, 95.73 * GIB, 2.765e12, 180e9),
    "TPU v5p": Chip(459e12, 95.73 * GIB, 2.765e12, 180e9),
    "TPU v6 lite": Chip(918e12, 31.25 * GIB, 1.638e12, 180e9),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 79.1 * GPU_SHARE * GIB, 2.039e12, 300e9),
    "NVIDIA H100 80GB HBM3": Chip(989e12, 79.1 * GPU_SHARE * GIB, 3.35e12, 450e9),
    "NVIDIA H200": Chip(989e12, 139.8 * GPU_SHARE * GIB, 4.8e12, 450e9),
}

# Grids by number of chips. Names of v4 and v5p slices count cores, two per chip.
CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8",
         256: "4x8x8", 512: "8x8x8"}
SQUARES = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16",
           256: "16x16"}
KINDS = {"v4": (CUBES, 2), "v5p": (CUBES, 2), "v5e": (SQUARES, 1), "v6e": (SQUARES, 1)}


def topologies() -> list[str]:
    """The valid names for `topology_devices`."""
    return [f"{kind}-{chips * cores}" for kind, (grids, cores) in KINDS.items() for chips in grids]


def topology_devices(name: str) -> list[jax.Device]:
    """The devices of a TPU slice such as `v4-32`, for compilation only.

    Needs `libtpu` (the extra `tpu`), but no TPU.

    Raises:
      InputError: no such slice, or no `libtpu`.
    """
    if name not in topologies():
        raise InputError(f"unknown topology '{name}'; known: {', '.join(topologies())}")
    keep_libtpu_quiet()
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing here holds a TPU
    from jax.experimental.topologies import get_topology_desc

    if importlib.util.find_spec("libtpu") is None:
        raise InputError("the TPU compiler is missing; install it with: pip install "
                         "'jaxfusion[tpu]'")
    kind, _, size = name.partition("-")
    grids, cores = KINDS[kind]
    chips = int(size) // cores
    # A host has four chips; the smallest slices of v5e and v6e have one, four or eight on one host.
    host = {1: (1, 1, 1), 8: (2, 4, 1)}.get(chips, (2, 2, 1)) if cores == 1 else (2, 2, 1)
    try:
        description = get_topology_desc(
            platform="tpu", topology_name=f"{kind}:{grids[chips]}", num_slices=1,
            chip_config_name="megacore" if cores == 2 else "default", chips_per_host_bounds=host,
        )
    except Exception as error:
        raise InputError(f"libtpu has no devices for '{name}': {first_line(error)}") from None
    return list(description.devices)


def chip_of(device: jax.Device) -> Chip | None:
    """The chip's peaks, if known."""
    return CHIPS.get(device.device_kind)
