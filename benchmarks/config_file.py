"""The repository's configs, for benchmarks, which start in a directory of their own."""

import importlib
import sys
from pathlib import Path

from ml_collections import ConfigDict

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # where the package `configs` is


def get_config(name: str, arg: str | None = None) -> ConfigDict:
    """`configs/NAME.py:arg`, unlocked."""
    return importlib.import_module(f"configs.{name}").get_config(arg).unlock()
