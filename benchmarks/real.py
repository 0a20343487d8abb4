r"""Real bridges beside what needs none: their LLM and their encoder alone.

    python train.py --config configs/real_topics.py:compare --workdir runs/real_topics
    python train.py --config configs/real_topics.py:methods --workdir runs/real_methods
    python benchmarks/real.py runs/real_topics runs/real_methods \
        --out benchmarks/results/real_topics.json

Takes one comparison or more on the same task and rows, with any towers: set `config.base` of each.
Needs scikit-learn. The encoder alone is a logistic regression on its mean-pooled last states,
trained on the same English rows, its regularisation chosen on the English development rows. The LLM
alone reads the task's prompt, without examples and with five English ones; of topics, a prompt that
names them. Which rows all of them get right is kept in `--out`: a second start goes on, and adds
other variants or seeds (`--config.seeds=3,4`) to those that are there. What was measured with
another recipe, tower, prompt, task or number of rows is dropped.
"""

import argparse
import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from timing import machine

from jaxfusion import config as configs
from jaxfusion.bridge.compare import side_by_side
from jaxfusion.config import run_folders
from jaxfusion.data.rows.examples import Example, read_examples
from jaxfusion.data.tasks.catalogue import get_task
from jaxfusion.data.tasks.spec import Task, configured
from jaxfusion.errors import InputError
from jaxfusion.evaluation.scoring import Scorer, for_task
from jaxfusion.fields import CompareConfig
from jaxfusion.files import write_whole
from jaxfusion.reports.comparison import Comparison, as_json, markdown
from jaxfusion.reports.pictures import draw_accuracy, draw_layers
from jaxfusion.reports.scored_runs import Models, ScoredRun, mean_weights, read_run
from jaxfusion.runs.open_run import OpenRun, open_run
from jaxfusion.training.load import open_towers
from jaxfusion.training.origin import digest_of, read_origin

LLM, FEW, REGRESSION = "LLM, no example", "LLM, 5 examples", "encoder + regression"
STRENGTHS = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]  # 1 / L2 penalty
SHOTS, ROW = 5, "{row}"
# By variant and seed: `recipe`, `correct` with a digit for each row of a language, and `weights`.
Runs = dict[str, dict[str, dict[str, Any]]]
LLM_ROWS = 4  # of a batch: prompts differ much in length, and a CPU gains nothing from more


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workdirs", type=Path, nargs="+", help="of comparisons on the same rows")
    parser.add_argument("--seeds", type=int, nargs="+", help="of the comparisons; default: all")
    parser.add_argument("--baselines", nargs="*", choices=list(BASELINES), default=list(BASELINES))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    config, models = read_models(args.workdirs, args.seeds)
    seen = side_by_side(config, models, {})
    bridges, runs = with_kept(seen, models, args.out)
    run, first = open_run(Path(next(iter(models.values()))[0].place)), args.workdirs[0]
    alone = measure(run, args.baselines, list(bridges.languages), config.rows, args.out)
    correct = {name: {language: [*map(int, alone[name]["correct"][language])]
                      for language in bridges.languages} for name in args.baselines}
    comparison = replace(bridges, correct={**correct, **bridges.correct},
                         reference=REGRESSION if REGRESSION in correct else bridges.reference)
    seeds = sorted({int(seed) for by_seed in runs.values() for seed in by_seed})
    result = {"table": markdown(comparison), **as_json(comparison), "seeds": seeds,
              "rows": len(next(iter(bridges.correct.values()))[bridges.languages[0]][0]),
              "seconds": {name: {"score": alone[name]["seconds"]} for name in args.baselines},
              "alone": alone, "runs": runs, "machine": machine()}
    write_whole(args.out, json.dumps(result, indent=1) + "\n")
    draw_accuracy(comparison, first / "real_accuracy.png")
    draw_layers(bridges, first / "real_layers.png")
    print(result["table"])


def read_models(workdirs: list[Path], seeds: list[int] | None) -> tuple[CompareConfig, Models]:
    """The first comparison's config, and the scored runs of all by variant.

    Raises:
      InputError: two comparisons have a variant of the same name.
    """
    models = {}
    for workdir in workdirs:
        config = configs.load(workdir / "config.json")
        config = replace(config, seeds=tuple(seeds or config.seeds))
        for name, runs in run_folders(config).items():
            if name in models:
                raise InputError(f"{workdir}: '{name}' is a variant of another comparison too")
            places = [workdir / where for where in runs]
            if all((place / "eval" / "results.json").is_file() for place in places):
                models[name] = [read_run(place) for place in places]
            else:
                print(f"not scored yet, and left out: {name}")
    first = configs.load(workdirs[0] / "config.json")
    return replace(first, seeds=tuple(seeds or first.seeds)), models


