"""Compares Lens' training on cached activations with full models in every step.

    python benchmarks/lens.py --size tiny                     # seconds
    python benchmarks/lens.py --size full --rounds 3 --json benchmarks/results/lens.json

The top two blocks of a Llama train on prompts of a central language and one target, float32, AdamW
with clipped gradients; weights are random and the same for all, and so are prompts and their order:

  kept      the model is loaded, `cache_activations` reads every prompt once, the model is freed,
            and steps run only the top blocks
  unkept    the same losses with two of our models, trained and original: each step runs both in
            full on the batch's prompts; gradients only for the top blocks; no logits
  torch     the same with two LlamaForCausalLM, as users run them: one language at a time, padded
            to its longest prompt of the batch, with all hidden states and unused logits

A run is one setting of (λ, w), for `kept` including loading and caching; a sweep is 20, for `kept`
from one cache. The others are loaded before the clock starts; 2 of their settings are timed and
extrapolated to 20. Losses of the first 3 steps must agree before anything is timed. Times exclude
XLA's compilation, which has its own column. Memory is the peak of a short run in a separate process
beyond its memory after the imports, including the models that it loads. At size `full` that run
uses a wider model, whose weights exceed the memory of XLA's compiler.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, NamedTuple

# Compilation is measured, so it must not come out of a cache.
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import traverse_util
from table import lens as section
from timing import machine, medians, speedup
from transformers import LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from jaxfusion.data.batching import DECODER_STEP, TokenRow
from jaxfusion.data.tokenizers import Tokenizers
from jaxfusion.fields import GroupConfig, LensConfig, OptimizerConfig
from jaxfusion.hf.load import load_params
from jaxfusion.hf.tables import tower_table
from jaxfusion.lens import probe as probing
from jaxfusion.lens.activations import (
    ActivationBatches,
    Activations,
    cache_activations,
    last_and_mean,
    slice_blocks,
    split,
)
from jaxfusion.lens.objective import Manipulation, aims, make_goals
from jaxfusion.lens.probe import Probe
from jaxfusion.miniatures.checkpoints import random_params, write_random_tower
from jaxfusion.nn.bridge import Bridge
from jaxfusion.nn.decoder import Decoder, DecoderConfig
from jaxfusion.training.optimizer import group_of_each, make_optimizer
from jaxfusion.training.state import Flat, State
from jaxfusion.training.step import make_train_step

LANGUAGES = ("central", "target")
BLOCKS, BATCH = 2, 8
WEIGHTS, MOVES = (0.1, 0.3, 1.0, 3.0, 10.0), (0.5, 1.0, 2.0, 4.0)
SETTINGS = [(weight, move) for weight in WEIGHTS for move in MOVES]
TIMED = 2  # settings of which the others' sweeps are extrapolated
RATE, DECAY = 1e-3, 0.1
OPTIMIZER = OptimizerConfig(
    groups={"blocks": GroupConfig(("decoder/blocks/.*",), RATE, DECAY)}, b1=0.9,
    schedule="constant", warmup_fraction=0.0)
BOS, EOS = 1, 2
TOKENIZERS = Tokenizers(None, SimpleNamespace(bos_token_id=BOS, eos_token_id=EOS), bos=True)
CHECKED, TOLERANCE = 3, 1e-3  # steps, and by how much their losses may differ, relative
# The targets of `kept`: speedups over the others in a run and in a sweep, and share of memory.
RUN, SWEEP = {"unkept": 1.7, "torch": 3.0}, {"unkept": 8.0, "torch": 15.0}
SHARE = 0.6


class Size(NamedTuple):
    """A model and its prompts in each language, from half of `length` to `length` tokens."""

    shape: DecoderConfig
    length: int
    prompts: int
    steps: int
    buckets: tuple[int, ...] = ()


SIZES = {
    "tiny": Size(DecoderConfig(512, 64, 128, 8, 4, 4, 16), 32, 32, 4),
    "full": Size(DecoderConfig(8192, 384, 1024, 32, 6, 6, 64), 64, 200, 25, (39, 47, 55)),
    # Only for memory: weights exceed the compiler's memory, as in real LLMs.
    "memory": Size(DecoderConfig(8192, 1280, 3456, 32, 20, 20, 64), 64, 64, 2, (47,)),
}


class Prompts(NamedTuple):
    """All prompts [R C N], each from slot 0 on; `last` [R C] are their last slots."""

    tokens: np.ndarray
    positions: np.ndarray
    segments: np.ndarray
    last: np.ndarray


Setting = tuple[float, float]  # weight of align and separate; w of the target


class Work(NamedTuple):
    """The common starting point of all contenders."""

    size: Size
    model: Path
    rows: dict[str, list[TokenRow]]
    prompts: Prompts
    found: Probe

    def aims(self, setting: Setting) -> dict[str, np.ndarray]:
        """Goals and weights of a setting by path, the arguments of every contender."""
        weight, move = setting
        goals = make_goals(self.found, BLOCKS, (), None, {LANGUAGES[1]: move})
        return aims(goals, LensConfig(align=weight, separate=weight))


class Compilation:
    """Counts what XLA compiles, and the seconds in which jax traces, lowers and compiles."""

    def __init__(self):
        self.spans, self.programs = [], 0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, seconds: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            end = time.perf_counter()
            self.spans.append((end - seconds, end))
            self.programs += event.endswith("backend_compile_duration")

    def take(self) -> tuple[float, int]:
        """Seconds and programs since the last call; nested functions count once."""
        total, until = 0.0, 0.0
        for start, end in sorted(self.spans):
            total += max(0.0, end - max(start, until))
            until = max(until, end)
        programs, self.spans, self.programs = self.programs, [], 0
        return total, programs


class Ours:
    """Base of our two contenders: a jitted step, and runs of it from the start.

    Attributes:
      top: parameters of the trained blocks and of everything outside blocks, by path.
      others: other parameters of the loss, by path.
    """

    def __init__(self, work: Work):
        self.work, (below, above) = work, split(work.size.shape, BLOCKS)
        self.decoder, self.lower, self.upper = map(Decoder, (work.size.shape, below, above))
        self.first = below.num_layers
        top = jax.eval_shape(
            lambda: slice_blocks(random_params(work.size.shape, 0), self.first, None))
        self.groups = group_of_each(flatten(decoder=top), OPTIMIZER.groups)
        self.optimizer = make_optimizer(OPTIMIZER, self.groups, work.size.steps)
        self.after = Manipulation(self.upper, (BLOCKS - 1,)).loss
        self.step = make_train_step(self.loss, self.optimizer, {})
        self.top, self.others = {}, {}

    def load(self) -> dict[str, Any]:
        """The decoder's parameters from the checkpoint."""
        wanted = flatten(**jax.eval_shape(lambda: random_params(self.work.size.shape, 0)))
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        wanted = {path: x.update(sharding=place) for path, x in wanted.items()}
        flat = load_params(self.work.model, tower_table(self.work.size.shape), wanted)
        return traverse_util.unflatten_dict(flat, sep="/")

    def run(self, batches: ActivationBatches, setting: Setting, steps: int) -> list[float]:
        """Trains from the start with one setting; returns the loss before every step."""
        # Copies: the step takes its state's memory.
        trainable = {path: jnp.copy(self.top[path]) for path in self.groups}
        state = State(jnp.zeros((), jnp.int32), trainable, self.optimizer.init(trainable))
        frozen = {path: x for path, x in self.top.items() if path not in self.groups}
        # A setting is an argument of the step: another one compiles nothing.
        frozen |= self.others | self.work.aims(setting)
        key, losses = jax.random.key(0), []
        for i in range(steps):
            state, metrics = self.step(state, frozen, batches[i], key)
            losses.append(metrics["loss"])
        jax.block_until_ready(state)
        return [float(x) for x in losses]


