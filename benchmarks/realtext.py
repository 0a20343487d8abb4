"""Writes real text for pretraining in jaxfusion's layout: `python benchmarks/realtext.py OUT …`.

Writes OUT/text-LANGUAGE.txt (both sides of NTREX-128, and the unlabelled training sentences of
SIB-200), OUT/pairs-LANGUAGE.tsv (NTREX-128 with English) and OUT/solved-eng_Latn.tsv (SIB-200's
English training rows with their topics). Sentences of SIB-200's dev and test splits are removed
from the text, and counted.
"""

import argparse
import csv
import sys
from pathlib import Path

from jaxfusion.data.tasks.catalogue import TASKS
from jaxfusion.files import new_directory

# NTREX-128's file of each language of SIB-200 that it has.
NTREX = {
    "arb_Arab": "ref.arb", "ben_Beng": "ref.ben", "jpn_Jpan": "ref.jpn", "kor_Hang": "ref.kor",
    "sin_Sinh": "ref.sin", "swh_Latn": "ref.swa", "tam_Taml": "ref.tam", "zho_Hans": "ref.zho-CN",
}
TASK = TASKS["sib200"]


def sentences(folder: Path, language: str, split: str) -> list[dict[str, str]]:
    """Rows of a split of SIB-200."""
    with (folder / "data" / "annotated" / language / f"{split}.tsv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))  # quoted, as pandas writes


def ntrex(folder: Path, name: str) -> list[str]:
    """The sentences of one of NTREX-128's files."""
    file = folder / "NTREX-128" / f"newstest2019-{name}.txt"
    return [line.strip() for line in file.read_text("utf-8").removesuffix("\n").split("\n")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--ntrex", type=Path, required=True)
    parser.add_argument("--sib200", type=Path, required=True)
    args = parser.parse_args()
    english = ntrex(args.ntrex, "src.eng")
    left_out = 0
    with new_directory(args.out) as out:
        for language in TASK.languages:
            text = ntrex(args.ntrex, NTREX[language]) if language in NTREX else []
            train, scored = sentences(args.sib200, language, "train"), set()
            for split in ("dev", "test"):
                for row in sentences(args.sib200, language, split):
                    scored.add(row["text"].strip())
            if language in NTREX:
                pairs = [f"{a}\t{b}\n" for a, b in zip(english, text, strict=True)
                         if a and b and b not in scored]
                (out / f"pairs-{language}.tsv").write_text("".join(pairs), "utf-8")
            if language == "eng_Latn":
                text = english
            text = [*text, *(row["text"].strip() for row in train)]
            kept = [line for line in text if line and line not in scored]
            left_out += len(text) - len(kept)
            (out / f"text-{language}.txt").write_text("\n".join(kept) + "\n", "utf-8")
            if language == "eng_Latn":
                solved = [f"{TASK.prompt.format(**row).strip()}\t{row['category']}\n"
                          for row in train]
                (out / f"solved-{language}.tsv").write_text("".join(solved), "utf-8")
    print(f"{args.out}: {len(TASK.languages)} languages; {left_out} empty or scored lines left out",
          file=sys.stderr)


if __name__ == "__main__":
    main()
