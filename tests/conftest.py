"""Shared by all tests: one compile cache per run, no hub, and small checkpoints made once."""

import atexit
import gc
import os
import shutil
import tempfile
from pathlib import Path

# Before jax and huggingface_hub are imported. The workers of xdist inherit the directory.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxfusion-jit-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# PyTorch's threads would wait for each other on towers this small, and a worker has one core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests compile far more than they compute. Without the emitters of fusions, and in one part, XLA
# compiles a training step in a quarter of the time.
os.environ.setdefault("XLA_FLAGS", " ".join((
    "--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")))
if "device_count=8" not in os.environ["XLA_FLAGS"]:
    collect_ignore = ["eight_devices"]
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
from hypothesis import settings

from jaxfusion.data.tokenizers import Tokenizers, load_tokenizer
from jaxfusion.files import only_writer
from jaxfusion.miniatures.checkpoints import write_checkpoints

pytest.register_assert_rewrite("helpers")
settings.register_profile("here", deadline=None)  # the first call of a function may compile
settings.load_profile("here")
# What jax traces is many short-lived objects beside a large heap that a worker keeps to its end.
gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    """A directory that all of xdist's workers have in common."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def cache_dir(shared) -> Path:
    """Where `:debug` checkpoints and rows go; set for the scripts that tests start, too."""
    os.environ["JAXFUSION_CACHE"] = str(shared / "cache")
    return shared / "cache"


@pytest.fixture(scope="session")
def tiny(shared) -> Path:
    """A directory with `encoder` and `decoder`, tiny, with tokenizers trained on made-up text."""
    path = shared / "checkpoints" / "tiny"
    path.parent.mkdir(exist_ok=True)
    with only_writer(shared / "checkpoints" / "writer", path, wait=True):
        if not path.is_dir():
            write_checkpoints(path, "tiny")
    return path


@pytest.fixture(scope="session")
def tokenizers(tiny) -> Tokenizers:
    """Those of `tiny`."""
    return Tokenizers(*(load_tokenizer(tiny / x, 512, x) for x in ("encoder", "decoder")))


@pytest.fixture
def unscored(monkeypatch) -> None:
    """Runs do not score development rows."""
    from helpers import leave_unscored

    leave_unscored(monkeypatch)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Real text, read by path; it never ships with the project."""
    path = os.environ.get("JAXFUSION_TEST_DATA")
    if not path:
        pytest.skip("JAXFUSION_TEST_DATA is not set: it names a folder with sib200/, xnli/ and "
                    "tokenizers/")
    return Path(path)
