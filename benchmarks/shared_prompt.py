"""What all prompts of an LLM begin with, read once and read with every row: five examples.

    python benchmarks/shared_prompt.py LLM SIB200 --out benchmarks/results/shared_prompt.json

LLM is a checkpoint's directory, SIB200 the data set's folder. Times are CPU seconds of the process,
so that others on the machine disturb them less; the FLOPs are those of the matrix products.
"""

import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from timing import machine, medians, parser, report, show, speedup

from jaxfusion.costs.flops import count_flops
from jaxfusion.data.batching import in_order
from jaxfusion.data.rows.examples import Example, read_examples
from jaxfusion.data.tasks.catalogue import TASKS
from jaxfusion.evaluation.scoring import Scorer
from jaxfusion.fields import DecoderSettings, EvalConfig
from jaxfusion.nn.bridge import Bridge
from jaxfusion.sharding.mesh import make_mesh
from jaxfusion.training.load import load_llm

TASK, LANGUAGE, SHOTS, ROWS = TASKS["sib200"], "eng_Latn", 5, 8
SETTINGS = EvalConfig(batch_size=ROWS, max_new_tokens=0, max_decoder_tokens=1024)


class Again(Scorer):
    """Reads every prompt whole."""

    def shared(self, rows) -> int:
        return 0


def prompts(place: Path) -> list[Example]:
    """Test rows behind five training rows."""
    train, test = (read_examples("sib200", TASK, split, LANGUAGE, str(place))
                   for split in ("train", "test"))
    shown = list({row.label: row for row in reversed(train)}.values())[:SHOTS]
    asked = "Text: {}\nTopic:"
    before = "".join(f"{asked.format(x.query)} {x.target}\n\n" for x in shown)
    return [replace(x, query=before + asked.format(x.query)) for x in test[:ROWS]]


def flops(scorer: Scorer, params, examples: list[Example]) -> float:
    """Of the program for the first batch, which holds all examples."""
    rows, _ = scorer.rows(examples)
    chosen, batch = next(iter(in_order(rows, scorer.shapes(rows), scorer.tokenizers, ROWS)))
    options = scorer.options([examples[i] for i in chosen], TASK.labels)
    return count_flops(scorer.program(rows), params, batch, options)


def main() -> None:
    arguments = parser(__doc__, repeats=2)
    arguments.add_argument("llm", type=Path)
    arguments.add_argument("place", type=Path)
    args = arguments.parse_args()
    mesh, examples = make_mesh(), prompts(args.place)
    with jax.set_mesh(mesh):
        llm = load_llm(DecoderSettings(str(args.llm)), None, None, mesh)
        bridge = Bridge(None, llm.decoder, None, "last")
        scorers = {name: kind(bridge, llm.tokenizers, SETTINGS, bare=True)
                   for name, kind in (("once", Scorer), ("again", Again))}
        rows, _ = scorers["once"].rows(examples)
        counts = {name: flops(x, llm.params, examples) for name, x in scorers.items()}
        found = {name: x(llm.params, examples, TASK).likelihoods for name, x in scorers.items()}
        seconds = {name: [] for name in scorers}
        for _ in range(args.repeats):
            for name, scorer in scorers.items():
                start = time.process_time()
                scorer(llm.params, examples, TASK)
                seconds[name].append(time.process_time() - start)
    off = float(np.max(np.abs(found["once"] - found["again"]) / np.abs(found["again"])))
    result = {
        "rows": ROWS, "tokens": max(len(row.text) for row in rows),
        "shared": scorers["once"].shared(rows), "flops": counts, "difference": off,
        "predicted": counts["again"] / counts["once"], "cpu_seconds": medians(seconds),
        "faster": speedup(seconds, "once", "again"), "machine": machine()}
    report(result, args.out)
    show("five examples in every prompt", ["", "GFLOPs", "CPU seconds"], [
        [name, f"{counts[name] / 1e9:,.0f}", f"{result['cpu_seconds'][name]:.1f}"]
        for name in scorers])


if __name__ == "__main__":
    main()
