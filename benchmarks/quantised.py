"""What 8 and 4 bits cost a trained bridge.

    python benchmarks/quantised.py WORKDIR --limit 100 --out benchmarks/results/quantised.json
    python benchmarks/quantised.py --table benchmarks/results/quantised.json     # into the docs

Scores test rows by the likelihood of the labels with both towers in bfloat16, int8 and int4, and
takes a few training steps in each from the same start. WORKDIR is not changed.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from timing import machine

from jaxfusion import config as configs
from jaxfusion.bridge.job import train
from jaxfusion.config import CONFIG_FILE
from jaxfusion.fields import ROLES, Config
from jaxfusion.runs.open_run import open_run
from jaxfusion.runs.score import read_rows

DTYPES = ("bfloat16", "int8", "int4")
SHOWN = 8


def in_dtype(config: Config, dtype: str) -> Config:
    """The config with both towers in this dtype."""
    return replace(config, **{role: replace(getattr(config, role), dtype=dtype) for role in ROLES})


def score(workdir: Path, dtype: str, languages: list[str], limit: int | None) -> dict:
    """Accuracy in %, and the loss of the right label among all labels, by language."""
    run = open_run(workdir)
    run = replace(run, config=in_dtype(run.config, dtype))
    (rows,) = read_rows(run.config, (), tuple(languages), limit, None).values()
    found, clock = {}, time.perf_counter()
    with run.on_mesh():
        scorer = run.scorer(run.task)
        for language, examples in rows.items():
            scored = scorer(run.params, examples, run.task)
            chances = [x - np.logaddexp.reduce(x) for x in map(np.asarray, scored.likelihoods)]
            loss = -np.mean([x[e.label] for x, e in zip(chances, examples, strict=True)])
            found[language] = {"rows": len(examples), "loss": float(loss),
                               "accuracy": 100 * float(np.mean(scored.correct["likelihood"]))}
    return {"languages": found, "seconds": time.perf_counter() - clock}


def losses(workdir: Path, dtype: str, steps: int) -> list[float]:
    """The training losses of the first steps."""
    config = in_dtype(configs.load(workdir / CONFIG_FILE), dtype)
    config = replace(config, train=replace(
        config.train, steps=steps, log_every=1, eval_every=steps,
        checkpoint_every=steps), data=replace(config.data, dev_rows=1))
    with tempfile.TemporaryDirectory() as folder:
        train(config, Path(folder) / "run")
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    return [x["loss"] for x in map(json.loads, lines) if "loss" in x]


def table(found: dict) -> str:
    """Accuracy and loss by language, and the training losses, one line for each dtype."""
    languages = list(found[DTYPES[0]]["languages"])
    head = ["towers in", *(f"{x}: accuracy, loss" for x in languages),
            f"training loss, every {SHOWN} steps"]
    lines = [head, ["---"] * len(head)]
    for dtype in DTYPES:
        cells = [f"{x['accuracy']:.0f}%, {x['loss']:.2f}"
                 for x in found[dtype]["languages"].values()]
        shown = found[dtype]["training_losses"][SHOWN - 1 :: SHOWN]
        steps = ", ".join(f"{x:.1f}" for x in shown)
        lines.append([f"`{dtype}`", *cells, steps])
    rows = found[DTYPES[0]]["languages"][languages[0]]["rows"]
    machine = found["machine"]
    return "\n".join([
        f"A bridge of `configs/real_topics.py` (`{found['run']}`), trained in float32, on {rows} "
        "test rows of each language; the last column is training from the same start:", "",
        *("| " + " | ".join(line) + " |" for line in lines), "",
        f"Made by `benchmarks/quantised.py` on {machine['cores']} cores of {machine['cpu']}."])


def write_table(file: Path) -> None:
    """Puts the table into docs/scaling.md."""
    page = Path(__file__).parent.parent / "docs" / "scaling.md"
    before, rest = page.read_text("utf-8").split("<!-- quantised -->")
    _, after = rest.split("<!-- /quantised -->")
    made = table(json.loads(file.read_text("utf-8")))
    page.write_text(f"{before}<!-- quantised -->\n{made}\n<!-- /quantised -->{after}", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=Path, nargs="?")
    parser.add_argument("--table", type=Path, help="write the docs' table of this file")
    parser.add_argument("--languages", nargs="+", default=["eng_Latn", "sin_Sinh", "swh_Latn"])
    parser.add_argument("--limit", type=int, help="rows of each language")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.table:
        write_table(args.table)
        return
    if args.workdir is None:
        parser.error("give a WORKDIR, or --table FILE")
    found = {"machine": machine(), "run": args.workdir.parent.name}
    for dtype in DTYPES:
        found[dtype] = score(args.workdir, dtype, args.languages, args.limit)
        found[dtype]["training_losses"] = losses(args.workdir, dtype, args.steps)
        jax.clear_caches()
        print(dtype, json.dumps(found[dtype]), flush=True)
        if args.out:
            args.out.write_text(json.dumps(found, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
