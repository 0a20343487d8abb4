"""Benchmark helpers: alternating timing, compilation time, and output of results."""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import torch
from rich.console import Console
from rich.table import Table

# The CPU, where PyTorch runs too, also on a machine with an accelerator.
jax.config.update("jax_platforms", "cpu")


def alternate(contenders: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every call, the contenders taking turns (A B A B …) after one untimed turn each.

    Taking turns spreads the disturbances of a shared machine over all of them. A contender's call
    must not return before its work is done.
    """
    for call in contenders.values():
        call()
    seconds = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def compiled(jitted: Callable, *args: Any) -> tuple[Callable, float]:
    """The compiled program of a jitted function for these arguments, and its compilation time."""
    start = time.perf_counter()
    program = jitted.lower(*args).compile()
    return program, time.perf_counter() - start


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    """The median of each contender's times."""
    return {name: statistics.median(times) for name, times in seconds.items()}


def speedup(seconds: dict[str, list[float]], fast: str, slow: str) -> dict[str, Any]:
    """How many times faster `fast` is, by medians and turn by turn, to show the spread."""
    median = medians(seconds)
    turns = zip(seconds[fast], seconds[slow], strict=True)
    return {"of_medians": median[slow] / median[fast], "of_pairs": [b / a for a, b in turns]}


def machine() -> dict[str, Any]:
    """A description of this machine; the load average shows whether others use it."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "jax_device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
    }


def _cpu_model() -> str:
    """The processor's name, with family and model in case a virtual machine hides the rest."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    facts = dict(line.replace("\t", "").split(": ", 1) for line in lines if ": " in line)
    known = facts.get("model name", platform.machine())
    return f"{known} (family {facts.get('cpu family', '?')}, model {facts.get('model', '?')})"


def parser(description: str, repeats: int) -> argparse.ArgumentParser:
    """An argument parser with the common flags of all benchmarks."""
    out = argparse.ArgumentParser(description=description.splitlines()[0])
    out.add_argument("--repeats", type=int, default=repeats, help="timed turns of each contender")
    out.add_argument("--out", type=Path, help="JSON file to write (default: standard output)")
    return out


def report(result: dict[str, Any], out: Path | None) -> None:
    """Writes the result as JSON to a file, or to standard output."""
    text = json.dumps(result, indent=2)
    if out is None:
        print(text)
    else:
        out.write_text(text + "\n", "utf-8")


def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Prints a table to standard error, so that standard output stays JSON."""
    table = Table(title=title)
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    Console(stderr=True).print(table)
