"""Tests loading and export for every family of towers, and the exports in fresh environments.

    python benchmarks/exports.py runs/exports

Creates runs/exports/transformers-4 and -5, virtual environments with the last release of each and
without jaxfusion, and loads the exports there, as clients do. Writes the marked parts of
docs/checkpoints.md, benchmarks/results/exports.json and clients.json.
"""

import argparse
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

from helpers import (  # noqa: E402
    NEAR_TIE,
    TEXTS,
    apply,
    decoder_of,
    extend,
    make_run,
    next_logits,
    plain,
    relative,
    write_encoder_family,
)

from jaxfusion.data.batching import TokenRow, find_shapes, in_order  # noqa: E402
from jaxfusion.evaluation.generate import Decoding, make_scorer  # noqa: E402
from jaxfusion.evaluation.options import make_options  # noqa: E402
from jaxfusion.hf.save import write_tower  # noqa: E402
from jaxfusion.miniatures.checkpoints import random_params, write_checkpoints  # noqa: E402
from jaxfusion.runs.export.bridge import export  # noqa: E402
from jaxfusion.training.state import merge  # noqa: E402

RELEASES = {"transformers-4": "transformers<5", "transformers-5": "transformers>=5"}
NAMES = {
    "llama31": "Llama 2, 3, 3.1, 3.2 (Orca-2, MetaMath, Code Llama)", "mistral_v01": "Mistral",
    "qwen25_window": "Qwen2, Qwen2.5", "qwen3": "Qwen3", "phi3": "Phi-3",
    "phi35_longrope": "Phi-3.5 (longrope)", "gemma": "Gemma", "gemma2": "Gemma 2",
    "gemma3": "Gemma 3 (text)",
}
ENCODERS = {"mt5": "mT5", "umt5": "umT5", "bert": "BERT (multilingual-E5-small, LaBSE, MuRIL)",
            "xlm-roberta": "XLM-R (multilingual-E5, bge-m3, Glot500)",
            "modernbert": "ModernBERT (mmBERT)", "m2m_100": "M2M100, NLLB"}
TOLD = {"m2m_100": "sin_Sinh"}  # the language of the texts, for encoders that are told it
FUSIONS = ("last", "layer", "global_softmax", "transformer_softmax")
NEW_TOKENS = 64


def environments(out: Path) -> dict[str, Path]:
    """The Python executable of a fresh environment for each release."""
    found = {}
    for name, wanted in RELEASES.items():
        found[name] = out / name / "bin" / "python"
        if not found[name].is_file():
            subprocess.run([sys.executable, "-m", "venv", str(out / name)], check=True)
            subprocess.run([found[name], "-m", "pip", "install", "-q", wanted, "torch==2.13.0",
                            "sentencepiece", "accelerate", "peft", "lm-eval"], check=True)
    return found


def make_decoder(case: str, tiny: Path, out: Path) -> float:
    """Writes a decoder of a family; returns the difference of our logits to transformers'."""
    shutil.copytree(tiny / "decoder", out)
    rows = json.loads((out / "config.json").read_text("utf-8"))["vocab_size"]
    config = decoder_of(case, rows)
    params = random_params(config, 0)
    write_tower(out, config, params)
    tokens = np.random.default_rng(0).integers(0, rows, (2, 30))
    theirs = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager")
    with torch.no_grad():
        reference = theirs(torch.tensor(tokens)).logits.numpy()
    return relative(apply(config, {"params": params}, tokens, *plain(tokens), method="score"),
                    reference)


def reference(model, file: Path, language: str | None = None) -> None:
    """Our bridge's output for the texts: logits, greedy tokens, and how many are unambiguous."""
    queries = model.tokenizers.encode_queries(TEXTS, language and [language] * len(TEXTS))
    rows = [TokenRow(query, [], [], model.bridge.latents) for query in queries]
    # No token ends an answer.
    score = make_scorer(model.bridge, Decoding(NEW_TOKENS, eos=-1), False)
    (numbers, batch), = in_order(rows, find_shapes(rows, (64,)), model.tokenizers, len(rows))
    none = make_options([[[] for _ in rows]], len(rows))
    params = merge(model.trainable, model.frozen)
    tokens = np.asarray(score(params, batch, none)[0])[np.argsort(numbers)]
    best = np.sort(extend(model, queries, tokens), axis=-1)
    near = best[..., -1] - best[..., -2] < NEAR_TIE
    upto = [int(np.argmax(row)) if row.any() else NEW_TOKENS for row in near]
    file.write_text(json.dumps({
        "texts": TEXTS, "logits": next_logits(model, queries).tolist(), "tokens": tokens.tolist(),
        "upto": upto, "language": language,
    }), "utf-8")


def client_reference(tiny: Path, out: Path) -> Path:
    """Both exports of one bridge, and the file that check_clients.py reads."""
    model = make_run(out / "run", tiny, "transformer_softmax", "ffn")
    export(out / "run", out / "out")
    export(out / "run", out / "merged", merge=True)
    answers = [" yes", " no way", " a b"]
    file = out / "clients.json"
    reference(model, file)
    tokenizers = model.tokenizers
    targets = tokenizers.encode_answers([""] * len(answers), answers)
    file.write_text(json.dumps({
        **json.loads(file.read_text("utf-8")), "answers": answers, "out": str(out / "out"),
        "merged": str(out / "merged"), "queries": tokenizers.encode_queries(TEXTS),
        "targets": [[*ids, tokenizers.eos] for ids in targets],
    }), "utf-8")
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--clients", action="store_true", help="the clients alone")
    args = parser.parse_args()
    out = args.out
    out.mkdir(parents=True, exist_ok=True)
    pythons = environments(out)
    work = out / "work"
    shutil.rmtree(work, ignore_errors=True)
    tiny = work / "tiny"
    write_checkpoints(tiny, "tiny")
    check_clients(tiny, work, pythons)
    if not args.clients:
        check_families(tiny, work, pythons)


