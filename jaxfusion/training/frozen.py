"""Frozen parameters that no backbone has; the workdir stores them next to the checkpoints.

These are the frozen parameters of fusion, projector and aligner, and what an earlier run
(`train.init_from`) trained in a backbone that is frozen now.
"""

from collections.abc import Collection
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from jaxfusion import config as configs
from jaxfusion.config import CONFIG_FILE, stage_before
from jaxfusion.errors import InputError, first_line
from jaxfusion.fields import Config
from jaxfusion.files import read_checked, write_checked
from jaxfusion.nn.bridge import OWN
from jaxfusion.sharding.hosts import fetch
from jaxfusion.training.checkpoint import trained_part
from jaxfusion.training.load import Model

FROZEN_FILE = "frozen.safetensors"
STARTS = tuple(f"{part}/" for part in OWN)


def to_keep(model: Model, earlier: Collection[str]) -> dict[str, np.ndarray]:
    """The frozen parameters that a workdir has to hold.

    Args:
      earlier: paths of parameters that came from another run.
    """
    return {path: fetch(x) for path, x in model.frozen.items()
            if path.startswith(STARTS) or path in earlier}


def write_frozen(workdir: Path, kept: dict[str, np.ndarray]) -> None:
    """Writes them atomically; no file if there are none."""
    file = workdir / FROZEN_FILE
    file.unlink(missing_ok=True)
    if kept:
        # As C arrays: `save` writes the buffer as it is.
        write_checked(file, save({path: np.asarray(x, order="C") for path, x in kept.items()}))


def frozen_of(model: Model, workdir: Path, config: Config) -> dict[str, np.ndarray]:
    """What was frozen in the run whose model this is; see `frozen_part`."""
    return frozen_part(workdir, config, not any(path.startswith(STARTS) for path in model.frozen))


def frozen_part(
    workdir: Path, config: Config, complete: bool = False
) -> dict[str, np.ndarray]:
    """What was frozen in a run, as far as it differs from backbones and the start from its seed.

    Args:
      config: the run's.
      complete: all of its own parts was trained.

    Raises:
      InputError: a workdir of an earlier release whose frozen parameters came from another run that
        is not there, or a file that cannot be read.
    """
    file = workdir / FROZEN_FILE
    if file.is_file():
        try:
            return load(read_checked(file, "put it back from a copy"))
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} cannot be read ({first_line(error)}): the run's frozen "
                             "parameters are in it, put it back from a copy") from None
    before = stage_before(config, workdir)
    if before is None:
        return {}
    if not (before / CONFIG_FILE).is_file():
        if complete:
            return {}
        raise InputError(f"{workdir} started from {before}, which is not there, and holds no "
                         f"{FROZEN_FILE}: put {before} back")
    return earlier_part(before)[1]


def earlier_part(workdir: Path) -> tuple[int, dict[str, np.ndarray]]:
    """The step of another run's best checkpoint, and all parameters that are its own: trained and
    frozen."""
    config = configs.load(workdir / CONFIG_FILE)
    step, trained = trained_part(workdir)
    if not isinstance(config, Config):
        return step, trained
    return step, frozen_part(workdir, config) | trained
