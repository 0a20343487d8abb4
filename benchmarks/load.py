"""Measures host memory while a large checkpoint loads: `python benchmarks/load.py [--out FILE]`.

A synthetic Llama in shards of 1 GB is read by a separate process, on one device and on eight
simulated ones. Counts anonymous memory (RssAnon): mapped pages of the files belong to the page
cache. The limit: memory beyond the finished arrays and the imports stays under 1.2 times the
largest stacked parameter's local shard plus 1 GiB.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

GIB = 1 << 30
SHAPE = {"vocab_size": 32_000, "d_model": 2048, "d_ff": 5632, "num_layers": 24, "num_heads": 16,
         "num_kv_heads": 16, "head_dim": 128}


def anonymous() -> int:
    """Bytes of this process's anonymous memory."""
    status = Path("/proc/self/status").read_text("utf-8")
    return 1024 * int(next(line for line in status.splitlines() if "RssAnon" in line).split()[1])


def write(path: Path) -> None:
    """The synthetic checkpoint, tensor by tensor."""
    import ml_dtypes
    import numpy as np

    from jaxfusion.hf.decoders import decoder_json
    from jaxfusion.hf.save import write_shards
    from jaxfusion.hf.tables import TRANSFORMS, tower_table

    shapes, rows = parameters(), tower_table(config()).rows
    path.mkdir()
    (path / "config.json").write_text(json.dumps(decoder_json(config())), "utf-8")

    def tensors():
        for row in rows:
            shape = shapes[row.ours].shape
            for i in range(shape[0] if row.stacked else 1):
                theirs = TRANSFORMS[row.transform].their_shape(shape[1:] if row.stacked else shape)
                yield row.theirs.format(i=i), np.full(theirs, 0.01, ml_dtypes.bfloat16)

    write_shards(path, tensors(), shard_bytes=GIB)


def config():
    from jaxfusion.nn.decoder import DecoderConfig

    return DecoderConfig(**SHAPE)


def parameters():
    """Shapes, and the sharding on all devices along `fsdp`."""
    import jax
    import jax.numpy as jnp

    from jaxfusion.nn.decoder import Decoder
    from jaxfusion.sharding.mesh import make_mesh
    from jaxfusion.training.build import describe

    tokens = jnp.zeros((1, 2), jnp.int32)
    decoder = Decoder(config(), jnp.bfloat16)
    return describe(
        lambda: decoder.init(jax.random.key(0), tokens, tokens, tokens, method="score")["params"],
        make_mesh(1, jax.device_count(), 1),
    )


def measure(path: Path) -> None:
    """Loads in this process and prints its memory as JSON."""
    import jax

    from jaxfusion.hf.load import load_params
    from jaxfusion.hf.tables import tower_table

    wanted = parameters()
    before, peak, done = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.monotonic()
    params = jax.block_until_ready(load_params(path, tower_table(config()), wanted))
    seconds = time.monotonic() - start
    done.set()
    watcher.join()
    arrays = sum(x.nbytes for x in params.values())
    shard = max(
        x.addressable_shards[0].data.nbytes for x in params.values()
    )
    extra = peak[0] - before - arrays
    print(json.dumps({
        "devices": jax.device_count(), "arrays_gib": arrays / GIB, "largest_shard_gib": shard / GIB,
        "extra_gib": extra / GIB, "allowed_gib": (1.2 * shard + GIB) / GIB,
        "seconds": seconds, "within": extra < 1.2 * shard + GIB,
    }))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="where to write the figures, as JSON")
    args = parser.parse_args()
    if args.measure:
        measure(args.measure)
        return
    from timing import machine

    results = []
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "model")
        for devices in (1, 8):
            flags = f"--xla_force_host_platform_device_count={devices}"
            found = subprocess.run(
                [sys.executable, __file__, "--measure", str(Path(folder) / "model")],
                env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
                capture_output=True, text=True, check=True,
            )
            results.append(json.loads(found.stdout.splitlines()[-1]))
            print(results[-1], flush=True)
    if not all(result["within"] for result in results):
        sys.exit("more memory than allowed")
    if args.out:
        args.out.write_text(json.dumps({"machine": machine(), "runs": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
