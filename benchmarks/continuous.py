"""Answers of different lengths: batches that wait for their longest, and continuous batching.

    python benchmarks/continuous.py --out benchmarks/results/continuous.json

An LLM of SmolLM2-135M's shape with random weights answers random prompts with samples. A sixteenth
of its tokens ends an answer, so that lengths have nearly a geometric distribution. Times are CPU
seconds of the process, so that others on the machine disturb them less.
"""

import time
from functools import partial
from types import SimpleNamespace

import jax
import numpy as np
from flax import linen as nn
from timing import machine, medians, parser, report, show, speedup

from jaxfusion.data.batching import TokenRow, find_bare_shapes, in_order
from jaxfusion.evaluation.continuous import answer_all, make_programs
from jaxfusion.evaluation.generate import Decoding, make_scorer
from jaxfusion.evaluation.options import make_options
from jaxfusion.nn.bridge import Bridge
from jaxfusion.nn.decoder import Decoder, DecoderConfig

LLM = DecoderConfig(49_152, d_model=576, d_ff=1536, num_layers=30, num_heads=9, num_kv_heads=3,
                    head_dim=64, tie_embeddings=True)
ROWS, BATCH, PROMPT, LONGEST, ENDS, EOS = 128, 16, 32, 64, 1 / 16, 2
TOKENIZERS = SimpleNamespace(start=[1])


def main() -> None:
    args = parser(__doc__, repeats=2).parse_args()
    bridge, rng = Bridge(None, Decoder(LLM), None, "last"), np.random.default_rng(0)
    init = partial(bridge.decoder.init, method="score")
    params = {"decoder": nn.unbox(jax.jit(init)(
        jax.random.key(0), *[np.ones((1, 2), np.int32)] * 3))["params"]}
    ends = rng.random(LLM.vocab_size) < ENDS
    rows = [TokenRow([], rng.integers(3, LLM.vocab_size, PROMPT - 1).tolist(), [])
            for _ in range(ROWS)]
    shapes, decoding = find_bare_shapes(rows, (PROMPT,)), Decoding(LONGEST, EOS, temperature=1.0)
    score, programs = (make(bridge, decoding, True) for make in (make_scorer, make_programs))
    numbers, options = np.arange(ROWS, dtype=np.int32), make_options([[[]] * BATCH], BATCH)

    def in_batches() -> dict[int, np.ndarray]:
        return {i: tokens for chosen, batch in in_order(rows, shapes, TOKENIZERS, BATCH)
                for i, tokens in zip(chosen.tolist(), jax.device_get(
                    score(params, batch, options, ends, numbers[chosen])[0]), strict=True)}

    def continuously() -> dict[int, np.ndarray]:
        return dict(answer_all(programs, params, rows, shapes, TOKENIZERS, BATCH, numbers, ends))

    contenders = {"batch by batch": in_batches, "continuous": continuously}
    found = {name: answer() for name, answer in contenders.items()}
    seconds = {name: [] for name in contenders}
    for _ in range(args.repeats):
        for name, answer in contenders.items():
            start = time.process_time()
            answer()
            seconds[name].append(time.process_time() - start)
    lengths = np.array([_length(tokens, ends) for tokens in found["continuous"].values()])
    steps = sum(max(_length(found["continuous"][i], ends) for i in chosen)
                for chosen, _ in in_order(rows, shapes, TOKENIZERS, BATCH))
    same = [np.array_equal(found["batch by batch"][i], found["continuous"][i]) for i in range(ROWS)]
    result = {"rows": ROWS, "batch": BATCH, "prompt": PROMPT, "longest": LONGEST,
              "mean_length": float(lengths.mean()), "equal": int(sum(same)), "steps": steps,
              "cpu_seconds": medians(seconds),
              "faster": speedup(seconds, "continuous", "batch by batch"), "machine": machine()}
    report(result, args.out)
    show("answers of different lengths", ["", "CPU seconds"], [
        [name, f"{x:.1f}"] for name, x in result["cpu_seconds"].items()])


def _length(tokens: np.ndarray, ends: np.ndarray) -> int:
    """Tokens of an answer up to its end, with it."""
    ended = np.flatnonzero(ends[tokens] | (tokens == EOS))
    return int(ended[0]) + 1 if len(ended) else len(tokens)


if __name__ == "__main__":
    main()
