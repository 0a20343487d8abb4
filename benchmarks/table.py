"""Writes docs/benchmarks.md from the benchmarks' JSON: `python benchmarks/table.py`.

    python benchmarks/fusion.py --out benchmarks/results/fusion.json
    python benchmarks/train_step.py --size pocket --out benchmarks/results/train_step_pocket.json
    python benchmarks/train_step.py --size small --out benchmarks/results/train_step_small.json
    python benchmarks/load.py --out benchmarks/results/load.json
    python benchmarks/growth.py --out benchmarks/results/growth.json
    python benchmarks/shared_prompt.py LLM SIB200 --out benchmarks/results/shared_prompt.json
    python benchmarks/continuous.py --out benchmarks/results/continuous.json
    bash benchmarks/gpu.sh                                     # on a machine with a GPU
    python benchmarks/lens.py --size full --rounds 2 --json benchmarks/results/lens.json
"""

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from jaxfusion.reports.colours import BLUE, ORANGE
from jaxfusion.reports.pictures import themes

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "pictures" / "growth.png"

HEAD = """\
# Benchmarks

Made by `benchmarks/table.py` from `benchmarks/results/`. Contenders take turns in one process;
figures are medians, without compilation. Weights are random and the same for all, in float32.
"""
SIZES = {
    "pocket": "mT5 of 6 blocks and width 128, Llama of 4 blocks and width 128, vocabularies 32,000",
    "small": "mT5-small and a Llama of 100 million parameters, vocabularies 250,112 and 32,000",
}


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def machine(result: dict[str, Any]) -> str:
    m = result["machine"]
    return (
        f"Machine: {m['cores']} cores of {m['cpu']}, no accelerator; Python {m['python']}, "
        f"jax {m['jax']}, torch {m['torch']}."
    )


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def fusion(result: dict[str, Any]) -> list[str]:
    """The collapsed Transformer Softmax against PyTorch's layer."""
    rows = []
    for what, label in (("forward", "forward"), ("gradient", "forward and backward")):
        seconds, faster = result[what]["median_seconds"], result[what]["times_faster"]
        low, high = min(faster["of_pairs"]), max(faster["of_pairs"])
        rows.append([
            label, f"{1e3 * seconds['jaxfusion']:.0f} ms", f"{1e3 * seconds['torch']:.0f} ms",
            f"**{faster['of_medians']:.1f}×** ({low:.1f} to {high:.1f})",
        ])
    return [
        "## The collapsed fusion against the layer as written", "",
        f"`benchmarks/fusion.py`: {result['tokens']} tokens in 4 rows, D={result['d_model']}, "
        f"L={result['layers']}.", "",
        *table(["", "jaxfusion", "PyTorch", "times faster (range of pairs)"], rows), "",
        machine(result), "",
    ]


def train_step(result: dict[str, Any]) -> list[str]:
    """A full training step against the papers' pipeline, idea by idea."""
    faster = result["jaxfusion_times_faster_than"]
    rows = [
        [name, f"{1e3 * seconds:.0f} ms", f"{result['examples_per_second'][name]:.1f}",
         f"{faster[name]['of_medians']:.2f}×" if name in faster else ""]
        for name, seconds in result["median_seconds"].items()
    ]
    examples = len(result["encoder_lengths"])
    return [
        f"## A training step, size `{result['size']}`", "",
        f"`benchmarks/train_step.py`: {SIZES[result['size']]}; {examples} examples with lengths "
        "like XNLI's, Transformer Softmax.", "",
        *table(["", "step", "examples/s", "jaxfusion is faster by"], rows), "", machine(result), "",
    ]


def load(result: dict[str, Any]) -> list[str]:
    """Memory while a checkpoint is loaded."""
    rows = [
        [str(run["devices"]), f"{run['arrays_gib']:.2f} GiB",
         f"{run['largest_shard_gib']:.2f} GiB", f"{run['extra_gib']:.2f} GiB",
         f"{run['allowed_gib']:.2f} GiB"]
        for run in result["runs"]
    ]
    return [
        "## Host memory while a checkpoint is loaded", "",
        "`benchmarks/load.py`: a Llama in bfloat16, shards of 1 GB, in a separate process; "
        "anonymous memory beyond the finished arrays, against a limit of 1.2 times the largest "
        "parameter's shard on a device plus 1 GiB.", "",
        *table(["devices", "arrays", "largest shard", "beyond", "limit"], rows), "",
        machine(result), "",
    ]


