"""Fingerprints of a run's training texts, to detect test rows among them."""

import logging
import sys
from collections.abc import Iterable
from hashlib import blake2b
from io import BytesIO
from pathlib import Path

import numpy as np

from jaxfusion.errors import InputError, first_line
from jaxfusion.files import read_checked, write_checked

SEEN = "seen.npy"  # in a workdir
logger = logging.getLogger(__name__)


def fingerprints(texts: Iterable[str]) -> np.ndarray:
    """A 64-bit hash of each text, ignoring case and white space. [N]"""
    folded = (" ".join(text.casefold().split()) for text in texts)
    numbers = (int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), sys.byteorder)
               for text in folded)
    return np.fromiter(numbers, np.uint64)  # without a list: there may be millions of texts


def write_seen(workdir: Path, seen: np.ndarray) -> None:
    """Saves the fingerprints of a run's training texts."""
    content = BytesIO()
    np.save(content, np.unique(seen))
    write_checked(workdir / SEEN, content.getvalue())


def read_seen(workdir: Path) -> np.ndarray | None:
    """The fingerprints that `write_seen` saved; None if the run has none.

    Raises:
      InputError: the file is damaged.
    """
    file = workdir / SEEN
    if not file.is_file():
        return None
    repair = ("run train.py again, which rewrites it; or remove it, and test rows are not compared "
              "with training rows")
    try:
        seen = np.load(BytesIO(read_checked(file, repair)))
        if seen.dtype != np.uint64 or seen.ndim != 1:
            raise ValueError(f"{seen.dtype}{list(seen.shape)}, expected fingerprints")
    except InputError:
        raise
    except (ValueError, EOFError, SyntaxError, AttributeError) as error:
        raise InputError(f"{file} is damaged ({first_line(error)}): {repair}") from None
    return seen


def check_seen(workdir: Path, seen: np.ndarray) -> None:
    """Compares the training texts of a run that goes on with those that it began with.

    Raises:
      InputError: they are others.
    """
    try:
        was = read_seen(workdir)
    except InputError as error:  # this start writes the file again
        logger.warning("training rows are not compared with those that the run began with: %s",
                       error)
        return
    if was is None or np.array_equal(was, now := np.unique(seen)):
        return
    gone, new = (len(np.setdiff1d(*pair)) for pair in ((was, now), (now, was)))
    raise InputError(f"{workdir} began with other training rows: of {len(was):,} texts {gone:,} "
                     f"are gone, and {new:,} are new; put the earlier rows back, or start again "
                     "with another --workdir")