class Cached(Ours):
    """Cached activations, as in jaxfusion."""

    def prepare(self) -> ActivationBatches:
        """Loads the model, caches the activations, and frees the model."""
        params = self.load()
        kept = cache_activations(
            Bridge(None, self.decoder, None, "last"), {"decoder": params}, self.work.rows,
            TOKENIZERS, BLOCKS, BATCH * len(LANGUAGES), self.work.size.buckets)
        self.top = flatten(decoder=slice_blocks(params, self.first, None))
        return ActivationBatches(kept, BATCH, 0, self.work.size.steps)

    def loss(self, params: dict[str, Any], batch: Activations, key=None):
        return self.after(params, batch)


class Uncached(Ours):
    """Two models that run in full in every step."""

    def __init__(self, work: Work):
        super().__init__(work)
        params = self.load()
        self.top = flatten(decoder=slice_blocks(params, self.first, None))
        self.others = flatten(below=slice_blocks(params, 0, self.first))
        del params  # the second model is loaded when the first is in its place
        self.others |= flatten(reference=self.load())  # a copy of its own, as two models have

    def prepare(self) -> ActivationBatches:
        return ActivationBatches(self.work.prompts, BATCH, 0, self.work.size.steps)

    def loss(self, params: dict[str, Any], batch: Prompts, key=None):
        """The loss language by language, as in the authors' code, without cached activations."""
        live, reference = {"params": params["below"]}, {"params": params["reference"]}
        every = []
        for c in range(batch.last.shape[1]):
            tokens, *place, last = (x[:, c] for x in batch)
            hidden, _ = self.lower.apply(
                live, self.lower.apply(live, tokens, method="embed"), *place, method="stream")
            states, _ = self.decoder.apply(
                reference, self.decoder.apply(reference, tokens, method="embed"), *place,
                last_and_mean(last, place[1]), method="states")
            every.append((hidden, jnp.moveaxis(states[-BLOCKS:], 0, 1)))
        hidden, states = (jnp.stack(x, axis=1) for x in zip(*every, strict=True))
        kept = Activations(hidden, batch.positions, batch.segments, batch.last, states[:, :, :, 0],
                           states[:, 0, :, 1], slots=None, tokens=None, answered=None)
        return self.after(params, kept)