def with_kept(seen: Comparison, models: Models, out: Path) -> tuple[Comparison, Runs]:
    """The comparison with the runs that the file has besides, and all runs as it keeps them."""
    kept: Runs = json.loads(out.read_text("utf-8")).get("runs", {}) if out.is_file() else {}
    for name, scored in models.items():
        for run in scored:
            recipe = recipe_of(run)
            same = {seed: x for seed, x in kept.get(name, {}).items() if x["recipe"] == recipe}
            by_language = run.details[seen.task]
            kept[name] = {**same, str(run.config["train"]["seed"]): {
                "recipe": recipe,
                "correct": {x: "".join(map(str, by_language[x]["correct"][seen.scoring]))
                            for x in seen.languages},
                "weights": mean_weights(seen.task, seen.languages, [run])}}
    runs = {name: [by_seed[seed] for seed in sorted(by_seed, key=int)]
            for name, by_seed in kept.items()}
    for name, by_seed in kept.items():
        print(f"{name}: seeds {', '.join(sorted(by_seed, key=int))}, of which "
              f"{len(models.get(name, ()))} are in the workdirs")
    correct = {name: {x: [[*map(int, run["correct"][x])] for run in every] for x in seen.languages}
               for name, every in runs.items()}
    weights = {name: {x: np.mean([run["weights"][x] for run in every], axis=0).tolist()
                      for x in every[0]["weights"]} for name, every in runs.items()}
    return replace(seen, correct=correct, layer_weights={
        name: by_language for name, by_language in weights.items() if by_language}), kept


def recipe_of(run: ScoredRun) -> str:
    """A digest of what a run learned from and was scored on, wherever that was, and whatever the
    seed."""
    places = {"encoder": ("checkpoint", "revision"), "decoder": ("checkpoint", "revision"),
              "data": ("path", "revision"), "train": ("seed",)}
    same = {group: {x: value for x, value in fields.items() if x not in places.get(group, ())}
            if isinstance(fields, dict) else fields for group, fields in run.config.items()}
    _, origin = read_origin(Path(run.place))
    return digest_of([same, {part: x for part, x in origin.items() if part != "source"},
                      run.about["limit"]])


def measure(
    run: OpenRun, names: list[str], languages: list[str], limit: int | None, out: Path
) -> dict[str, dict[str, Any]]:
    """The baselines with the test rows they get right, a digit for each row of a language.

    They are kept in the file, beside what else it has; those of other settings are dropped.
    """
    kept = json.loads(out.read_text("utf-8")) if out.is_file() else {}
    settings, was = settings_of(run, limit), kept.get("alone", {})
    kept["alone"] = alone = {name: was[name] for name, x in settings.items()
                             if name in was and x.items() <= was[name].items()}
    for name in names:
        found = alone.setdefault(name, {**settings[name], "correct": {}, "seconds": 0.0,
                                        "machine": machine()})
        left = [language for language in languages if language not in found["correct"]]
        # The regression is fitted once; the LLM takes minutes for each language.
        for part in [left] if name == REGRESSION and left else [[x] for x in left]:
            clock = time.monotonic()
            correct = BASELINES[name](run, part, limit)
            found["correct"] |= {x: "".join(map(str, rows)) for x, rows in correct.items()}
            found["seconds"] += time.monotonic() - clock
            write_whole(out, json.dumps(kept, indent=1) + "\n")
            print(f"{name}: {', '.join(part)}", flush=True)
        print(f"{name}: {found['seconds']:.0f} s", flush=True)
    return alone


def settings_of(run: OpenRun, limit: int | None) -> dict[str, dict[str, Any]]:
    """What decides the rows that a baseline gets right; its tower by digests."""
    origin = open_towers(run.config).origin
    return {name: {"tower": {part: x for part, x in origin.items() if part.startswith(role)},
                   "dtype": getattr(run.config, role).dtype, "prompt": PROMPTS[name](run),
                   "task": run.config.data.task, "rows": limit} for name, role in TOWERS.items()}


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
    """Which test rows the LLM gets right, with `shots` examples in its prompt."""
    task, prompt = run.task, few_shot(run, shots)
    settings = replace(for_task(run.config.eval, task), max_new_tokens=0, max_decoder_tokens=1024,
                       batch_size=LLM_ROWS)
    scorer, correct = Scorer(run.model.bridge, run.tokenizers, settings, bare=True), {}
    for language in languages:
        rows = rows_of(run, "test", language, limit)
        prompts = [replace(row, query=prompt.replace(ROW, row.query)) for row in rows]
        with run.on_mesh():
            scored = scorer(run.params, prompts, task)
        correct[language] = [int(x) for x in scored.correct["likelihood"]]
    return correct


def few_shot(run: OpenRun, shots: int = 0) -> str:
    """The prompt of the LLM alone, with `ROW` in place of a row; its examples are the first English
    training row of each label."""
    heading, asked = prompt_of(run.task)
    shown = {}
    for row in rows_of(run, "train", run.config.data.language):
        shown.setdefault(row.label, row)
    examples = [f"{asked.replace(ROW, row.query).rstrip()} {row.target}\n\n"
                for row in list(shown.values())[:shots]]
    return "".join((heading, *examples, asked))


def prompt_of(task: Task) -> tuple[str, str]:
    """What precedes all rows of a prompt for the LLM alone, and the form of a row."""
    if task.prompt != "{text}":  # it says itself what is asked
        return "", ROW
    # The space at the end goes to the label, as the LLM has read words.
    return f"The topic of a text is one of: {', '.join(task.labels)}.\n\n", f"Text: {ROW}\nTopic: "


BASELINES = {LLM: llm_alone, FEW: partial(llm_alone, shots=SHOTS), REGRESSION: regression}
TOWERS = {LLM: "decoder", FEW: "decoder", REGRESSION: "encoder"}
PROMPTS = {LLM: few_shot, FEW: partial(few_shot, shots=SHOTS),
           REGRESSION: lambda run: run.config.encoder.prefix}


if __name__ == "__main__":
    main()
