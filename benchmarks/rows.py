"""Measures memory and time of a run's start by rows: `python benchmarks/rows.py [--tables]`.

A separate process reads and tokenizes each number of rows, as `train.py` does before the first
step. Reports the peak beyond that of a run with a thousand rows. Writes
benchmarks/results/rows.json and the table of docs/scaling.md; with --tables, only the table. The
limit: 2 KiB per row beyond its text.
"""

import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "rows.json"
SIZES, BASE, BAR = (10_000, 100_000, 1_000_000), 1000, 2.0
LABELS = ("Entailment", "Neutral", "Contradiction")


def write(folder: Path, rows: int) -> None:
    """Writes made-up inference rows of about 250 bytes each."""
    from jaxfusion.miniatures.text import word

    rng = random.Random(0)
    for split, count in (("train", rows), ("dev", 8)):
        with (folder / f"{split}-en.jsonl").open("w", encoding="utf-8") as file:
            for i in range(count):
                premise, hypothesis = (" ".join(word(rng) for _ in range(n)) for n in (24, 12))
                file.write(json.dumps({"premise": f"{i} {premise}", "hypothesis": hypothesis,
                                       "label": LABELS[i % 3]}) + "\n")


def measure(folder: Path) -> None:
    """Prepares a run in this process and prints its memory and time as JSON."""
    from resource import RUSAGE_SELF, getrusage

    from config_file import get_config

    from jaxfusion.bridge.job import prepare
    from jaxfusion.cli import set_up_logging
    from jaxfusion.config import from_config_dict
    from jaxfusion.miniatures.inputs import make_inputs
    from jaxfusion.sharding.mesh import make_mesh

    set_up_logging()
    config = get_config("xnli_paper", "last,debug")
    config.data.task, config.data.language, config.data.path = "xnli", "en", str(folder)
    config.data.max_encoder_tokens = 256
    config.data.buckets = (256,)
    start = time.monotonic()
    run = prepare(make_inputs(from_config_dict(config)), make_mesh())
    seconds = time.monotonic() - start
    rows = run.batches.rows
    print(json.dumps({
        "rows": len(rows), "seconds": seconds, "peak": 1024 * getrusage(RUSAGE_SELF).ru_maxrss,
        "ids": sum(int(x.lengths.sum()) for x in (rows.queries, rows.texts, rows.targets)),
    }))


def of_size(rows: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), rows)
        text = (Path(folder) / "train-en.jsonl").stat().st_size
        done = subprocess.run([sys.executable, __file__, "--measure", folder], text=True,
                              env={**os.environ, "JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE,
                              check=True)
    found = {**json.loads(done.stdout.splitlines()[-1]), "text": text}
    print(found, flush=True)
    return found


def main() -> None:
    if "--measure" in sys.argv:
        measure(Path(sys.argv[-1]))
        return
    if "--tables" not in sys.argv:
        base, *found = (of_size(rows) for rows in (BASE, *SIZES))
        cores = len(os.sched_getaffinity(0))
        RESULTS.write_text(json.dumps({
            "machine": f"{cores} CPU cores, Python {platform.python_version()}",
            "base": base, "rows": found}, indent=1) + "\n")
    result = json.loads(RESULTS.read_text("utf-8"))
    base = result["base"]
    lines = [["rows", "text", "ids", "peak", "beyond the text, a row", "start"], ["---"] * 6]
    for x in result["rows"]:
        more, text, rows = (x[name] - base[name] for name in ("peak", "text", "rows"))
        beyond = (more - text) / rows / 1024
        lines.append([f"{x['rows']:,}", f"{x['text'] / 2**20:,.0f} MiB",
                      f"{x['ids'] / x['rows']:.0f} a row", f"{x['peak'] / 2**30:.2f} GiB",
                      f"**{beyond:.2f} KiB**", f"{x['seconds']:,.0f} s"])
        if beyond > BAR:
            print(f"more than {BAR} KiB a row: {beyond:.2f}", file=sys.stderr)
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    page = ROOT / "docs" / "scaling.md"
    before, rest = page.read_text("utf-8").split("<!-- rows -->")
    _, after = rest.split("<!-- /rows -->")
    made = f"On {result['machine']}; a run of {base['rows']:,} rows peaks at " \
           f"{base['peak'] / 2**30:.2f} GiB."
    page.write_text(f"{before}<!-- rows -->\n{table}\n\n{made}\n<!-- /rows -->{after}", "utf-8")


if __name__ == "__main__":
    main()
