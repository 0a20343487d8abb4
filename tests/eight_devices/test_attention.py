"""Pallas kernels on the rows and heads of each of eight devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import relative

from jaxfusion.nn.attention import Pattern, pallas_attention, plain_attention, usable
from jaxfusion.sharding.mesh import make_mesh


@pytest.mark.parametrize("keys", [4, 1])
def test_kernels_run_on_every_devices_part(keys):
    """Also where key heads are fewer than `tensor` devices."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    q, k, v = draw(4, 40, 4, 16), draw(4, 40, keys, 16), draw(4, 40, keys, 16)
    ids = jnp.asarray(np.repeat([[1] * 30 + [2] * 6 + [0] * 4], 4, axis=0))
    back = np.arange(40)[:, None] - np.arange(40)
    mask = (ids[:, :, None] == ids[:, None]) & (ids != 0)[:, None] & (back >= 0)
    plain = plain_attention(q, k, v, mask, scale=0.25)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        found = jax.jit(lambda *x: pallas_attention(*x, Pattern(True, 0.25), interpret=True))(
            q, k, v, ids)
        assert usable("pallas", 3, 40, 16, jnp.float32) == "plain"
    real = np.asarray(ids) != 0
    assert relative(np.asarray(found)[real], np.asarray(plain)[real]) < 1e-5
