r"""Makes docs/results.md and the README's first table from runs' figures.

    python train.py --config configs/quickstart.py
    python benchmarks/pocket_seeds.py runs/seeds --out benchmarks/results/pocket_seeds.json
    python benchmarks/realtext.py runs/realtext_data --ntrex … --sib200 …    # and its three runs
    python train.py --config configs/lens_quickstart.py                      # and :ceiling
    python benchmarks/lens_seeds.py runs/lens_seeds --out benchmarks/results/lens_seeds.json
    python benchmarks/results.py --quickstart runs/quickstart --realtext runs/sib200_compare \
        --lens runs/lens_quickstart --lens_ceiling runs/lens_quickstart_ceiling

Reports given on the command line are first kept in benchmarks/results/, pictures in docs/pictures/.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from timing import machine

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PICTURES = ROOT / "docs" / "pictures"
GROUPS = ("English", "reported", "rich", "mid", "poor")


def keep(name: str, run: Path) -> None:
    """Copies a comparison's report, with this machine beside it, and the quickstart's pictures."""
    report = json.loads((run / "report.json").read_text("utf-8"))
    report = {"table": (run / "report.md").read_text("utf-8"), **report, "machine": machine()}
    file = "lens_report" if name == "lens" else name  # lens.json is the benchmark's
    (RESULTS / f"{file}.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    pictures = {"quickstart": ("accuracy", "layers"), "lens": ("accuracy", "languages")}
    if name in pictures:
        PICTURES.mkdir(exist_ok=True)
        for picture in pictures[name]:
            shutil.copyfile(run / f"{picture}.png", PICTURES / f"{name}_{picture}.png")


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def on(result: dict[str, Any]) -> str:
    m = result["machine"]
    return (f"Machine: {m['cores']} cores of {m['cpu']}, no accelerator; Python {m['python']}, "
            f"jax {m['jax']}.")


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def cell(x: dict[str, Any], sign: str = "") -> str:
    """A mean with its interval and the deviation between seeds."""
    low, high = x["ci95"]
    spread = "" if x["deviation"] is None else f" ± {100 * x['deviation']:.1f}"
    return f"{100 * x['mean']:{sign}.1f} [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]{spread}"


def lens_seeds(result: dict[str, Any]) -> list[str]:
    """Accuracy of every method over the seeds, and its change."""
    names = list(result["accuracy"]["LLM"])
    rows = [[model, *(cell(by[name]) for name in names)]
            for model, by in result["accuracy"].items()]
    rows += [[f"{model} minus LLM", *(cell(by[name], "+") for name in names)]
             for model, by in result["minus LLM"].items()]
    return table(["", *names], rows)


def seeds(result: dict[str, Any]) -> list[str]:
    """Accuracy of every variant over the seeds, and its difference to `last`."""
    parts = []
    for start, title in (("warm", "With the warm start"), ("cold", "Without it")):
        rows = [["LLM alone", *(cell(result["LLM alone"][g] | {"deviation": None})
                                for g in GROUPS)]]
        rows += [[name, *(cell(x["accuracy"][g]) for g in GROUPS)]
                 for name, x in result[start].items()]
        rows += [[f"{name} minus last", *(cell(x["minus last"][g], "+") for g in GROUPS)]
                 for name, x in result[start].items() if name != "last"]
        parts += [f"### {title}", "", *table(["", *GROUPS], rows), ""]
    return parts


def seconds(report: dict[str, Any]) -> str:
    """Wall time of every phase of a comparison."""
    phases = [f"{name}: " + ", ".join(f"{phase} {x:.0f} s" for phase, x in by.items())
              for name, by in report["seconds"].items()]
    total = sum(x for by in report["seconds"].values() for x in by.values())
    return f"Wall time: {'; '.join(phases)}; together {total:.0f} s, compilation counted."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quickstart", type=Path)
    parser.add_argument("--realtext", type=Path)
    parser.add_argument("--lens", type=Path)
    parser.add_argument("--lens_ceiling", type=Path)
    args = parser.parse_args()
    for name in ("quickstart", "realtext", "lens", "lens_ceiling"):
        if getattr(args, name):
            keep(name, getattr(args, name))
    quick, many, real, lens, ceiling, of_lens = (read(name) for name in (
        "quickstart", "pocket_seeds", "realtext", "lens_report", "lens_ceiling", "lens_seeds"))
    parts = [
        HEAD, "## The quickstart, one seed", "", quick["table"], seconds(quick), "",
        "![accuracy by language](pictures/quickstart_accuracy.png)", "",
        "![layer weights](pictures/quickstart_layers.png)", "", on(quick), "",
        f"## The same over {many['seeds']} seeds", "", SEEDS, "", *seeds(many), on(many), "",
        "## Real text: SIB-200", "", REALTEXT, "", real["table"], seconds(real), "", on(real), "",
        "## Lens on the pocket LLM, one seed", "", LENS, "", lens["table"],
        "![accuracy by language](pictures/lens_accuracy.png)", "",
        "![languages in the specific subspace](pictures/lens_languages.png)", "", on(lens), "",
        f"## The same over {of_lens['seeds']} seeds", "", LENS_SEEDS, "", *lens_seeds(of_lens), "",
        on(of_lens), "", "### What there is to gain in the blocks that train", "", CEILING, "",
        ceiling["table"], on(ceiling), "",
    ]
    (ROOT / "docs" / "results.md").write_text("\n".join(parts), "utf-8")
    readme = ROOT / "README.md"
    start, end = "<!-- quickstart -->\n", "<!-- /quickstart -->\n"
    head, rest = readme.read_text("utf-8").split(start)
    output = "\n".join([quick["table"], seconds(quick), on(quick), ""])
    readme.write_text(head + start + output + end + rest.split(end)[1], "utf-8")


HEAD = """\
# Results

