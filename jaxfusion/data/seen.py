"""Which texts a run was trained on, so that no test row is one of them."""

from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

import numpy as np

SEEN = "seen.npy"  # in a workdir


def fingerprints(texts: Iterable[str]) -> np.ndarray:
    """A number of 64 bits for each text, the same whatever its case and spaces. [N]"""
    folded = (" ".join(text.casefold().split()) for text in texts)
    found = [blake2b(text.encode(), digest_size=8).digest() for text in folded]
    return np.frombuffer(b"".join(found), np.uint64)


def write_seen(workdir: Path, seen: np.ndarray) -> None:
    """Keeps the fingerprints of a run's training texts."""
    partial = workdir / f".{SEEN}"
    with partial.open("wb") as file:
        np.save(file, np.unique(seen))
    partial.rename(workdir / SEEN)


def read_seen(workdir: Path) -> np.ndarray | None:
    """What `write_seen` kept; None where a run kept none."""
    file = workdir / SEEN
    return np.load(file) if file.is_file() else None
