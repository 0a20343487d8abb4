"""Writes the tables of docs/scaling.md: `python benchmarks/scaling.py [--tables]`.

Compiles the step of configs/tpu_v4.py for TPU slices as `train.py --compile_only` does (under a
minute each on two cores, no TPU needed), writes the programs' costs to
benchmarks/results/scaling.json, and the tables between their marks; with --tables, only the tables.
"""

import json
import os
import platform
import sys
from dataclasses import asdict
from pathlib import Path

import jax
import libtpu
from config_file import get_config
from program import program_cost

from jaxfusion.bridge.compile_only import measure
from jaxfusion.config import from_config_dict
from jaxfusion.costs.chips import GIB, Chip, chip_of, topology_devices

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "scaling.json"
SLICES = ("v4-8", "v4-16", "v4-32", "v4-64", "v5e-16", "v5p-8", "v6e-8")
FUSIONS = ("last", "global_softmax", "transformer_softmax")


def needs(topology: str, fusion: str) -> dict:
    """Memory and cost of the step on a slice."""
    config = get_config("tpu_v4", fusion)
    if fusion != "global_softmax":
        config.fusion.backward = "stack"
    devices = topology_devices(topology)
    found, program = measure(from_config_dict(config), devices)
    row = {"topology": topology, "fusion": fusion, **asdict(found),
           **cost_of(program, chip_of(devices[0]))}
    print(row, flush=True)
    return row


def cost_of(program: jax.stages.Compiled, chip: Chip) -> dict:
    """FLOPs and bytes of a program, and the seconds that each takes at the chip's peaks."""
    try:
        cost = program_cost(program.as_text())
    except jax.errors.JaxRuntimeError:  # asynchronous updates of libtpu 0.0.51 cannot be read back
        return {"flops": None, "bytes": None, "seconds": {}, "binds": None}
    seconds = {"compute": cost.flops / chip.flops, "memory": cost.bytes / chip.bandwidth,
               "network": cost.sent / chip.network}
    return {"flops": cost.flops, "bytes": cost.bytes, "unknown_loops": cost.unknown,
            "silent_kernels": cost.silent, "collectives": cost.collectives, "seconds": seconds,
            "binds": max(seconds, key=seconds.get)}


def table(rows: list[dict], first: str) -> str:
    header = [first, "chips", "weights", "optimiser", "activations", "peak of allowed",
              "model TFLOPs", "program's", "compute", "memory", "network"]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        times = {
            kind: f"**{1e3 * s:,.0f} ms**" if kind == row["binds"] else f"{1e3 * s:,.0f} ms"
            for kind, s in row["seconds"].items()
        }
        lines.append([
            row[first], str(row["chips"]),
            *(f"{row[name] / GIB:.2f} GiB" for name in ("weights", "optimizer", "activations")),
            f"{row['peak'] / GIB:.2f} of {row['allowed'] / GIB:.2f} GiB",
            f"{row['model_flops'] / row['chips'] / 1e12:,.0f}",
            "?" if row["flops"] is None else f"{row['flops'] / 1e12:,.0f}",
            *(times.get(kind, "?") for kind in ("compute", "memory", "network")),
        ])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    if "--tables" not in sys.argv:
        jax.config.update("jax_platforms", "cpu")  # libtpu compiles without a TPU
        rows = [needs(topology, "global_softmax") for topology in SLICES]
        rows += [needs("v4-32", fusion) for fusion in FUSIONS if fusion != "global_softmax"]
        machine = (f"{len(os.sched_getaffinity(0))} CPU cores, Python {platform.python_version()}, "
                   f"jax {jax.__version__}")
        RESULTS.write_text(json.dumps(
            {"machine": machine, "libtpu": libtpu.__version__, "rows": rows}, indent=1) + "\n")
    result = json.loads(RESULTS.read_text("utf-8"))
    slices = [row for row in result["rows"] if row["fusion"] == "global_softmax"]
    fusions = sorted((row for row in result["rows"] if row["topology"] == "v4-32"),
                     key=lambda row: FUSIONS.index(row["fusion"]))
    made = f"\nOn {result['machine']}, libtpu {result['libtpu']}."
    page = ROOT / "docs" / "scaling.md"
    text = page.read_text("utf-8")
    for mark, rows in (("slices", table(slices, "topology")),
                       ("fusions", table(fusions, "fusion"))):
        before, rest = text.split(f"<!-- {mark} -->")
        _, after = rest.split(f"<!-- /{mark} -->")
        text = f"{before}<!-- {mark} -->\n{rows}\n{made}\n<!-- /{mark} -->{after}"
    page.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