Made by `benchmarks/results.py` from `benchmarks/results/`. No test row, and no row of its frame,
was seen in any training; recipes were chosen on development rows and development languages.
"""
SEEDS = """\
`benchmarks/pocket_seeds.py`: 300 test rows of each language, scored by likelihood over the
labels, languages on which nothing was chosen. Mean over seeds and languages in %, its 95% interval
over rows (bootstrap), and the standard deviation between seeds. Chance is 33.3. In the quickstart's
80 steps at small rates it is the warm start that carries the bridges: from a random projector all
of them are still at chance, in English too."""
LENS = """\
`configs/lens_quickstart.py`: an LLM that knows English well, latn_a nearly as well and deva
poorly; 200 parallel prompts, the top two of its four blocks train. Settings were chosen on
development rows."""
LENS_SEEDS = """\
`benchmarks/lens_seeds.py`: 600 test rows of each language, other prompts for every seed. Mean in
%, its 95% interval over rows (bootstrap), and the standard deviation between seeds. **Lens does
not lift the pocket LLM.** It moves the states as it is meant to (see the picture: both languages
end up about one and a half times as far from English), and English stays within its interval, but
no score follows: without `separate` hardly anything changes, with it deva rather loses (the
interval still holds 0). Steering by `Δ`, away from English, costs most."""
CEILING = """\
`configs/lens_quickstart.py:ceiling`: why nothing lifts it. Supervised tuning on the answers of
4,000 parallel prompts, twenty times what Lens sees without answers, is as good as any method on
its blocks could become. The two blocks that train above gain nothing even so; with the block
below them deva gains. What the LLM lacks in deva lies below its top two blocks, in what it makes
of the words, and cannot be mended by moving states above."""
REALTEXT = """\
Two thousand sentences of NTREX-128 with translations into eight languages, and the 701 unlabelled
training sentences of SIB-200 in twenty, are all the text that these towers have seen
(`configs/realtext_encoder.py`, `configs/realtext_decoder.py`); the LLM has also seen the English
training rows with their topics. What lies within the interval of the most frequent label has
learned nothing. Timed beside other work on the same machine. Models and texts are not in the
repository. This is a test of the path on real text, not of the method at a useful size."""


if __name__ == "__main__":
    main()
