"""Fingerprints of a run's training texts, to detect test rows among them."""

import sys
from collections.abc import Iterable
from hashlib import blake2b
from io import BytesIO
from pathlib import Path

import numpy as np

from jaxfusion.errors import InputError, first_line
from jaxfusion.files import read_checked, write_checked

SEEN = "seen.npy"  # in a workdir


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
