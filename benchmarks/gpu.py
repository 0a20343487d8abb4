"""Compares full-size training steps with the papers' pipeline in PyTorch on the same GPU.

    bash benchmarks/gpu.sh [SECONDS]  # all sizes, into benchmarks/results/gpu_*.json
    python benchmarks/gpu.py --size langbridge --out FILE
    python benchmarks/gpu.py --table FILE...

Random weights, bfloat16 towers, a trained part in float32, every row of maximum length. Reports
examples and tokens per second, memory, and model FLOPs (without recomputation) relative to the rate
of a large matrix product, measured in the same run. Needs neither data nor checkpoints, and only
the dependencies of the model.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs its share

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch_reference
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, MT5EncoderModel

from jaxfusion.costs.flops import count_flops
from jaxfusion.fields import Config, DecoderSettings, EncoderSettings, FusionConfig
from jaxfusion.hf.known_shapes import BACKBONES, backbone_shape
from jaxfusion.nn.bridge import Batch
from jaxfusion.sharding.mesh import make_mesh
from jaxfusion.training.build import initialise, plain, plan_model
from jaxfusion.training.optimizer import make_optimizer
from jaxfusion.training.state import State
from jaxfusion.training.step import gradient, make_train_step

BOS = 1


@dataclass(frozen=True)
class Size:
    """The towers and the batch size."""

    encoder: str
    decoder: str
    fusion: str
    rows: int
    queries: int  # encoder tokens of each
    answers: int


SIZES = {
    "xnli": Size("google/mt5-large", "meta-llama/Llama-3.2-1B-Instruct", "transformer_softmax",
                 64, 128, 8),
    "langbridge": Size("DKYoon/mt5-xl-lm-adapt", "meta-llama/Llama-2-7b-hf", "global_softmax",
                       16, 1024, 128),
    "tiny": Size("google/mt5-small", "meta-llama/Llama-3.2-1B-Instruct", "global_softmax",
                 4, 32, 8),
}


def make_batch(size: Size) -> Batch:
    """Rows without padding: `[BOS] + prefix + end vector + answer`."""
    rng, rows = np.random.default_rng(0), size.rows
    length = 1 + size.queries + 1 + size.answers
    queries = rng.integers(3, 30_000, (rows, size.queries)).astype(np.int32)
    answers = rng.integers(3, 30_000, (rows, size.answers)).astype(np.int32)
    tokens, source = np.zeros((rows, length), np.int32), np.full((rows, length), -1, np.int32)
    tokens[:, 0], tokens[:, -size.answers :] = BOS, answers
    source[:, 1 : size.queries + 2] = np.arange(size.queries + 1)
    slots = np.arange(length - size.answers - 1, length - 1)
    return Batch(
        enc_tokens=queries, enc_segments=np.ones_like(queries), dec_tokens=tokens,
        dec_source=source, dec_positions=np.broadcast_to(np.arange(length), tokens.shape),
        dec_segments=np.ones_like(tokens), target_slots=np.broadcast_to(slots, answers.shape),
        target_tokens=answers, target_mask=np.ones_like(answers, bool),
    )


class OurStep:
    """jaxfusion's training step."""

    def __init__(self, size: Size, batch: Batch, attention: str, remat: str, dtype: str):
        config = Config(
            encoder=EncoderSettings(size.encoder, dtype=dtype, attention=attention),
            decoder=DecoderSettings(size.decoder, dtype=dtype, attention=attention, remat=remat),
            fusion=FusionConfig(size.fusion, dropout=0.0),
        )
        shapes = {"encoder": backbone_shape("encoder", size.encoder),
                  "decoder": backbone_shape("decoder", size.decoder)}
        mesh = make_mesh(devices=jax.devices()[:1])
        with jax.set_mesh(mesh):
            plan = plan_model(config, shapes, mesh)
            flat = initialise(lambda: plan.bridge.init(
                jax.random.key(0), ("encoder", "fusion", "projector", "decoder")), plan.params)
            flat = in_planned_dtypes(flat, plan.params)
            trainable = {path: flat[path].astype(jnp.float32) for path in plan.groups}
            frozen = {path: x for path, x in flat.items() if path not in plan.groups}
            optimizer = make_optimizer(config.optimizer, plan.groups, 1000)
            self.state = State(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable))
            self.rest = (frozen, jax.device_put(batch), jax.random.key(0))
            step = make_train_step(plan.bridge.loss, optimizer, {})
            clock = time.perf_counter()
            self.program = step.lower(self.state, *self.rest).compile()
            self.compile_seconds = time.perf_counter() - clock
            self.flops = count_flops(lambda *x: gradient(plain(plan.bridge).loss, *x),
                                     trainable, *self.rest)
        memory = self.program.memory_analysis()  # the compiler's account
        self.memory = (memory.argument_size_in_bytes + memory.temp_size_in_bytes
                       + memory.output_size_in_bytes - memory.alias_size_in_bytes)

    def __call__(self) -> None:
        self.state, metrics = self.program(self.state, *self.rest)
        jax.block_until_ready(metrics)


