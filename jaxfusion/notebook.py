"""Notebook helpers: the device, models that fit it, and one-line errors."""

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from jaxfusion.cli import set_up_logging
from jaxfusion.errors import InputError, first_line
from jaxfusion.files import shipped

GIB = 2.0**30
# Rule of thumb: memory to train a bridge or run Lens, as a multiple of the weights.
ROOM = 2.0
UNKNOWN = 8 * GIB  # assumed if a device does not report its memory: the least that Colab has
DRIVE = Path("/content/drive")
OTHER_RUNTIME = "choose Runtime > Change runtime type > v5e-1 TPU or T4 GPU"
# Encoder and LLM, largest first; none of them is gated.
BRIDGES = (
    ("google/mt5-xl", "Qwen/Qwen2.5-7B-Instruct"),
    ("google/mt5-large", "Qwen/Qwen2.5-1.5B-Instruct"),
    ("google/mt5-base", "Qwen/Qwen2.5-0.5B-Instruct"),
    ("google/mt5-small", "Qwen/Qwen2.5-0.5B-Instruct"),
)
LLMS = tuple((None, f"Qwen/Qwen2.5-{size}-Instruct") for size in ("7B", "3B", "1.5B", "0.5B"))
TowerPair = tuple[str | None, str]  # encoder (None: the LLM alone) and LLM


@dataclass(frozen=True)
class Device:
    """The devices that jax uses.

    Attributes:
      name: jax's. count: number of devices. memory: bytes of each; None on a CPU.
    """

    name: str
    count: int
    memory: float | None

    def __str__(self) -> str:
        size = "" if self.memory is None else f", {self.memory / GIB:.1f} GiB each"
        return f"{self.count} × {self.name}{size}"


def start(pocket: bool) -> Device:
    """Sets up logging and one-line errors, and returns the device.

    Raises:
      InputError: an unsupported version of jax, or no accelerator for real models.
    """
    # jax reserves three quarters of a GPU's memory unless told otherwise.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    # Without ipywidgets progress bars are text; nothing else is lost.
    warnings.filterwarnings("ignore", message="IProgress not found")
    set_up_logging()
    logging.getLogger("jaxfusion").handlers[0].setStream(sys.stdout)
    _one_line_errors()
    check_jax()
    device = find_device(pocket)
    print(f"{device}; jax {metadata.version('jax')}")
    return device


def _one_line_errors() -> None:
    """Makes an InputError end a cell with its message alone, without a traceback."""
    from IPython import get_ipython

    def show(shell, kind, error, trace, tb_offset=None):
        print(f"error: {error}", file=sys.stderr)

    if (shell := get_ipython()) is not None:
        shell.set_custom_exc((InputError,), show)


def check_jax() -> None:
    """Raises InputError unless the installed jax is a supported one and loads."""
    from packaging.requirements import Requirement

    installed = metadata.version("jax")
    required = next(x for x in map(Requirement, metadata.requires("jaxfusion")) if x.name == "jax")
    if installed not in required.specifier:
        raise InputError(f"this runtime has jax {installed}, jaxfusion needs jax "
                         f"{required.specifier}: run the install cell, then Runtime > Restart "
                         "session and run all")
    restart = "choose Runtime > Restart session, then run all cells"
    try:
        import jax
        import jax.numpy
    except (ImportError, AttributeError, RuntimeError) as error:
        raise InputError(f"jax {installed} does not load next to this runtime's other packages "
                         f"({first_line(error)}): {restart}") from None
    if jax.__version__ != installed:
        raise InputError(f"jax {jax.__version__} was loaded before jax {installed} was installed: "
                         f"{restart}")


def find_device(pocket: bool) -> Device:
    """The first device, and how many there are.

    Raises:
      InputError: jax finds no device, or only a CPU, which is enough for pocket models alone.
    """
    import jax

    from jaxfusion.costs.chips import chip_of

    try:
        devices = jax.devices()
    except RuntimeError as error:
        raise InputError(f"jax cannot use this runtime's device ({first_line(error)}): "
                         f"{OTHER_RUNTIME}") from None
    if devices[0].platform == "cpu":
        if pocket:
            return Device("CPU", len(devices), None)
        raise InputError(f"no TPU or GPU found: {OTHER_RUNTIME} and run all cells; on a CPU set "
                         "POCKET = True in the first cell to use the pocket models")
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    chip = chip_of(devices[0])
    return Device(devices[0].device_kind, len(devices),
                  float(limit or (chip.memory if chip else UNKNOWN)))