def growth(result: dict[str, Any]) -> list[str]:
    """Time and memory by each size of the problem."""
    draw_growth(result["growth"], PICTURE)
    rows = []
    for name, found in result["growth"].items():
        sizes = list(found)
        times = ", ".join(f"{found[n]['seconds']:.2g}" for n in sizes)
        memory = ", ".join(f"{found[n]['bytes'] / 2**20:.0f}" for n in sizes
                           if "bytes" in found[n])
        grown = found[sizes[-1]]["seconds"] / found[sizes[0]]["seconds"]
        rows.append([name, ", ".join(sizes), times, memory,
                     f"{grown:.1f} for {int(sizes[-1]) / int(sizes[0]):.0f}"])
    return [
        "## How cost grows", "",
        "`benchmarks/growth.py`: towers of the size `pocket`, Transformer Softmax, float32, "
        f"{result['batch']} rows of the same length; one size varies, the others stay. Training "
        "steps by encoder tokens (of 64 by blocks), likelihoods of a batch by labels, and a "
        "report's intervals and tests by languages. Rows of a data set: "
        "[Scaling](scaling.md#many-rows). Medians of five.", "",
        *table(["", "sizes", "seconds", "memory, MiB", "time grows"], rows), "",
        "![time by size](pictures/growth.png)", "", GROWTH, "", machine(result), "",
    ]


def draw_growth(growth: dict[str, dict[str, Any]], out: Path) -> None:
    """Time by every size on logarithmic axes, beside a line that is proportional to it."""
    for file in themes(out):
        figure = Figure(figsize=(8, 5.4), layout="constrained")
        for axes, (name, found) in zip(figure.subplots(2, 2).flat, growth.items(), strict=True):
            sizes, seconds = [int(x) for x in found], [x["seconds"] for x in found.values()]
            line = [seconds[-1] * x / sizes[-1] for x in sizes]
            axes.loglog(sizes, line, ":", color=ORANGE, label="proportional")
            axes.loglog(sizes, seconds, "o-", color=BLUE, label="measured")
            axes.set(title=name, ylabel="seconds",
                     ylim=(min(*line, *seconds) / 1.5, max(seconds) * 1.5))
            axes.set_xticks(sizes, [f"{x:,}" for x in sizes], fontsize=8)
            axes.yaxis.set_major_formatter(lambda x, _: f"{x:g}")
            axes.minorticks_off()
        axes.legend(frameon=False, loc="lower right")
        figure.savefig(file, dpi=150)


GROWTH = """\
Attention takes the square of the tokens in time and memory: on a CPU it has no kernel, and from 256
tokens on time grows faster than tokens in towers this narrow. On GPUs and TPUs kernels keep its
memory linear. The labels of a row share their prompt, which is read once: few cost little."""


def shared_prompt(result: dict[str, Any]) -> list[str]:
    """An LLM's few-shot prompts: what they begin with read once, or with every row."""
    rows = [[label, f"{result['flops'][name] / 1e9:,.0f}", f"{result['cpu_seconds'][name]:.1f} s"]
            for name, label in (("again", "read with every row"), ("once", "read once"))]
    low, high = min(result["faster"]["of_pairs"]), max(result["faster"]["of_pairs"])
    return [
        "## Prompts that begin alike", "",
        f"`benchmarks/shared_prompt.py`: the real SmolLM2-135M scores 7 labels after "
        f"{result['rows']} prompts of SIB-200, each with the same five examples in front: "
        f"{result['shared']} of at most {result['tokens']} tokens.", "",
        *table(["the examples are", "GFLOPs", "CPU time"], rows), "",
        f"By its FLOPs, `read once` should be {result['predicted']:.1f} times as fast; it is "
        f"**{result['faster']['of_medians']:.1f}×** ({low:.1f} to {high:.1f}). Log-likelihoods "
        f"differ by {result['difference']:.0e} at most, relative to each. CPU time of the "
        f"process, as others used the machine too. {machine(result)}", "",
    ]


def continuous(result: dict[str, Any]) -> list[str]:
    """Answers of different lengths, batch by batch and continuously."""
    r, pairs = result, result["faster"]["of_pairs"]
    rows = [[name, f"{x:.0f} s"] for name, x in r["cpu_seconds"].items()]
    return [
        "## Answers of different lengths", "",
        f"`benchmarks/continuous.py`: an LLM of SmolLM2-135M's shape gives {r['rows']} answers of "
        f"{r['mean_length']:.0f} tokens on average and {r['longest']} at most, {r['batch']} at a "
        f"time. Batches that wait for their longest answer take {r['steps']} steps. With "
        "continuous batching, new prompts take the places of answers that have ended, which takes "
        f"{r['rows'] * r['mean_length'] / r['batch']:.0f} at best.", "",
        *table(["", "CPU time"], rows), "",
        f"Continuous batching is **{r['faster']['of_medians']:.1f}×** as fast ({min(pairs):.1f} "
        f"to {max(pairs):.1f}); {r['equal']} of {r['rows']} answers are equal. "
        f"{machine(result)}", "",
    ]