def in_planned_dtypes(flat: dict, planned: dict) -> dict:
    """The parameters with integers and scales where a tower is quantised, of any values."""
    ours = {path: (20 * flat.pop(path)).astype(leaf.dtype) if leaf.dtype.name.startswith("int")
            else flat.pop(path) for path, leaf in planned.items() if path in flat}
    scales = {path: jnp.full(leaf.shape, 0.05, leaf.dtype) for path, leaf in planned.items()
              if path not in ours}
    return ours | scales


class TorchStep:
    """The papers' pipeline, as written by its authors."""

    def __init__(self, size: Size, batch: Batch):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.set_default_device(device)
        encoder = MT5EncoderModel(_torch_config(size.encoder, dropout_rate=0.0))
        llm = AutoModelForCausalLM.from_config(_torch_config(size.decoder))
        layers, width = encoder.config.num_layers, encoder.config.d_model
        fusion = {
            "global_softmax": lambda: torch_reference.GlobalSoftmax(layers),
            "transformer_softmax": lambda: torch_reference.TransformerSoftmax(
                layers, width, dropout=0.0),
        }[size.fusion]()
        self.bridge = torch_reference.TorchBridge(
            encoder.to(torch.bfloat16), llm.to(torch.bfloat16), fusion).train()
        self.rows = (batch.enc_tokens.tolist(), batch.target_tokens.tolist())
        self.trained = [p for p in self.bridge.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, 3e-5, (0.8, 0.999))
        self.device = device

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(self.device, torch.bfloat16):
            loss = self.bridge(*self.rows, BOS)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        loss.item()


def _torch_config(name: str, **more):
    described = {**BACKBONES[name], **more}
    return AutoConfig.for_model(described.pop("model_type"), **described)


def median_seconds(step, repeats: int) -> float:
    """The median seconds of a call, after three warm-up calls."""
    seconds = []
    for i in range(3 + repeats):
        clock = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - clock)
        if i < 3:
            seconds.clear()
    return statistics.median(seconds)


def matmul_rate(width: int) -> float:
    """FLOPs per second of a large bfloat16 matrix product."""
    x = jax.random.normal(jax.random.key(0), (width, width), jnp.bfloat16)
    product = jax.jit(lambda x: x @ x)
    return 2 * width**3 / median_seconds(lambda: jax.block_until_ready(product(x)), 20)


