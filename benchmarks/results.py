r"""Writes docs/results.md and the README's tables from the results of runs.

    python train.py --config configs/real_topics.py:compare --workdir runs/real_topics \
        --config.seeds=0,1,2
    python benchmarks/real.py runs/real_topics --out benchmarks/results/real_topics.json
    python benchmarks/phases.py --encoder DIR --decoder DIR --data DIR \
        --out benchmarks/results/phases.json
    python train.py --config configs/quickstart.py
    python benchmarks/claims.py runs/claims --out benchmarks/results/claims.json
    python benchmarks/fusion_cost.py --out benchmarks/results/fusion_cost.json
    python benchmarks/cold_start.py runs/cold --out benchmarks/results/cold_start.json
    python train.py --config configs/lens_quickstart.py                      # and :ceiling
    python benchmarks/lens_seeds.py runs/lens_seeds --out benchmarks/results/lens_seeds.json
    python benchmarks/results.py --real_topics runs/real_topics --quickstart runs/quickstart \
        --lens runs/lens_quickstart --lens_ceiling runs/lens_quickstart_ceiling

Reports given on the command line are first copied to benchmarks/results/, pictures to
docs/pictures/.
"""

import argparse
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from timing import machine

from configs.real_topics import SEEN
from jaxfusion.reports.pictures import dark

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PICTURES = ROOT / "docs" / "pictures"
SHOWN = {"eng_Latn": "English", "sin_Sinh": "Sinhala", "tam_Taml": "Tamil", "swh_Latn": "Swahili",
         "ben_Beng": "Bengali"}
GROUPS = ("English", "reported", "rich", "mid", "poor")


