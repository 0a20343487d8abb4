"""Measures how time and memory grow with each size of the problem, others held constant.

    python benchmarks/growth.py --out benchmarks/results/growth.json

A training step by encoder tokens and by blocks of both towers, label likelihoods of a batch by
labels, and the statistics of a report by languages. Towers of the size `pocket`, Transformer
Softmax, float32; every row has the same length. Memory is what the compiled program needs beside
its inputs and outputs. Rows of a data set are in `rows.py`; `table.py` draws the picture.
"""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
from timing import alternate, compiled, machine, medians, parser, report, show
from train_step import EOS, TOKENIZERS, JaxTrainer, make_bridge, make_params

from jaxfusion.data.batching import Shapes, TokenRow, collate
from jaxfusion.evaluation.generate import Decoding, make_scorer
from jaxfusion.evaluation.options import make_options
from jaxfusion.miniatures.checkpoints import SIZES
from jaxfusion.nn.bridge import Batch, Bridge
from jaxfusion.reports.comparison import Comparison, as_json

TOWERS = tuple(replace(config, vocab_size=8000) for config in SIZES["pocket"])
TOKENS, BLOCKS = (32, 64, 128, 256, 512, 1024), (12, 24, 48)
LABELS, LANGUAGES = (2, 4, 8, 16, 32, 64), (2, 20, 200)
BATCH, TARGET = 8, 4  # rows; tokens of an answer
Growth = dict[str, Any]


def make_batch(tokens: int) -> Batch:
    """A batch of random rows that all have this many encoder tokens."""
    rng = np.random.default_rng(0)
    encoder, decoder = (config.vocab_size for config in TOWERS)
    rows = [TokenRow(rng.integers(3, encoder, tokens).tolist(), [],
                     rng.integers(3, decoder, TARGET).tolist()) for _ in range(BATCH)]
    shapes = Shapes((tokens,), (TARGET,), TARGET)
    return collate(*shapes.place(rows, len(TOKENIZERS.start), BATCH), TOKENIZERS)


def median_of(call, repeats: int) -> float:
    """Median seconds of a call, after one that is not timed."""
    return medians(alternate({"call": call}, repeats))["call"]


def step(tokens: int, blocks: int | None, repeats: int) -> Growth:
    """Time and memory of a training step."""
    towers = TOWERS if blocks is None else tuple(replace(x, num_layers=blocks) for x in TOWERS)
    trainer = JaxTrainer(Bridge, towers, make_params(towers), make_batch(tokens))
    memory = trainer.program.memory_analysis().temp_size_in_bytes
    return {"seconds": median_of(trainer, repeats), "bytes": memory,
            "compile_seconds": trainer.compile_seconds}


def scoring(labels: int, repeats: int) -> Growth:
    """Time and memory of a batch's likelihoods of labels of four random tokens each."""
    bridge, params = make_bridge(Bridge, TOWERS), make_params(TOWERS)
    drawn = np.random.default_rng(1).integers(3, TOWERS[1].vocab_size, (labels, TARGET)).tolist()
    options = make_options([[label] * BATCH for label in drawn], BATCH)
    score = make_scorer(bridge, Decoding(0, EOS), bare=False)
    batch = make_batch(64)
    program, took = compiled(score, params, batch, options)
    memory = program.memory_analysis().temp_size_in_bytes
    run = lambda: jax.block_until_ready(program(params, batch, options))  # noqa: E731
    return {"seconds": median_of(run, repeats), "bytes": memory, "compile_seconds": took}


def statistics(languages: int, repeats: int) -> Growth:
    """Time of the intervals and tests of four models with three seeds on 200 rows a language."""
    rng = np.random.default_rng(0)
    names = [f"language {i}" for i in range(languages)]
    correct = {f"model {i}": {name: rng.integers(0, 2, (3, 200)).tolist() for name in names}
               for i in range(4)}
    comparison = Comparison("topics", "likelihood", correct, {"all": tuple(names)}, "model 0", {},
                            {})
    return {"seconds": median_of(lambda: as_json(comparison), repeats)}


def main() -> None:
    args = parser(__doc__, repeats=5).parse_args()
    growth = {
        "encoder tokens": {n: step(n, None, args.repeats) for n in TOKENS},
        "blocks of each tower": {n: step(64, n, args.repeats) for n in BLOCKS},
        "labels": {n: scoring(n, args.repeats) for n in LABELS},
        "languages of a report": {n: statistics(n, 1) for n in LANGUAGES},
    }
    rows = [[f"{name}: {size:,}", f"{x['seconds']:.3f} s", f"{x.get('bytes', 0) / 2**20:.0f} MiB"]
            for name, found in growth.items() for size, x in found.items()]
    show("how cost grows", ["", "time", "memory"], rows)
    report({"benchmark": "growth", "batch": BATCH, "growth": growth, "machine": machine()},
           args.out)


if __name__ == "__main__":
    main()
