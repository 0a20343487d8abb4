"""Shared by all tests: one compile cache per run, no hub, and small checkpoints made once."""

import os
import tempfile
from pathlib import Path

# Before jax and huggingface_hub are imported.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="jaxfusion-jit-"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile far more than they compute.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
if "device_count=8" not in os.environ["XLA_FLAGS"]:
    collect_ignore = ["eight_devices"]
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

import numpy as np
import pytest

from jaxfusion.miniatures.checkpoints import write_checkpoints


def relative(ours, theirs) -> float:
    """Largest difference, relative to the largest entry of `theirs`."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> Path:
    """Where `:debug` checkpoints and rows go; set for the scripts that tests start, too."""
    path = tmp_path_factory.mktemp("cache")
    os.environ["JAXFUSION_CACHE"] = str(path)
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A directory with `encoder` and `decoder`, tiny, with tokenizers trained on made-up text."""
    path = tmp_path_factory.mktemp("checkpoints") / "tiny"
    write_checkpoints(path, "tiny")
    return path


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real text, read by path; it never ships with the project."""
    path = os.environ.get("JAXFUSION_TEST_DATA")
    if not path:
        pytest.skip("JAXFUSION_TEST_DATA is not set: it names a folder with sib200/, xnli/ and "
                    "tokenizers/")
    return Path(path)