def keep(name: str, run: Path) -> None:
    """Copies a comparison's report, with this machine's description, and its pictures."""
    report = json.loads((run / "report.json").read_text("utf-8"))
    report = {"table": (run / "report.md").read_text("utf-8"), **report, "machine": machine()}
    file = "lens_report" if name == "lens" else name  # lens.json is the benchmark's
    (RESULTS / f"{file}.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    pictures = {"quickstart": ("accuracy", "layers"), "lens": ("accuracy", "languages")}
    if name in pictures:
        PICTURES.mkdir(exist_ok=True)
        for picture in pictures[name]:
            copy_picture(run / f"{picture}.png", f"{name}_{picture}")


def copy_picture(file: Path, name: str) -> None:
    """Copies a picture and its dark variant."""
    for source, ending in ((file, ""), (dark(file), "_dark")):
        shutil.copyfile(source, PICTURES / f"{name}{ending}.png")


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
    """A mean with its interval and the deviation across seeds."""
    low, high = x["ci95"]
    spread = "" if x["deviation"] is None else f" ± {100 * x['deviation']:.1f}"
    return f"{100 * x['mean']:{sign}.1f} [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]{spread}"


def in_short(report: dict[str, Any]) -> list[str]:
    """The quickstart's accuracy in English and by group of languages."""
    models = list(report["languages"])
    rows = [["English", *(f"{100 * report['languages'][x]['en']['accuracy']:.1f}" for x in models)]]
    rows += [[f"{group} languages",
              *(f"{100 * report['groups'][x][group]['accuracy']:.1f}" for x in models)]
             for group in ("rich", "mid", "poor")]
    return table(["", *models], rows)


def topics_in_short(report: dict[str, Any]) -> list[str]:
    """Accuracy on real topics in English, some languages, and by group."""
    models, llm = list(report["languages"]), llm_alone(report)

    def row(name: str, bridges: list[float], languages: Iterable[str]) -> list[str]:
        means = [mean(by[x] for x in languages) for by in llm.values()]
        return [name, *(f"{100 * x:.1f}" for x in (*means, *bridges))]

    rows = [row(name, [report["languages"][m][code]["accuracy"] for m in models], [code])
            for code, name in SHOWN.items()]
    every = [language for languages in SEEN.values() for language in languages]
    for group in report["groups"][models[0]]:
        name = f"those with {group} in CC-100" if group in SEEN else "all"
        rows.append(row(f"mean of {name}", [report["groups"][m][group]["accuracy"] for m in models],
                        SEEN.get(group, every)))
    return table(["", *llm, *models], rows)


def llm_alone(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Accuracy of the LLM alone by language, where it was scored in all of them."""
    languages = report["languages"][report["reference"]]
    return {name: {x: mean(map(int, found["correct"][x])) for x in languages}
            for name, found in report.get("alone", {}).items() if name.startswith("LLM")
            and name not in report["languages"] and languages.keys() <= found["correct"].keys()}


def llm_by_language(report: dict[str, Any]) -> list[str]:
    """Accuracy of the LLM alone in every language, and the prompts that it read."""
    llm = llm_alone(report)
    rows = [[language, *(f"{100 * by[language]:.1f}" for by in llm.values())]
            for language in report["languages"][report["reference"]]]
    lines = ["### The LLM alone", "", ALONE, "", *table(["", *llm], rows), ""]
    for name in llm:
        found = report["alone"][name]
        lines += [f"{name}:", "", "```text", found["prompt"], "```", "", on(found), ""]
    return lines if llm else []


def lens_seeds(result: dict[str, Any]) -> list[str]:
    """Accuracy of every method over the seeds, and its difference to the LLM."""
    names = list(result["accuracy"]["LLM"])
    rows = [[model, *(cell(by[name]) for name in names)]
            for model, by in result["accuracy"].items()]
    rows += [[f"{model} minus LLM", *(cell(by[name], "+") for name in names)]
             for model, by in result["minus LLM"].items()]
    return table(["", *names], rows)


def accuracy(result: dict[str, Any]) -> list[str]:
    """Accuracy of every bridge over the seeds, by group of languages."""
    rows = [[name, *(cell(by[g]) for g in GROUPS)] for name, by in result["accuracy"].items()]
    return table(["", *GROUPS], rows)


def claims(result: dict[str, Any]) -> list[str]:
    """The claims and their verdicts."""
    rows = [
        [x["text"], x["model"], x["than"] + (f" − {100 * x['margin']:.0f}" if x["margin"] else ""),
         x["group"], cell(x, "+"), f"{x['p']:.2g}", f"{x['p_holm']:.2g}", f"**{x['verdict']}**"]
        for x in result["claims"]
    ]
    return table(["claim", "", "against", "on", "difference", "p", "p (Holm)", ""], rows)


def confirmed(result: dict[str, Any]) -> list[str]:
    """The claims on noise, tested again on new seeds and rows."""
    seeds, rows = result["confirmed"]["seeds"], result["rows"]
    return [f"On {len(seeds)} further seeds ({seeds[0]} to {seeds[-1]}) and the next {rows} rows "
            "of each language, three lines that were fixed in advance:", "",
            *claims(result["confirmed"])]


def choice(result: dict[str, Any]) -> str:
    """Which single layer was chosen as the best one, and how."""
    means = ", ".join(f"{n}: {100 * x:.1f}" for n, x in result["choice"]["mean"].items())
    return (f"The best single layer is {result['layer']}, by its mean on the development languages "
            f"over {len(result['choice']['seeds'])} other seeds (layer {means}).")


def cost(result: dict[str, Any]) -> list[str]:
    """Parameters, FLOPs and time of a step with noise and without."""
    rows = [[name, f"{x['parameters']:,}", f"{x['flops'] / 1e9:.1f}",
             f"{1e3 * x['median_seconds']:.0f}"] for name, x in result["steps"].items()]
    return table(["", "trained parameters", "GFLOP in matrix products", "median ms"], rows)


def phases(result: dict[str, Any]) -> list[str]:
    """Wall time of a small comparison with kept states and without."""
    by = result["seconds"]
    rows = [[f"{variant}, {phase}", *(f"{found[variant][phase]:.0f} s" for found in by.values())]
            for variant, phases in next(iter(by.values())).items() for phase in phases]
    return table(["", *by], rows)


def seconds(report: dict[str, Any]) -> str:
    """Wall time of every phase of a comparison."""
    phases = [f"{name}: " + ", ".join(f"{phase} {x:.0f} s" for phase, x in by.items())
              for name, by in report["seconds"].items()]
    total = sum(x for by in report["seconds"].values() for x in by.values())
    return f"Wall time: {'; '.join(phases)}; {total:.0f} s in total, including compilation."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--real_topics", type=Path, help="only its pictures")
    parser.add_argument("--quickstart", type=Path)
    parser.add_argument("--lens", type=Path)
    parser.add_argument("--lens_ceiling", type=Path)
    args = parser.parse_args()
    for picture in ("accuracy", "layers") if args.real_topics else ():
        copy_picture(args.real_topics / f"real_{picture}.png", f"real_topics_{picture}")
    for name in ("quickstart", "lens", "lens_ceiling"):
        if getattr(args, name):
            keep(name, getattr(args, name))
    real, short, quick, many, cold, costs, lens, ceiling, of_lens = (read(name) for name in (
        "real_topics", "phases", "quickstart", "claims", "cold_start", "fusion_cost", "lens_report",
        "lens_ceiling", "lens_seeds"))
    parts = [
        HEAD, "## Topics of real sentences in 20 languages", "", TOPICS, "",
        f"Seeds: {', '.join(map(str, real['seeds']))}.", "", real["table"],
        "![accuracy by language](pictures/real_topics_accuracy.png)", "",
        "![layer weights](pictures/real_topics_layers.png)", "", on(real), "",
        *llm_by_language(real),
        "### What kept states save", "", PHASES.format(**short), "", *phases(short), "",
        on(short), "",
        "## The quickstart, one seed", "", quick["table"], seconds(quick), "",
        "![accuracy by language](pictures/quickstart_accuracy.png)", "",
        "![layer weights](pictures/quickstart_layers.png)", "", on(quick), "",
        f"## The claims, over {len(many['seeds'])} seeds", "", CLAIMS, "", *accuracy(many), "",
        choice(many), f"{many['rows']} rows of each language.", "", "### What holds", "", VERDICTS,
        "", *claims(many), "", *confirmed(many), "", on(many), "",
        "### What noise costs", "", COST, "", *cost(costs), "", on(costs), "",
        f"### Without the warm start, {cold['seeds']} seeds", "", COLD, "", *accuracy(cold), "",
        on(cold), "",
        "## Lens on the pocket LLM, one seed", "", LENS, "", lens["table"],
        "![accuracy by language](pictures/lens_accuracy.png)", "",
        "![languages in the specific subspace](pictures/lens_languages.png)", "", on(lens), "",
        f"## The same over {of_lens['seeds']} seeds", "", LENS_SEEDS, "", *lens_seeds(of_lens), "",
        on(of_lens), "", "### What there is to gain in the blocks that train", "", CEILING, "",
        ceiling["table"], on(ceiling), "",
    ]
    (ROOT / "docs" / "results.md").write_text("\n".join(parts), "utf-8")
    readme = ROOT / "README.md"
    text = readme.read_text("utf-8")
    for name, lines in (("quickstart", in_short(quick)), ("real_topics", topics_in_short(real))):
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
        head, rest = text.split(start)
        output = "\n".join([*lines, "", on(quick if name == "quickstart" else real), ""])
        text = head + start + output + end + rest.split(end)[1]
    readme.write_text(text, "utf-8")


HEAD = """\
# Results

Made by `benchmarks/results.py` from `benchmarks/results/`. No test row, and no row of its frame,
was seen in any training; recipes were chosen on development rows and development languages.
"""
TOPICS = """\
`configs/real_topics.py` and `benchmarks/real.py`: SIB-200's seven topics (2309.07445), 701
English training rows, all 204 test rows of each language. Bridges lead from multilingual-e5-small
to SmolLM2-135M-Instruct, both from 4-bit files. Beside them is a logistic regression on the
encoder's mean-pooled last states, trained on the same rows. The recipe was chosen on development
rows of English, Bengali and Swahili, for Global Softmax; means exclude the latter two. Groups are
by how much text CC-100 has of a language.

These bridges learned answers glued to their prompt (`istravel`): its space at the end came to the
recipe later. `--config.base.data.text_prompt=$'\\nThe topic of this text is'` makes them again. In
one run of Global Softmax with the space, development rows of English, Bengali and Swahili had 86.9,
78.8 and 68.7, after 82.8, 78.8 and 61.6 with the same seed.

Layer 11 is level with the regression. Global Softmax is 2 points below it, which its interval does
not tell from level. Transformer Softmax is below it: it put all weight on layers 3 and 4 for every
token (see the picture). A tenth of its learning rate changed nothing on the development rows (79.8,
66.7 and 61.6 after 78.8, 66.7 and 61.6 in English, Bengali and Swahili). The last layer is below it
too, and depends most on the seed: in Spanish and Arabic it prefers one topic (health) with the
first one. Its scores there are the same without kept states."""
ALONE = """\
SmolLM2-135M-Instruct reads the sentence itself, in each language, and the likelihoods of the topics
are compared, as behind a bridge. It knows English, and some Spanish, Chinese and Japanese. In the
other languages most of what it gets right is one topic, `travel`, a fifth of the rows."""
PHASES = """\
`benchmarks/phases.py`: the same comparison in small, {train_rows} English rows in three epochs and
{rows} test rows of four languages, two of its variants, from a second start. With
`encoder.keep_states` each text goes through the encoder once. That saves little here, where the
encoder costs a small part of the LLM: the LLM alone, which reads no states, differs as much."""
CLAIMS = """\
`benchmarks/claims.py`: the claims of 2508.09091, and Gaussian noise on the features in training
(`fusion.noise`), which is ours. Test rows are scored by likelihood over the labels, on languages
and with seeds that were not used for any choice. Mean over seeds and languages in %, its 95%
interval with both seeds and rows resampled (pigeonhole bootstrap: Owen, 2007), and the standard
deviation across seeds. Chance is 33.3.

Noise began as a control. A fusion of our own, which weighted layers by their agreement and trained
with that noise, was chosen on the development languages. On these rows it was not better in the
poor languages than one layer with the same noise, so it was removed, and the lines on noise are a
second look at these rows. An earlier table, whose warm starts drew the same samples for every seed,
showed five lines on noise to hold. With a draw for each seed none of them is left."""
VERDICTS = """\
Differences in points. `p` is the larger of two tests of the paired differences, a t-test over seeds
and a randomisation test over rows. Holm's correction is over all lines; a claim holds if the
corrected value is below 0.05. English is kept if the loss is significantly smaller than the margin
after `LLM alone`; if the interval is below 0, some of it is lost."""
COST = """\
`benchmarks/fusion_cost.py`: the gradient of a step of the quickstart, measured in turns."""
COLD = """\
`benchmarks/cold_start.py`: 300 rows of each language; intervals are over rows, with fixed seeds. In
the quickstart's 80 steps with small learning rates, the bridges depend on the warm start: from a
random projector all of them are still at chance, in English too."""
LENS = """\
`configs/lens_quickstart.py`: an LLM that knows English well, latn_a nearly as well and deva
poorly; 200 parallel prompts; the top two of its four blocks train. Settings were chosen on
development rows."""
LENS_SEEDS = """\
`benchmarks/lens_seeds.py`: 600 test rows of each language, different prompts for every seed. Mean
in %, its 95% interval over rows (bootstrap), and the standard deviation across seeds. **Lens does
not improve the pocket LLM.** It moves the states as intended (see the picture: both languages end
up about one and a half times as far from English), and English stays within its interval, but
scores do not follow: without `separate` hardly anything changes, with it deva tends to lose (the
interval still includes 0). Steering by `Δ`, away from English, costs most."""
CEILING = """\
`configs/lens_quickstart.py:ceiling`: why no method improves it. Supervised tuning on the answers of
4,000 parallel prompts, twenty times what Lens sees without answers, is an upper bound for any
method on its blocks. Even so, the two blocks that train above gain nothing; with the block below
them deva gains. The LLM's weakness in deva is below its top two blocks, in its representation of
the words, and moving states above cannot fix it."""


if __name__ == "__main__":
    main()
