"""Wall time of a comparison of real bridges by phase, with the encoder's states kept and without.

    python benchmarks/phases.py --encoder DIR --decoder DIR --data DIR \\
        --out benchmarks/results/phases.json

`configs/real_topics.py:compare` in small: a quarter of its English rows in three epochs, and a
quarter of the test rows of four languages; two of its variants. DIRs: local copies of the
checkpoints and of the SIB-200 repository. Seconds include loading and compilation.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("encoder", "decoder", "data"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--train_rows", type=int, default=176)
    parser.add_argument("--rows", type=int, default=51, help="test rows of each language")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    seconds = {}
    for name, keep in KEPT.items():
        config = get_config("real_topics", "compare")
        config.base.encoder.checkpoint, config.base.decoder.checkpoint = args.encoder, args.decoder
        config.base.data.path, config.base.data.train_rows = args.data, args.train_rows
        config.base.encoder.keep_states, config.rows = keep, args.rows
        config.base.eval.languages = ("eng_Latn", "sin_Sinh", "swh_Latn", "spa_Latn")
        config.groups, config.development = {}, ()
        config.variants = tuple(x for x in config.variants if x["name"] in VARIANTS)
        with tempfile.TemporaryDirectory() as workdir:
            compare(from_config_dict(config), Path(workdir))
            seconds[name] = json.loads((Path(workdir) / REPORT).read_text("utf-8"))["seconds"]
    rows = [[f"{variant}, {phase}", *(f"{by[variant][phase]:.0f} s" for by in seconds.values())]
            for variant, phases in seconds["states kept"].items() for phase in phases]
    show("wall time by phase", ["", *seconds], rows)
    report({"train_rows": args.train_rows, "rows": args.rows, "languages": 4, "seconds": seconds,
            "machine": machine()}, args.out)


if __name__ == "__main__":
    main()
