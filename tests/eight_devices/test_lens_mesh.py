"""Lens on a mesh of eight devices is Lens on one."""

import math
from dataclasses import replace

import jax
import pytest
from helpers import debug_config, losses, relative
from safetensors.numpy import load_file

from jaxfusion.lens import job
from jaxfusion.sharding.mesh import make_mesh
from jaxfusion.training import workdir


@pytest.mark.slow
def test_probe_losses_and_scores_are_those_of_one_device(cache_dir, tmp_path, monkeypatch):
    config = debug_config(
        sweep=({"name": "Lens"}, {"name": "sup", "lens": {"method": "supervised"}}),
        data={"probe_rows": 16, "rows": 16, "task_rows": 8, "max_tokens": 64, "buckets": (64,)},
        train={"steps": 3, "eval_every": 3, "checkpoint_every": 3})
    config = replace(config, eval=replace(config.eval, tasks=("pocket_nli",)))
    correct = {}
    for name, sizes in (("one", (1, 1, 1)), ("all", (2, 2, 2))):
        mesh = make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
        for module in (job, workdir):
            monkeypatch.setattr(module, "make_mesh", lambda mesh=mesh, **_: mesh)
        correct[name] = job.lens(config, tmp_path / name).correct
    assert correct["one"] == correct["all"]
    for method in ("Lens", "sup"):
        one, other = (list(losses(tmp_path / name / method).values()) for name in ("one", "all"))
        assert len(one) == 3 and relative(other, one) < 1e-5
    probes = [load_file(tmp_path / name / "probe.safetensors") for name in ("one", "all")]
    assert relative(probes[1]["means"], probes[0]["means"]) < 1e-5
