"""Which texts a run was trained on, so that no test row is one of them."""

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
    """A number of 64 bits for each text, the same whatever its case and spaces. [N]"""
    folded = (" ".join(text.casefold().split()) for text in texts)
    numbers = (int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), sys.byteorder)
               for text in folded)
    return np.fromiter(numbers, np.uint64)  # one by one: millions of texts are common


def write_seen(workdir: Path, seen: np.ndarray) -> None:
    """Keeps the fingerprints of a run's training texts."""
    content = BytesIO()
    np.save(content, np.unique(seen))
    write_checked(workdir / SEEN, content.getvalue())


def read_seen(workdir: Path) -> np.ndarray | None:
    """What `write_seen` kept; None where a run kept none.

    Raises:
      InputError: the file is damaged.
    """
    file = workdir / SEEN
    if not file.is_file():
        return None
    repair = ("start train.py once more, which writes it again; or remove it, and test rows are "
              "not compared with training rows")
    try:
        found = np.load(BytesIO(read_checked(file, repair)))
        if found.dtype != np.uint64 or found.ndim != 1:
            raise ValueError(f"{found.dtype}{list(found.shape)}, expected fingerprints")
    except InputError:
        raise
    except (ValueError, EOFError, SyntaxError, AttributeError) as error:
        raise InputError(f"{file} is damaged ({first_line(error)}): {repair}") from None
    return found