def weights(encoder: str | None, llm: str) -> float:
    """Bytes of the models' weights in bfloat16, from their shapes.

    Raises:
      InputError: a shape is not known, and the hub does not have it either.
    """
    from jaxfusion.hf.known_shapes import backbone_size

    return 2.0 * (backbone_size("decoder", llm) + (
        backbone_size("encoder", encoder) if encoder else 0))


def pick_models(
    device: Device, known: Sequence[TowerPair], requested: TowerPair | None = None
) -> TowerPair:
    """The requested models, or the largest known ones that fit; prints the choice.

    Raises:
      InputError: they do not fit the device's memory, or the hub denies access.
    """
    fitting = [models for models in known if ROOM * weights(*models) <= device.memory]
    instead = _named(fitting[0]) if fitting else "pocket models, with POCKET = True"
    models = requested or (fitting[0] if fitting else known[-1])
    for name in filter(None, models):
        check_access(name, instead)
    needs = weights(*models)
    if ROOM * needs > device.memory:
        raise InputError(f"the weights of {_named(models)} take {needs / GIB:.1f} GiB in bfloat16 "
                         f"and a run about {ROOM:g} times that, but the device is {device}; choose "
                         f"{instead}")
    print(f"{_named(models)}: {needs / GIB:.1f} GiB of weights in bfloat16")
    return models


def _named(models: TowerPair) -> str:
    return " and ".join(filter(None, models))


def check_access(name: str, instead: str) -> None:
    """Raises InputError unless a checkpoint is a directory, is cached, or can be downloaded.

    Args:
      instead: what the message suggests if access is denied.
    """
    from huggingface_hub import auth_check, errors, try_to_load_from_cache

    from jaxfusion.hf.hub import hub_in_reach

    if Path(name).is_dir() or isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    if not hub_in_reach():
        raise InputError(f"the Hugging Face hub cannot be reached, and {name} is not cached: "
                         "connect this runtime to the internet, or give a directory with the model")
    try:
        auth_check(name)
    except errors.GatedRepoError:
        raise InputError(
            f"{name} is gated and no token here has access: accept its licence at "
            f"https://huggingface.co/{name} and put a token into Colab's secret HF_TOKEN (or run "
            f"hf auth login); or choose {instead}, which is open") from None
    except errors.RepositoryNotFoundError:
        raise InputError(f"{name} is not on the hub, or is private: check its name, or choose "
                         f"{instead}") from None


def converted(checkpoint: str) -> str:
    """A directory with a hub's pickled checkpoint as safetensors, converted once.

    Args:
      checkpoint: a hub id, or a path that an earlier session returned.

    Raises:
      InputError: the hub denies access, or PyTorch is missing.
    """
    from jaxfusion.hf.convert import convert

    if Path(checkpoint).is_dir():
        return checkpoint
    name = Path(checkpoint).name.replace("--", "/") if "--" in checkpoint else checkpoint
    out = Path("checkpoints") / name.replace("/", "--")
    try:
        if not out.is_dir():
            convert(name, out)
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is missing; it is needed to read the pickles of {name}: "
                         "run %pip install torch, then this cell again") from None
    return str(out)


def pocket_model(name: str) -> str:
    """The directory of a pocket model: encoder, decoder or lens_decoder."""
    return str(shipped("pocket") / name)


def work_folder(name: str, pocket: bool) -> Path:
    """The directory of a notebook's runs: on Google Drive in Colab, otherwise `runs/`.

    After a session ends, the same cells resume the runs.
    """
    if "google.colab" in sys.modules and not pocket:
        from google.colab import drive

        drive.mount(str(DRIVE))
        folder = DRIVE / "MyDrive" / "jaxfusion" / name
    else:
        folder = Path("runs") / name
    folder.mkdir(parents=True, exist_ok=True)
    print(f"runs are kept in {folder}")
    return folder
