"""Trains the quickstart's bridges without the projector's warm start, which is not in the papers.

    python benchmarks/cold_start.py runs/cold --out benchmarks/results/cold_start.json

Uses the languages of `claims.py`. Existing runs and scores in runs/cold are reused, so a stopped
run resumes.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from claims import GROUPS, REPORTED, Rows, bridges, mean_over, over_seeds
from timing import machine

from jaxfusion.reports.statistics import bootstrap_mean

SEEDS, ROWS = 5, 300


def figures(rows: Rows) -> dict[str, Any]:
    """For each group the mean over seeds and languages, its interval over rows, and each seed's
    mean."""
    result = {}
    for group, languages in GROUPS.items():
        values = mean_over(rows, languages)
        mean, interval = bootstrap_mean(values)
        seeds = values.mean(axis=1).tolist()
        result[group] = {"mean": mean, "ci95": interval, "seeds": seeds,
                         "deviation": statistics.stdev(seeds)}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result = {"seeds": SEEDS, "machine": machine(), "accuracy": {
        name: figures(over_seeds(args.workdir, name, config, range(SEEDS), ("en", *REPORTED), ROWS))
        for name, config in bridges(warm=False).items()
    }}
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
