"""Wall time of a comparison of real bridges by phase, with the encoder's states kept and without.

    python benchmarks/phases.py --encoder DIR --decoder DIR --data DIR \\
        --out benchmarks/results/phases.json

`configs/real_topics.py:compare` in small: some English rows in three epochs, and some test rows of
four languages; two of its variants. DIRs: local copies of the checkpoints and of the SIB-200
repository. Both settings run once before they are timed: seconds are those of a second start, with
compiled programs in the cache.
"""

import argparse
import json
import tempfile
from pathlib import Path

from config_file import get_config
from timing import machine, report, show

from jaxfusion.bridge.compare import REPORT, compare
from jaxfusion.config import from_config_dict

VARIANTS = ("last", "global_softmax")
KEPT = {"states kept": 6.0, "computed at every use": 0.0}  # encoder.keep_states, in GiB


def time_phases(args: argparse.Namespace, keep: float) -> dict[str, dict[str, float]]:
    """Seconds of a comparison by variant and phase."""
    config = get_config("real_topics", "compare")
    base = config.base
    base.encoder.checkpoint, base.decoder.checkpoint = args.encoder, args.decoder
    base.data.path, base.data.train_rows, base.data.dev_rows = args.data, args.train_rows, 16
    base.encoder.keep_states, config.rows = keep, args.rows
    base.eval.languages = ("eng_Latn", "sin_Sinh", "swh_Latn", "spa_Latn")
    config.groups, config.development = {}, ()
    config.variants = tuple(x for x in config.variants if x["name"] in VARIANTS)
    with tempfile.TemporaryDirectory() as workdir:
        compare(from_config_dict(config), Path(workdir))
        return json.loads((Path(workdir) / REPORT).read_text("utf-8"))["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("encoder", "decoder", "data"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--train_rows", type=int, default=64)
    parser.add_argument("--rows", type=int, default=12, help="test rows of each language")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    for _ in range(2):  # the first round compiles
        seconds = {name: time_phases(args, keep) for name, keep in KEPT.items()}
    rows = [[f"{variant}, {phase}", *(f"{by[variant][phase]:.0f} s" for by in seconds.values())]
            for variant, phases in seconds["states kept"].items() for phase in phases]
    show("wall time by phase", ["", *seconds], rows)
    report({"train_rows": args.train_rows, "rows": args.rows, "seconds": seconds,
            "machine": machine()}, args.out)


if __name__ == "__main__":
    main()
