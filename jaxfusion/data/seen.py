"""Which texts a run was trained on, so that no test row is one of them."""

import sys
from collections.abc import Iterable
from hashlib import blake2b
from io import BytesIO
from pathlib import Path

import numpy as np

from jaxfusion.errors import InputError, first_line
from jaxfusion.files import write_whole

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
    write_whole(workdir / SEEN, content.getvalue())


def read_seen(workdir: Path) -> np.ndarray | None:
    """What `write_seen` kept; None where a run kept none.

    Raises:
      InputError: the file is damaged.
    """
    file = workdir / SEEN
    if not file.is_file():
        return None
    try:
        found = np.load(file)
    except (ValueError, OSError, EOFError, SyntaxError) as error:
        raise _damaged(file, first_line(error)) from None
    # As it was written: distinct, ascending.
    if found.dtype != np.uint64 or found.ndim != 1 or (found[1:] <= found[:-1]).any():
        raise _damaged(file, f"{found.dtype}{list(found.shape)} that are not distinct and ascending")
    return found


def _damaged(file: Path, why: str) -> InputError:
    return InputError(f"{file} is damaged ({why}); remove it: the next start of train.py writes it "
                      "anew, and without it test rows are not compared with training rows")