def check_clients(tiny: Path, work: Path, pythons: dict[str, Path]) -> None:
    """Writes the outcome of each client in each environment into docs/checkpoints.md."""
    file = client_reference(tiny, work / "clients")
    found = {}
    for release, python in pythons.items():
        check = subprocess.run([python, ROOT / "benchmarks" / "check_clients.py", file],
                               capture_output=True, text=True, check=True)
        found[release] = json.loads(check.stdout.splitlines()[-1])
        for client, outcome in found[release]["clients"].items():
            found[release]["clients"][client] = outcome.replace(str(work / "clients"), "DIR")
    results = ROOT / "benchmarks" / "results" / "clients.json"
    results.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    into_page("clients", client_table(found))
    wrong = [f"{client} in {x['transformers']}" for x in found.values()
             for client, outcome in x["clients"].items() if outcome.startswith("FAILS")]
    if wrong:
        sys.exit(f"clients fail: {', '.join(wrong)}")


def client_table(found: dict[str, Any]) -> str:
    """Markdown: a row for each client, and the error messages."""
    docs = {x.__name__: x.__doc__.splitlines()[0].rstrip(".")
            for x in importlib.import_module("check_clients").CLIENTS}
    releases = [x["transformers"] for x in found.values()]
    rows, lines = [["what is written", *releases], ["---"] * (1 + len(releases))], []
    for client, text in docs.items():
        outcomes = [x["clients"][client] for x in found.values()]
        rows.append([text, *(outcome.split(":")[0] for outcome in outcomes)])
        lines += [f"- {text}: “{told.split(': ', 1)[1]}”"
                  for told in dict.fromkeys(outcomes) if ": " in told]
    table = "".join("| " + " | ".join(row) + " |\n" for row in rows)
    return table + "\nWhat is refused, and the line that says why:\n\n" + "".join(
        f"{line}\n" for line in lines)


def into_page(mark: str, text: str) -> None:
    """Puts text between two marks of docs/checkpoints.md."""
    page = ROOT / "docs" / "checkpoints.md"
    start, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->\n"
    head, rest = page.read_text("utf-8").split(start)
    page.write_text(head + start + text + end + rest.split(end)[1], "utf-8")


def check_families(tiny: Path, work: Path, pythons: dict[str, Path]) -> None:
    """Writes logits and tokens of every family in each environment into docs/checkpoints.md."""
    results: dict[str, Any] = {}
    cases = [("mt5", case, "transformer_softmax") for case in NAMES]
    cases += [("mt5", "llama31", fusion) for fusion in FUSIONS[:-1]]
    cases += [(encoder, "llama31", "global_softmax") for encoder in ENCODERS if encoder != "mt5"]
    for encoder, case, fusion in cases:
        name, where = f"{encoder}, {case}, {fusion}", work / f"{encoder}-{case}-{fusion}"
        where.mkdir()
        load = make_decoder(case, tiny, where / "decoder")
        write_encoder_family(encoder, tiny, where / "encoder")
        model = make_run(where / "run", tiny, fusion, decoder=where / "decoder",
                         encoder=where / "encoder")
        export(where / "run", where / "out", merge=True)
        reference(model, where / "reference.json", TOLD.get(encoder))
        results[name] = {"load": load, "encoder": encoder, "case": case, "fusion": fusion,
                         "releases": {}}
        for release, python in pythons.items():
            check = subprocess.run(
                [python, ROOT / "benchmarks" / "check_export.py", where / "out",
                 where / "reference.json"], capture_output=True, text=True, check=True)
            results[name]["releases"][release] = json.loads(check.stdout.splitlines()[-1])
        print(name, results[name], flush=True)
        jax.clear_caches()
    file = ROOT / "benchmarks" / "results" / "exports.json"
    file.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    into_page("exports", table(results))
    if wrong := failed(results):
        sys.exit(f"not alike: {'; '.join(wrong)}")


def failed(results: dict[str, Any]) -> list[str]:
    """The results that differ, or were compared on too few tokens."""
    return [name for name, x in results.items() if x["load"] > 1e-5 or any(
        y["difference"] > 1e-5 or not y["tokens"] or y["compared"] < 8
        for y in x["releases"].values())]


def table(results: dict[str, Any]) -> str:
    """Markdown: a row for each family and fusion."""
    releases = [x["transformers"] for x in next(iter(results.values()))["releases"].values()]
    header = ["encoder", "LLM", "fusion", "our logits − transformers'",
              *(f"export in {release}: logits, {NEW_TOKENS} tokens" for release in releases)]
    rows = [
        [ENCODERS[x["encoder"]], NAMES[x["case"]], f"`{x['fusion']}`", f"{x['load']:.0e}",
         *(f"{y['difference']:.0e}, "
           + (f"equal (at least {y['compared']})" if y["tokens"] else "NOT equal")
           for y in x["releases"].values())]
        for x in results.values()
    ]
    return "".join("| " + " | ".join(row) + " |\n"
                   for row in (header, ["---"] * len(header), *rows))


if __name__ == "__main__":
    main()
