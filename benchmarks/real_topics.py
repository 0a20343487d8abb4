r"""The bridges of configs/real_topics.py beside what needs none: its LLM and its encoder alone.

    python train.py --config configs/real_topics.py:compare --workdir runs/real_topics
    python benchmarks/real_topics.py runs/real_topics --out benchmarks/results/real_topics.json

Needs scikit-learn. The encoder alone is a logistic regression on its mean-pooled last states,
trained on the same English rows, its regularisation chosen on the English development rows. The LLM
alone answers a prompt that names the topics, without examples and with five English ones.
"""

import argparse
import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from timing import machine

from jaxfusion import config as configs
from jaxfusion.bridge.compare import side_by_side
from jaxfusion.config import run_folders
from jaxfusion.data.rows.examples import Example, read_examples
from jaxfusion.data.tasks.catalogue import configured, get_task
from jaxfusion.evaluation.scoring import Scorer, for_task
from jaxfusion.files import write_whole
from jaxfusion.reports.comparison import as_json, markdown
from jaxfusion.reports.pictures import draw_accuracy, draw_layers
from jaxfusion.reports.scored_runs import read_run
from jaxfusion.runs.open_run import OpenRun, open_run

LLM, FEW, REGRESSION = "LLM, topics named", "LLM, 5 examples", "encoder + regression"
STRENGTHS = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]  # 1 / L2 penalty
SHOTS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", help="of the comparison; default: all")
    parser.add_argument("--baselines", nargs="*", choices=list(BASELINES), default=list(BASELINES))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    config = configs.load(args.workdir / "config.json")
    config = replace(config, seeds=tuple(args.seeds or config.seeds))
    folders = run_folders(config)
    scored = {name: all((args.workdir / where / "eval" / "results.json").is_file()
                        for where in runs) for name, runs in folders.items()}
    if missing := [name for name, done in scored.items() if not done]:
        print(f"not scored yet, and left out: {', '.join(missing)}")
    models = {name: [read_run(args.workdir / where) for where in folders[name]]
              for name, done in scored.items() if done}
    bridges = side_by_side(config, models, {})
    run = open_run(args.workdir / next(iter(folders.values()))[0])
    languages, seconds = list(bridges.languages), {}
    kept = args.workdir / "baselines.json"  # a second start goes on
    alone = json.loads(kept.read_text("utf-8")) if kept.is_file() else {}
    for name in args.baselines:
        found = alone.setdefault(name, {"correct": {}, "seconds": 0.0})
        left = [language for language in languages if language not in found["correct"]]
        # The regression is fitted once; the LLM takes minutes for each language.
        for part in [left] if name == REGRESSION and left else [[x] for x in left]:
            clock = time.monotonic()
            found["correct"] |= BASELINES[name](run, part, config.rows)
            found["seconds"] += time.monotonic() - clock
            write_whole(kept, json.dumps(alone))
            print(f"{name}: {', '.join(part)}", flush=True)
        seconds[name] = {"score": found["seconds"]}
        print(f"{name}: {seconds[name]['score']:.0f} s", flush=True)
    correct = {name: alone[name]["correct"] for name in args.baselines}
    comparison = replace(bridges, correct={**correct, **bridges.correct}, reference=REGRESSION)
    report = args.workdir / "report.json"
    trained = json.loads(report.read_text("utf-8"))["seconds"] if report.is_file() else {}
    result = {"table": markdown(comparison), **as_json(comparison), "seeds": list(config.seeds),
              "rows": len(correct[REGRESSION][languages[0]]), "seconds": {**seconds, **trained},
              "machine": machine()}
    args.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    draw_accuracy(comparison, args.workdir / "topics_accuracy.png")
    draw_layers(bridges, args.workdir / "topics_layers.png")
    print(result["table"])


def rows_of(run: OpenRun, split: str, language: str, limit: int | None = None) -> list[Example]:
    """Rows of a split, as the run reads them."""
    data = run.config.data
    task = configured(get_task(data.task, run.config.tasks), data)
    return read_examples(data.task, task, split, language, data.path)[:limit]


def regression(run: OpenRun, languages: list[str], limit: int | None) -> dict[str, list[int]]:
    """Which test rows a logistic regression on the encoder's vectors gets right, by language."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import normalize

    def read(split: str, language: str, limit: int | None = None):
        rows = rows_of(run, split, language, limit)
        vectors = run.states_of([row.query for row in rows], language)[-1]
        return normalize(vectors), np.array([row.label for row in rows])

    english = run.config.data.language
    (x, y), (dev_x, dev_y) = read("train", english), read("dev", english)
    fits = [LogisticRegression(C=c, max_iter=5000).fit(x, y) for c in STRENGTHS]
    best = max(fits, key=lambda fit: fit.score(dev_x, dev_y))
    print(f"regression: C={best.C}, {100 * best.score(dev_x, dev_y):.1f}% of English development")
    tested = {name: read("test", name, limit) for name in languages}
    return {name: (best.predict(x) == y).astype(int).tolist() for name, (x, y) in tested.items()}


def llm_alone(
    run: OpenRun, languages: list[str], limit: int | None, shots: int = 0
) -> dict[str, list[int]]:
    """Which test rows the LLM gets right with the topics in its prompt, and `shots` examples: the
    first English training row of each topic."""
    task, shown = run.task, {}
    for row in rows_of(run, "train", run.config.data.language):
        shown.setdefault(row.label, row)
    asked = "Text: {}\nTopic:"
    before = f"The topic of a text is one of: {', '.join(task.labels)}.\n\n"
    before += "".join(f"{asked.format(row.query)} {row.target}\n\n"
                      for row in list(shown.values())[:shots])
    settings = replace(for_task(run.config.eval, task), max_new_tokens=0, max_decoder_tokens=1024)
    scorer, correct = Scorer(run.model.bridge, run.tokenizers, settings, bare=True), {}
    for language in languages:
        rows = rows_of(run, "test", language, limit)
        prompts = [replace(row, query=before + asked.format(row.query)) for row in rows]
        with run.on_mesh():
            scored = scorer(run.params, prompts, task)
        correct[language] = [int(x) for x in scored.correct["likelihood"]]
    return correct


BASELINES = {LLM: llm_alone, FEW: partial(llm_alone, shots=SHOTS), REGRESSION: regression}


if __name__ == "__main__":
    main()