class Torch:
    """Two LlamaForCausalLM."""

    def __init__(self, work: Work):
        self.work = work
        self.live, self.reference = (
            LlamaForCausalLM.from_pretrained(work.model, dtype=torch.float32)
            .eval().requires_grad_(False) for _ in range(2))
        self.top = self.live.model.layers[-BLOCKS:].requires_grad_(True)

    def prepare(self) -> ActivationBatches:
        return ActivationBatches(self.work.prompts, BATCH, 0, self.work.size.steps)

    def run(self, batches: ActivationBatches, setting: Setting, steps: int) -> list[float]:
        """As `Ours.run`."""
        self.top.load_state_dict(self.reference.model.layers[-BLOCKS:].state_dict())
        optimizer = torch.optim.AdamW(
            self.top.parameters(), RATE, (OPTIMIZER.b1, OPTIMIZER.b2), OPTIMIZER.eps, DECAY)
        lens = {name.rpartition("/")[2]: torch.from_numpy(np.array(x))
                for name, x in self.work.aims(setting).items()}
        losses = []
        for i in range(steps):
            optimizer.zero_grad()
            loss = self.loss(batches[i], lens)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.top.parameters(), OPTIMIZER.clip_norm)
            optimizer.step()
            losses.append(loss.item())
        return losses

    def loss(self, batch: Prompts, lens: dict[str, torch.Tensor]) -> torch.Tensor:
        """The losses of `jaxfusion.lens.losses`."""
        after, mean = states(self.live, batch)
        with torch.no_grad():
            before, mean_before = states(self.reference, batch)
        width, along = after.shape[-1], after @ lens["direction"]
        align = ((along[:, :1] - along[:, 1:]) ** 2).sum(dim=1) / width
        moved = (after - before)[:, 1:] @ lens["specific"]
        separate = ((moved - lens["moves"]) ** 2).sum(dim=(1, 2)) / width
        retain = ((mean - mean_before) ** 2).mean(dim=-1)
        total = lens["align"] * align + lens["separate"] * separate + lens["retain"] * retain
        return total.mean()


