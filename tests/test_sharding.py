"""Logical axes and the mesh."""

import pytest
from jax.sharding import PartitionSpec

from jaxfusion.errors import InputError
from jaxfusion.sharding.mesh import make_mesh
from jaxfusion.sharding.rules import spec


def test_names_resolve_and_misspelt_ones_raise():
    assert spec(("embed", "heads", "head_dim")) == PartitionSpec("fsdp", "tensor", None)
    with pytest.raises(InputError, match=r"unknown logical axis 'head' \(did you mean 'heads'"):
        spec(("embed", "head"))


def test_a_mesh_fills_in_and_must_fit():
    assert make_mesh().shape == {"data": 1, "fsdp": 1, "tensor": 1}
    with pytest.raises(InputError, match=r"tensor=3 does not match 1 device\(s\)"):
        make_mesh(tensor=3)
