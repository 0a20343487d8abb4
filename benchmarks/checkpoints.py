"""Measures the cost of digests at 1 GB of trained state: `python benchmarks/checkpoints.py`.

Saves and restores a state (parameters and AdamW's two moments) with and without digests, in turns,
in this process, on the CPU. Device digests take less on an accelerator, where they run at memory
speed. Writes benchmarks/results/checkpoints.json and the sentence in docs/scaling.md.
"""

import json
import tempfile
import time
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from timing import machine

from jaxfusion.training import checkpoint
from jaxfusion.training.checkpoint import Checkpoints, abstract_like
from jaxfusion.training.digest import digests
from jaxfusion.training.state import State

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "checkpoints.json"
ARRAYS, BYTES, ROUNDS = 16, 10**9, 2  # bytes of all


def state_of(step: int) -> State:
    rng = np.random.default_rng(0)
    size = BYTES // 3 // ARRAYS // 4 // 1000
    trees = [{f"a{i}": jnp.asarray(rng.standard_normal((size, 1000), np.float32))
              for i in range(ARRAYS)} for _ in range(3)]
    return State(jnp.array(step), trees[0], tuple(trees[1:]))


def once(state: State) -> dict[str, float]:
    """Seconds of a save, of its blocking part, and of a restore."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoints, clock = Checkpoints(Path(folder)), time.monotonic()
        checkpoints.save(state, {"next_index": int(state.step)}, None)
        waited = time.monotonic() - clock
        checkpoints.close()
        saved, clock = time.monotonic() - clock, time.monotonic()
        jax.block_until_ready(Checkpoints(Path(folder)).restore_newest(abstract_like(state))[0])
        return {"waited": waited, "save": saved, "restore": time.monotonic() - clock}


def main() -> None:
    state = state_of(3)
    found = {"with": [], "without": [], "digest": []}
    for _ in range(ROUNDS):
        clock = time.monotonic()
        digests(state)
        found["digest"].append(time.monotonic() - clock)
        found["with"].append(once(state))
        with mock.patch.object(checkpoint, "digests", lambda _: {}):
            found["without"].append(once(state))
    RESULTS.write_text(json.dumps({"machine": machine(), "bytes": BYTES, **found}, indent=1)
                       + "\n")
    middle = {kind: {name: float(np.median([x[name] for x in found[kind]]))
                     for name in ("waited", "save", "restore")} for kind in ("with", "without")}
    digest = float(np.median(found["digest"]))
    text = (
        f"At 1 GB of trained state, AdamW's moments counted, the digests take {digest:.1f} s: "
        f"a save takes {middle['with']['save']:.1f} s with "
        f"them and {middle['without']['save']:.1f} s without, of which the run waits for "
        f"{middle['with']['waited']:.1f} and {middle['without']['waited']:.1f} s; a restore "
        f"{middle['with']['restore']:.1f} and {middle['without']['restore']:.1f} s. On "
        f"{machine()['cores']} CPU cores, which others share; by `benchmarks/checkpoints.py`.")
    page = ROOT / "docs" / "scaling.md"
    before, rest = page.read_text("utf-8").split("<!-- digests -->")
    _, after = rest.split("<!-- /digests -->")
    page.write_text(f"{before}<!-- digests -->\n{text}\n<!-- /digests -->{after}", "utf-8")
    print(text)


if __name__ == "__main__":
    main()