def states(model: LlamaForCausalLM, batch: Prompts) -> tuple[torch.Tensor, torch.Tensor]:
    """Final states of every language's last tokens [B C E], and the central prompts' means."""
    lasts, means = [], []
    for c in range(len(LANGUAGES)):
        last = torch.from_numpy(batch.last[:, c]).long()
        length = int(last.max()) + 1
        tokens, real = (torch.from_numpy(np.ascontiguousarray(x[:, c, :length])).long()
                        for x in (batch.tokens, batch.segments))
        out = model(input_ids=tokens, attention_mask=real, output_hidden_states=True,
                    use_cache=False)
        final = out.hidden_states[-1]
        lasts.append(final[torch.arange(len(final)), last])
        means.append((final * real[:, :, None]).sum(dim=1) / real.sum(dim=1, keepdim=True))
    return torch.stack(lasts, dim=1), means[0]


CONTENDERS = {"kept": Cached, "unkept": Uncached, "torch": Torch}


def flatten(**tree: Any) -> Flat:
    return traverse_util.flatten_dict(tree, sep="/")


def make_rows(size: Size) -> dict[str, list[TokenRow]]:
    """Random prompts; each language uses its own half of the vocabulary."""
    rng, half = np.random.default_rng(0), size.shape.vocab_size // 2
    found = {}
    for language, low in zip(LANGUAGES, (EOS + 1, half), strict=True):
        lengths = rng.integers(size.length // 2, size.length, size.prompts)  # and BOS
        found[language] = [
            TokenRow([], rng.integers(low, low + half - EOS - 1, n).tolist(), []) for n in lengths]
    return found


def lay_out(rows: dict[str, list[TokenRow]]) -> Prompts:
    """The prompts as arrays, with the length that `cache_activations` uses."""
    whole = [[[BOS, *row.text] for row in prompts] for prompts in rows.values()]
    lengths = np.array([[len(ids) for ids in prompts] for prompts in whole], np.int32).T
    slots = np.arange(-(-lengths.max() // DECODER_STEP) * DECODER_STEP, dtype=np.int32)
    real = slots < lengths[:, :, None]
    tokens = np.zeros(real.shape, np.int32)
    tokens[real] = [i for pair in zip(*whole, strict=True) for ids in pair for i in ids]
    return Prompts(tokens, np.where(real, slots, 0), real.astype(np.int32), lengths - 1)


def make_work(size: Size, folder: Path) -> Work:
    """Writes a random checkpoint and probes it, once for all processes."""
    model, file, rows = folder / "model", folder / "probe.npz", make_rows(size)
    if not file.exists():
        model.mkdir()
        write_random_tower(model, size.shape)
        bridge = Bridge(None, Decoder(size.shape), None, "last")
        found = probing.probe(bridge, {"decoder": random_params(size.shape, 0)}, rows, TOKENIZERS,
                              (size.length,), BATCH)
        np.savez(file, means=found.means, variances=found.variances)
    found = Probe(LANGUAGES, **np.load(file), rows=size.prompts)
    return Work(size, model, rows, lay_out(rows), found)


def check(contenders: dict[str, Any], compilation: Compilation) -> dict[str, Any]:
    """The first losses of all contenders, and what each compiled for them.

    Raises:
      SystemExit: the losses differ, so the times are not comparable.
    """
    losses, compiled = {}, {}
    for name, contender in contenders.items():
        compilation.take()
        losses[name] = contender.run(contender.prepare(), (1.0, 1.0), CHECKED)
        compiled[name] = compilation.take()[0]
    worst = max(abs(a / b - 1) for x in losses.values()
                for a, b in zip(x, losses["torch"], strict=True))
    if not worst <= TOLERANCE:
        sys.exit(f"error: losses differ by {worst:.1e}, at most {TOLERANCE} is allowed: {losses}")
    return {"first_losses": losses, "largest_relative_difference": worst,
            "compile_seconds": compiled}


def sweep(contender: Any, settings: list[Setting], compilation: Compilation) -> None:
    """Runs settings from one preparation.

    Raises:
      SystemExit: a setting had to be compiled.
    """
    batches, before = contender.prepare(), compilation.programs
    for setting in settings:
        contender.run(batches, setting, contender.work.size.steps)
    if compilation.programs > before:
        sys.exit(f"error: {type(contender).__name__} compiled for a setting")


def turns(
    calls: dict[str, Callable[[], None]], rounds: int, compilation: Compilation
) -> dict[str, list[float]]:
    """Seconds of every call without compilation, contenders taking turns (A B C A B C …)."""
    seconds = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            compilation.take()
            start = time.perf_counter()
            call()
            whole = time.perf_counter() - start
            seconds[name].append(whole - compilation.take()[0])
    return seconds


def measure(work: Work, rounds: int) -> dict[str, Any]:
    """Checks, then times runs and sweeps."""
    compilation = Compilation()
    contenders = {name: kind(work) for name, kind in CONTENDERS.items()}
    result = check(contenders, compilation)

    def timed(settings_of: Callable[[str], list[Setting]]) -> dict[str, list[float]]:
        return turns({name: lambda x=contender, name=name: sweep(x, settings_of(name), compilation)
                      for name, contender in contenders.items()}, rounds, compilation)

    runs = timed(lambda name: SETTINGS[:1])
    sweeps = timed(lambda name: SETTINGS if name == "kept" else SETTINGS[:TIMED])
    for name in sweeps:
        if name != "kept":
            sweeps[name] = [x * len(SETTINGS) / TIMED for x in sweeps[name]]
    for what, seconds in (("run", runs), ("sweep", sweeps)):
        result[what] = {
            "seconds": seconds, "median_seconds": medians(seconds),
            "times_faster": {name: speedup(seconds, "kept", name)
                             for name in contenders if name != "kept"},
        }
    return result


def resident(what: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at their highest."""
    status = Path("/proc/self/status").read_text("utf-8")
    return 1024 * int(next(line for line in status.splitlines() if what in line).split()[1])


def peak(name: str, work: Work) -> int:
    """Peak bytes of loading and one run of a contender, beyond the memory before."""
    jax.block_until_ready(jnp.zeros(()))  # so that no backend starts on the contender's account
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the imports' own peak
    contender = CONTENDERS[name](work)
    contender.run(contender.prepare(), SETTINGS[0], work.size.steps)
    return resident("VmHWM") - before


def peaks(size: str, folder: Path) -> dict[str, int]:
    """The memory of every contender, each in a separate process."""
    found = {}
    for name in CONTENDERS:
        out = subprocess.run(
            [sys.executable, __file__, "--size", size, "--peak", name, "--folder", str(folder)],
            capture_output=True, text=True)
        if out.returncode:
            sys.exit(f"error: no memory of {name}: {out.stderr}")
        found[name] = int(out.stdout.split()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--rounds", type=int, default=3, help="timed turns of each contender")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--peak", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    disable_progress_bar()
    size = SIZES[args.size]
    if args.peak:
        print(peak(args.peak, make_work(size, args.folder)))
        return
    with TemporaryDirectory() as folder:
        work = make_work(size, Path(folder))
        shape = size.shape
        result = {"benchmark": "lens", "machine": machine(), "size": args.size,
                  "blocks": shape.num_layers, "width": shape.d_model, "vocab": shape.vocab_size,
                  "trained_blocks": BLOCKS, "prompts": size.prompts, "length": size.length,
                  "steps": size.steps, "batch": BATCH, "languages": len(LANGUAGES),
                  "rounds": args.rounds, "settings": SETTINGS, "settings_timed_of_others": TIMED,
                  "targets": {"run": RUN, "sweep": SWEEP, "memory": SHARE},
                  **measure(work, args.rounds)}
    # A larger model: a small one needs less memory than the compiler.
    of_memory = "memory" if args.size == "full" else args.size
    with TemporaryDirectory() as folder:
        make_work(SIZES[of_memory], Path(folder))
        result |= {"memory_width": SIZES[of_memory].shape.d_model,
                   "peak_bytes": peaks(of_memory, Path(folder))}
    print("\n".join(section(result)))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
