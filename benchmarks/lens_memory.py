"""Writes the table of docs/lens.md: `python benchmarks/lens_memory.py [--table]`.

Memory of a Lens run of each LLM on one chip: `libtpu` compiles its programs for a TPU v6e (no TPU
needed, a minute each on two cores) from shapes alone, with the lengths and batches of its config.
Writes benchmarks/results/lens_memory.json; with --table, only the table.
"""

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import libtpu
from config_file import get_config
from flax import traverse_util
from table import table

from jaxfusion.bridge.compile_only import STEPS, peak_bytes
from jaxfusion.config import from_config_dict
from jaxfusion.costs.chips import GIB, topology_devices
from jaxfusion.fields import LensRunConfig
from jaxfusion.hf.known_shapes import backbone_shape
from jaxfusion.lens.activations import Activations, reader, slice_blocks, top
from jaxfusion.lens.objective import Manipulation
from jaxfusion.nn.bridge import Batch, Bridge
from jaxfusion.nn.decoder import Decoder
from jaxfusion.sharding.mesh import make_mesh, sharding
from jaxfusion.training.build import describe, kernel_for
from jaxfusion.training.optimizer import group_of_each, make_optimizer
from jaxfusion.training.state import State
from jaxfusion.training.step import make_train_step

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "lens_memory.json"
LLMS = ("llama3", "llama31", "qwen25", "phi35")
CHIP = "v6e-1"


def needs(config: LensRunConfig) -> dict[str, float]:
    """Bytes of the LLM, and the peaks of reading prompts and tasks with it, and of a step without
    it."""
    mesh = make_mesh(1, 1, 1, topology_devices(CHIP))
    shape = backbone_shape("decoder", config.decoder.checkpoint)
    decoder = Decoder(shape, jnp.dtype(config.decoder.dtype), config.decoder.remat,
                      kernel_for("decoder", config.decoder.attention, "tpu"))
    blocks = config.lens.blocks
    first, tokens = shape.num_layers - blocks, jnp.zeros((1, 2), jnp.int32)
    whole = sharding(mesh)

    def made(*size: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(size, dtype, sharding=whole)

    with jax.set_mesh(mesh):
        flat = describe(lambda: decoder.init(
            jax.random.key(0), tokens, tokens, tokens, method="score")["params"], mesh)
        params = traverse_util.unflatten_dict(flat, sep="/")
        weights = sum(x.size * x.dtype.itemsize for x in flat.values())
        rows = config.eval.batch_size

        def reading(length: int) -> int:
            batch = Batch(**{name: made(rows, length) for name in Batch.__dataclass_fields__
                             if name != "enc_states"})
            memory = reader(Bridge(None, decoder, None, "last"), first).lower(
                {"decoder": params}, batch, made(rows)).compile().memory_analysis()
            # The head is not an argument of this program, but is in memory.
            return weights + peak_bytes(memory) - memory.argument_size_in_bytes

        prompts, tasks = config.data.max_tokens, config.eval.max_decoder_tokens
        return {"checkpoint": config.decoder.checkpoint, "rows": rows,
                "languages": 1 + len(config.data.targets), "lengths": [prompts, tasks],
                "weights": weights, "prompts": reading(prompts), "tasks": reading(tasks),
                "step": peak_bytes(_step(config, decoder, params, made).memory_analysis())}


def _step(config: LensRunConfig, decoder: Decoder, params, made):
    """A compiled step on cached prompts of full length."""
    c, blocks, width = config, config.lens.blocks, decoder.config.d_model
    upper = jax.eval_shape(
        lambda x: slice_blocks(x, decoder.config.num_layers - blocks, None), params)
    part = {f"decoder/{path}": made(*x.shape, dtype=x.dtype)
            for path, x in traverse_util.flatten_dict(upper, sep="/").items()
            if path.split("/")[0] not in ("embed", "head")}
    groups = group_of_each(part, c.optimizer.groups)
    optimizer = make_optimizer(c.optimizer, groups, STEPS)
    trainable = {path: made(*part[path].shape, dtype=jnp.float32) for path in groups}
    moments = jax.tree.map(lambda x: made(*x.shape, dtype=x.dtype),
                           jax.eval_shape(optimizer.init, trainable))
    rows, length, targets = c.train.batch_size, c.data.max_tokens, len(c.data.targets)
    languages = 1 + targets
    wide = {"dtype": jnp.float32}
    kept = Activations(
        hidden=made(rows, languages, length, width, dtype=decoder.dtype),
        positions=made(rows, languages, length), segments=made(rows, languages, length),
        last=made(rows, languages), before=made(rows, languages, blocks, width, **wide),
        mean=made(rows, blocks, width, **wide),
        **{name: made(rows, languages, 1) for name in ("slots", "tokens", "answered")})
    goal = {"direction": made(width, **wide), "specific": made(width, targets, **wide),
            "moves": made(targets, targets, **wide)}
    aims = {f"lens/goals/{blocks - 1}/{name}": x for name, x in goal.items()}
    aims |= {f"lens/{name}": made(**wide) for name in ("align", "separate", "retain")}
    frozen = {path: x for path, x in part.items() if path not in groups} | aims
    loss = Manipulation(top(decoder, blocks), (blocks - 1,)).loss
    key = jax.eval_shape(jax.random.key, 0)
    return make_train_step(loss, optimizer, {}, None, c.train.accumulate).lower(
        State(made(), trainable, moments), frozen, kept, made(*key.shape, dtype=key.dtype)
    ).compile()


def main() -> None:
    jax.config.update("jax_platforms", "cpu")  # nothing runs
    if "--table" not in sys.argv:
        rows = []
        for llm in LLMS:
            config = from_config_dict(get_config("lens_paper", f"{llm},multilingual"))
            rows.append({"llm": llm, **needs(config)})
            print(rows[-1], flush=True)
        machine = (f"{len(os.sched_getaffinity(0))} CPU cores, Python {platform.python_version()}, "
                   f"jax {jax.__version__}, libtpu {libtpu.__version__}")
        RESULTS.write_text(json.dumps({"machine": machine, "chip": CHIP, "rows": rows}, indent=1)
                           + "\n")
    result = json.loads(RESULTS.read_text("utf-8"))
    first = result["rows"][0]
    columns = {"weights": "weights", "prompts": f"reading {first['lengths'][0]} tokens",
               "tasks": f"reading {first['lengths'][1]}", "step": "a step of the top blocks"}
    lines = table(["config", *columns.values()], [
        [f"`lens_paper:{row['llm']},multilingual`",
         *(f"{row[what] / GIB:.1f} GiB" for what in columns)]
        for row in result["rows"]])
    made = (f"Compiled for a {result['chip']} on {result['machine']}; {first['rows']} rows are "
            f"read at a time, steps take {first['languages']} languages.")
    page = ROOT / "docs" / "lens.md"
    before, rest = page.read_text("utf-8").split("<!-- memory -->")
    _, after = rest.split("<!-- /memory -->")
    page.write_text("\n".join([f"{before}<!-- memory -->", *lines, "", made,
                               f"<!-- /memory -->{after}"]), "utf-8")


if __name__ == "__main__":
    main()
