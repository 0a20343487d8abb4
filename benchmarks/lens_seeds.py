"""Runs configs/lens_quickstart.py with several seeds, each with different parallel prompts.

    python benchmarks/lens_seeds.py runs/lens_seeds --out benchmarks/results/lens_seeds.json

Scores test rows, which were not used for any choice. Intervals are over rows, with fixed seeds; the
spread across seeds is reported separately. Existing runs in runs/lens_seeds are reused, so a
stopped run resumes.
"""

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from config_file import get_config
from timing import machine

from jaxfusion.config import from_config_dict
from jaxfusion.data.pocket.world import write_parallel
from jaxfusion.files import new_directory
from jaxfusion.lens.job import lens
from jaxfusion.miniatures.inputs import make_inputs
from jaxfusion.reports.statistics import bootstrap_mean

ROOT = Path(__file__).parent.parent
ROWS = 600  # of each language's test split


def run(workdir: Path, seed: int) -> dict[str, dict[str, list[int]]]:
    """Correct rows by model and language."""
    prompts = workdir / f"prompts-{seed}"
    if not prompts.is_dir():
        with new_directory(prompts) as partial:
            write_parallel(partial, seed=seed)
    config = from_config_dict(get_config("lens_quickstart"))
    config = make_inputs(replace(
        config, train=replace(config.train, seed=seed),
        data=replace(config.data, task_rows=ROWS, path=str(prompts / "parallel.jsonl"))))
    return lens(config, workdir / str(seed)).correct


def figures(runs: list[dict[str, list[int]]], before: dict[str, list[int]] | None = None):
    """By language, and over the targets: the mean over seeds, its interval over rows, the seeds'
    deviation; of the change, where `before` is given."""
    targets = list(runs[0])[1:]
    found = {}
    for name, languages in {**{x: [x] for x in runs[0]}, "targets": targets}.items():
        values = np.array([[x[language] for language in languages] for x in runs], float)
        if before is not None:
            values = values - np.array([before[language] for language in languages], float)
        mean, interval = bootstrap_mean(values.reshape(-1, values.shape[-1]))
        seeds = values.mean(axis=(1, 2)).tolist()
        found[name] = {"mean": mean, "ci95": interval, "seeds": seeds,
                       "deviation": statistics.stdev(seeds) if len(seeds) > 1 else None}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    runs = [run(args.workdir, seed) for seed in range(args.seeds)]
    result: dict[str, Any] = {"seeds": args.seeds, "rows": ROWS, "machine": machine()}
    for model in runs[0]:
        rows = [found[model] for found in runs]
        result.setdefault("accuracy", {})[model] = figures(rows)
        if model != "LLM":
            result.setdefault("minus LLM", {})[model] = figures(rows, runs[0]["LLM"])
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()