def measure(name: str, size: Size, repeats: int) -> dict:
    """Measures one contender's step, alone on the device; reports if it does not fit."""
    batch = make_batch(size)
    try:
        if name == "torch":
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            step = TorchStep(size, batch)
        else:
            given = name.split("-")
            attention, remat, dtype = given + ["cudnn", "none", "bfloat16"][len(given):]
            step = OurStep(size, batch, attention, remat, dtype)
        seconds = median_seconds(step, repeats)
    except (jax.errors.JaxRuntimeError, torch.cuda.OutOfMemoryError) as error:
        if "out of memory" not in str(error).lower():
            raise
        return {"out_of_memory": True}
    memory = getattr(step, "memory", None)
    if name == "torch" and torch.cuda.is_available():
        memory = torch.cuda.max_memory_allocated()
    tokens = int((batch.enc_segments != 0).sum() + (batch.dec_segments != 0).sum())
    return {
        "seconds": seconds, "examples_per_second": size.rows / seconds,
        "tokens_per_second": tokens / seconds, "memory_gib": memory and memory / 2**30,
        "compile_seconds": getattr(step, "compile_seconds", None),
        "model_flops": getattr(step, "flops", None),
    }


def compare(args: argparse.Namespace, size: Size) -> dict:
    """Runs each contender in a separate process, since a framework does not return memory; what is
    measured is in the file at once."""
    contenders, rate = {}, matmul_rate(args.width)
    for name in args.contenders:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "one.json"
            subprocess.run([sys.executable, __file__, "--size", args.size, "--rows",
                            str(size.rows), "--repeats", str(args.repeats), "--only", name,
                            "--out", str(out)], check=True)
            contenders[name] = json.loads(out.read_text("utf-8"))
        write(args.out, summary(size, args.size, rate, contenders))
    return summary(size, args.size, rate, contenders)


def summary(size: Size, name: str, rate: float, contenders: dict) -> dict:
    """What was measured so far, with each contender's share of the rate of matrix products."""
    contenders = {key: dict(x) for key, x in contenders.items()}
    flops = next((x["model_flops"] for x in contenders.values() if x.get("model_flops")), None)
    for found in contenders.values():
        found.pop("model_flops", None)
        if flops and "seconds" in found:
            found["share_of_matmul_rate"] = flops / found["seconds"] / rate
    ours = [x["seconds"] for name, x in contenders.items() if name != "torch" and "seconds" in x]
    theirs = contenders.get("torch", {}).get("seconds")
    return {
        "size": name, "rows": size.rows, "device": jax.devices()[0].device_kind,
        "python": platform.python_version(), "jax": jax.__version__, "torch": torch.__version__,
        "transformers": transformers.__version__, "matmul_flops_per_second": rate,
        "model_flops": flops, "contenders": contenders,
        "times_faster_than_torch": theirs / min(ours) if ours and theirs else None,
    }


def write(out: Path | None, result: dict) -> None:
    """Writes a result, whole or not at all."""
    if out is None:
        return
    partial = out.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    partial.replace(out)


def table(files: list[Path]) -> str:
    """One line for each contender of every file."""
    lines = ["| size | rows | | examples/s | GiB | share of the matmul rate | compiled in, s |",
             "|---|---|---|---|---|---|---|"]
    for file in files:
        result = json.loads(file.read_text("utf-8"))
        for name, x in result["contenders"].items():
            cells = ["out of memory", "", "", ""] if x.get("out_of_memory") else [
                f"{x['examples_per_second']:.1f}", f"{x['memory_gib'] or 0:.1f}",
                f"{100 * x.get('share_of_matmul_rate', 0):.0f}%",
                "" if x["compile_seconds"] is None else f"{x['compile_seconds']:.0f}"]
            lines.append("| " + " | ".join(
                [result["size"], str(result["rows"]), name, *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES), default="xnli")
    parser.add_argument("--rows", type=int, help="of the batch")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--width", type=int, default=8192, help="of the matrix product")
    parser.add_argument("--contenders", nargs="+", metavar="KERNEL[-REMAT[-DTYPE]]",
                        default=["cudnn", "plain", "cudnn-full", "torch"])
    parser.add_argument("--only", metavar="CONTENDER", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, nargs="+", metavar="FILE")
    args = parser.parse_args()
    if args.table:
        print(table(args.table))
        return
    size = replace(SIZES[args.size], rows=args.rows or SIZES[args.size].rows)
    result = measure(args.only, size, args.repeats) if args.only else compare(args, size)
    print(json.dumps(result, indent=2))
    write(args.out, result)


if __name__ == "__main__":
    main()