def lens(result: dict[str, Any]) -> list[str]:
    """Lens' training on cached activations, against full models in every step."""
    r, timed, settings = result, result["settings_timed_of_others"], len(result["settings"])
    rows = []
    for name, peak in r["peak_bytes"].items():
        cells = [f"{r[what]['median_seconds'][name]:.1f} s ({min(r[what]['seconds'][name]):.1f} to "
                 f"{max(r[what]['seconds'][name]):.1f})" for what in ("run", "sweep")]
        rows.append([f"`{name}`", *cells, f"{r['compile_seconds'][name]:.1f} s",
                     f"{peak / (1 << 20):.0f} MiB"])
    return [
        f"## Lens on cached activations, size `{r['size']}`", "",
        f"`benchmarks/lens.py`: a Llama of {r['blocks']} blocks, width {r['width']} and "
        f"{r['vocab']:,} tokens, of which the top {r['trained_blocks']} blocks train; "
        f"{r['prompts']} prompts of at most {r['length']} tokens in {r['languages']} languages, "
        f"{r['steps']} steps of {r['batch']}. A run is one setting, a sweep {settings}: `kept` ran "
        f"all of them, in each of {r['rounds']} rounds; the others ran {timed}, and {settings} are "
        "extrapolated from these. Medians (range), without compilation. Memory is the peak of a "
        f"short run at width {r['memory_width']}, beyond the imports.",
        "", *table(["", "run", f"sweep of {settings}", "compilation", "memory"], rows), "",
        *table(["`kept`", "measured", "target", ""], _lens_targets(r)), "",
        "`kept` loads the model, reads every prompt once and frees the model, then its steps run "
        "only the trained blocks; `unkept` is the same with two of our models, which run in full "
        "for every language in every step; `torch` is that with two of transformers' models. "
        "`unkept` and `torch` are loaded before the clock starts. Losses of the first steps differ "
        f"by {r['largest_relative_difference']:.0e} at most. {machine(r)} Load average at the "
        f"start: {r['machine']['load_average']:.1f}.", "",
    ]


def _lens_targets(result: dict[str, Any]) -> list[list[str]]:
    """The targets of `kept`: name, measurement, target, met or not."""
    rows, wanted, peak = [], result["targets"], result["peak_bytes"]
    for what in ("run", "sweep"):
        for name, least in wanted[what].items():
            times = result[what]["times_faster"][name]["of_medians"]
            rows.append([f"{what}, against `{name}`", f"{times:.2f}× faster", f"{least:g}×",
                         "met" if times >= least else "not met"])
    for name in wanted["run"]:
        share = peak["kept"] / peak[name]
        rows.append([f"memory, against `{name}`", f"{share:.0%}", f"under {wanted['memory']:.0%}",
                     "met" if share < wanted["memory"] else "not met"])
    return rows


def gpu(results: list[dict[str, Any]]) -> list[str]:
    """Full-size steps on one GPU, against the papers' pipeline."""
    towers = {"xnli": "mT5-large, Llama-3.2-1B, Transformer Softmax, 128 + 8 tokens",
              "langbridge": "mT5-XL, Llama-2-7B, Global Softmax, 1,024 + 128 tokens"}
    parts = ["## Full-size steps on one GPU", "",
             "`bash benchmarks/gpu.sh`: random weights, bfloat16 towers, a trained part in "
             "float32, every row of maximum length; each contender in a separate process (those of "
             "the first table shared one). "
             "`torch` is the papers' pipeline with transformers; `-full` recomputes the LLM's "
             "blocks in the backward pass. The last column is the rate of model FLOPs relative to "
             "a large matrix product in the same run.", ""]
    for r in results:
        rows = [[f"`{name}`", f"{1e3 * x['seconds']:.0f} ms", f"{x['examples_per_second']:.1f}",
                 f"{x['memory_gib']:.1f} GiB", f"{x['share_of_matmul_rate']:.0%}"]
                for name, x in r["contenders"].items()]
        parts += [f"{towers[r['size']]}, {r['rows']} rows:", "",
                  *table(["", "step", "examples/s", "memory", "of the matrix product's rate"],
                         rows), "",
                  f"Our fastest takes {1 / r['times_faster_than_torch']:.0%} of `torch`'s "
                  f"time: **{r['times_faster_than_torch']:.2f}×**. {r['device']}; Python "
                  f"{r['python']}, jax {r['jax']}, torch {r['torch']}, transformers "
                  f"{r['transformers']}.", ""]
    return parts


NOTES = """\
`torch` is the papers' pipeline (fusion as written, full-vocabulary logits, padding to the longest
row); `plain_jax` is the same compiled by XLA, so their difference is the compiler's;
`collapsed_only` and `targets_only` have one idea each; `unpacked` has both, with one example per
row; `jaxfusion` also packs examples into rows. Packing is `--config.data.pack=True`: the papers'
recipes do not use it and run as `unpacked`, so their gain over `torch` is the ratio of those two
rows.
"""


def main() -> None:
    parts = [
        HEAD, *fusion(read("fusion")), *train_step(read("train_step_pocket")),
        *train_step(read("train_step_small")), NOTES, *load(read("load")),
        *growth(read("growth")), *shared_prompt(read("shared_prompt")),
        *continuous(read("continuous")), *lens(read("lens")),
        *gpu([read(f"gpu_{size}") for size in ("xnli", "langbridge", "langbridge_4")]),
    ]
    (ROOT / "docs" / "benchmarks.md").write_text("\n".join(parts), "utf-8")


if __name__ == "__main__":
    main()
