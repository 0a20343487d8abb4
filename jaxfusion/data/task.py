"""What a task is: its prompt, labels or answer, languages, and where its data lives."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

SPLITS = ("train", "dev", "test")
Row = dict[str, Any]
# A row of a source and our name of its language -> our columns, or None for one to leave out.
Make = Callable[[Row, str], Row | None]


@dataclass(frozen=True)
class Hub:
    """A Hugging Face dataset; `{language}` and `{split}` are filled in.

    Attributes:
      name: dataset id.
      config: its configuration.
      splits: their name of each of our splits; may end in a slice such as `train[:500]`.
      rename: their column -> ours. make: does so where renaming is not enough.
      names: of languages that it calls otherwise than we do.
    """

    name: str
    config: str | None = None
    splits: dict[str, str] = field(default_factory=lambda: {
        "train": "train", "dev": "validation", "test": "test"
    })
    rename: dict[str, str] = field(default_factory=dict)
    make: Make | None = None
    names: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Files:
    """Files below a directory; `{language}` is filled in, `[a:b]` takes rows a to b-1.

    Attributes:
      splits: path of each split's file, `.tsv`, `.jsonl` or `.json`.
      columns: names of a TSV without header.
      rename, make, names: as of `Hub`.
    """

    splits: dict[str, str] = field(default_factory=dict)
    columns: tuple[str, ...] | None = None
    rename: dict[str, str] = field(default_factory=dict)
    make: Make | None = None
    names: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
      prompt: the encoder's text; `{column}` names a column of the data.
      labels: what the LLM answers, by class; empty for free text, read from column `target`.
      languages: our names of them.
      hub: its dataset. hubs: those of languages that live elsewhere.
      files: its files below `data.path`; `{split}-{language}.jsonl` works too.
      spellings: how the data writes the labels, where neither as they are nor as 0, 1, …
      borrowed: column -> the language from whose same row it is taken, as the others have it wrong;
        of `hub` and `files` alone.
      extract: of a free text what is compared with the target's; None is the text itself.
    """

    prompt: str
    labels: tuple[str, ...]
    languages: tuple[str, ...]
    hub: Hub | None = None
    hubs: dict[str, Hub] = field(default_factory=dict)
    files: Files = Files()
    spellings: tuple[str, ...] = ()
    borrowed: dict[str, str] = field(default_factory=dict)
    extract: Callable[[str], str] | None = None

    @property
    def target_column(self) -> str:
        return "label" if self.labels else "target"

    @property
    def scoring(self) -> str:
        """How an answer counts in tables: see `evaluation/scoring.py`."""
        return "likelihood" if self.labels else "exact_match"


NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def last_number(text: str) -> str:
    """The last number of a text, without thousands' commas and zeros behind the point; or empty."""
    found = NUMBER.findall(text)
    if not found:
        return ""
    number = found[-1].replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number
