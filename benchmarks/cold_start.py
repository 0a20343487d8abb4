"""The quickstart over several seeds, with and without its warm start.

    python benchmarks/pocket_seeds.py runs/seeds --out benchmarks/results/pocket_seeds.json

Reported are only languages on which no recipe was chosen; intervals are over test rows, with the
seeds as they are, and the spread between seeds stands beside them. Trained bridges in runs/seeds
are taken as they are, so a stopped run goes on.
"""

import argparse
import json
import runpy
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from timing import machine

from jaxfusion.config import directory_name, from_config_dict, variants
from jaxfusion.data.lexicon import LANGUAGES
from jaxfusion.evaluation.metrics import bootstrap_mean
from jaxfusion.testing.debug import make_inputs
from jaxfusion.training.bridge import train
from jaxfusion.training.evaluate import evaluate

ROOT = Path(__file__).parent.parent
REPORTED = tuple(name for name, x in LANGUAGES.items() if x.reported and name != "en")
GROUPS = {
    "English": ("en",), "reported": REPORTED,
    **{group: tuple(x for x in REPORTED if LANGUAGES[x].group == group)
       for group in ("rich", "mid", "poor")},
}
SCORING = "likelihood"
CHANCE = 1 / 3
ROWS = 300  # of each language's test split
Rows = dict[str, np.ndarray]  # language -> [seeds, rows] of 0 and 1


def run(workdir: Path, seed: int, warm: bool, names: tuple[str, ...]):
    """Trains and scores every variant of the quickstart; correct rows by variant and language."""
    config = runpy.run_path(str(ROOT / "configs" / "quickstart.py"))["get_config"]().unlock()
    config.base.train.seed = seed
    config.base.projector.warm_start = warm
    found = {}
    for name, fields in variants(from_config_dict(config)).items():
        where = workdir / f"{'warm' if warm else 'cold'}-{seed}" / directory_name(name)
        train(make_inputs(fields), where)
        _, details = evaluate(where, languages=names, limit=ROWS)
        found[name] = {x: details["pocket_nli"][x]["correct"][SCORING] for x in names}
    _, details = (evaluate(where, languages=names, limit=ROWS, llm_only=True) if warm and seed == 0
                  else (None, None))
    alone = details and {x: details["pocket_nli"][x]["correct"][SCORING] for x in names}
    return found, alone


def figures(rows: Rows, minus: Rows | None = None) -> dict[str, Any]:
    """By group: mean over seeds and languages with its interval over rows, and each seed's mean."""
    result = {}
    for group, names in GROUPS.items():
        values = np.array([rows[name] for name in names], float)
        if minus is not None:
            values = values - np.array([minus[name] for name in names], float)
        mean, interval = bootstrap_mean(values.reshape(-1, values.shape[-1]))
        seeds = values.mean(axis=(0, 2)).tolist()
        result[group] = {
            "mean": mean, "ci95": interval, "seeds": seeds,
            "deviation": statistics.stdev(seeds) if len(seeds) > 1 else None,
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    names = GROUPS["English"] + REPORTED
    result: dict[str, Any] = {"seeds": args.seeds, "machine": machine()}
    for start, warm in (("warm", True), ("cold", False)):
        runs = []
        for seed in range(args.seeds):
            found, alone = run(args.workdir, seed, warm, names)
            runs.append(found)
            if alone:
                result["LLM alone"] = figures({x: np.array([alone[x]]) for x in names})
        rows = {
            variant: {x: np.array([found[variant][x] for found in runs]) for x in names}
            for variant in runs[0]
        }
        result[start] = {
            variant: {"accuracy": figures(rows[variant]),
                      "minus last": figures(rows[variant], rows["last"])}
            for variant in rows
        }
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", "utf-8")
    missed = check(result)
    print("\n".join(missed) or "all targets are met")


def check(result: dict[str, Any]) -> list[str]:
    """The targets that the figures miss, a line each."""
    def mean(model: str, group: str) -> float:
        return result["warm"][model]["accuracy"][group]["mean"]

    alone = {group: x["mean"] for group, x in result["LLM alone"].items()}
    fusions = [name for name in result["warm"] if name.endswith("softmax")]
    best = max(mean(name, "reported") for name in fusions)
    targets = {
        "the LLM alone has at least 90 in English": alone["English"] >= 0.90,
        "the LLM alone is within 5 points of chance elsewhere":
            abs(alone["reported"] - CHANCE) <= 0.05,
        "the best fusion is at least 25 points above chance": best >= CHANCE + 0.25,
        "`last` is at least 15 points above chance": mean("last", "reported") >= CHANCE + 0.15,
    }
    return [f"MISSED: {name}" for name, met in targets.items() if not met]


if __name__ == "__main__":
    main()
