"""What a task is: its prompt, labels or answer, languages, and where its data lives."""

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

SPLITS = ("train", "dev", "test")
SAME = {split: split for split in SPLITS}
HUB_SPLITS = {"train": "train", "dev": "validation", "test": "test"}
Row = dict[str, Any]
Placed = tuple[Row, str]  # a row, and where it stands for messages
# A row of a source and its name of the language -> our columns.
Make = Callable[[Row, str], Row]
SLICE = re.compile(r"(.*?)(?:\[(\d*):(\d*)\])?")


@dataclass(frozen=True)
class Source:
    """Where rows are, and how they become ours.

    Attributes:
      place: files by path or pattern, with `{language}` and `{split}` filled in; `hub:ID` of the
        Hugging Face hub; `tfds:NAME` or `tfds:DIRECTORY` of tensorflow-datasets.
      config: of a dataset that has several, both filled in. revision: of a hub dataset.
      splits: its name of each of our splits; `[a:b]` behind it takes rows a to b-1.
      columns: names of a TSV or CSV without header.
      rename: their column -> ours. make: does so where renaming is not enough.
      names: of languages that it calls otherwise than we do.
      borrowed: column -> the language from whose same row it is taken, as the others have it wrong.
      streaming: of a hub dataset: only what is read is downloaded.
      quoted: whether fields of its TSVs may be in quotes, as pandas writes them.
    """

    place: str
    config: str | None = None
    splits: dict[str, str] = field(default_factory=lambda: HUB_SPLITS)
    revision: str | None = None
    columns: tuple[str, ...] | None = None
    rename: dict[str, str] = field(default_factory=dict)
    make: Make | None = None
    names: dict[str, str] = field(default_factory=dict)
    borrowed: dict[str, str] = field(default_factory=dict)
    streaming: bool = False
    quoted: bool = False

    @property
    def kind(self) -> str:
        """`hub`, `tfds` or `files`."""
        kind = self.place.partition(":")[0]
        return kind if kind in ("hub", "tfds") else "files"

    @property
    def name(self) -> str:
        """The place without its kind."""
        return self.place.removeprefix(f"{self.kind}:")

    @property
    def by_language(self) -> bool:
        """Whether each language has a file or a configuration of its own."""
        return "{language}" in self.place + (self.config or "")

    def rows(self, split: str) -> tuple[str, slice]:
        """Its name of one of our splits, and which rows of it that are."""
        theirs, first, last = SLICE.fullmatch(self.splits[split]).groups()
        return theirs, slice(int(first) if first else None, int(last) if last else None)


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
      prompt: the encoder's text; `{column}` names a column of the data.
      labels: what the LLM answers, by class; empty for free text, read from column `target`.
      languages: our names of them.
      source: where its rows are. sources: of languages whose rows are elsewhere.
      others: further places, for `data.path` to name.
      files: its files below a directory `data.path`; `{split}-{language}.jsonl` works too.
      spellings: how the data writes the labels, where neither as they are nor as 0, 1, …
      extract: of a free text what is compared with the target's; None is the text itself.
      unlabelled: no answer: the encoder reads the beginning of the text, the LLM learns the rest.
      parallel: whether test rows of the same number are translations of each other, but for
        languages in `sources`.
      keeps_end: whether a prompt that is too long loses its beginning, as its question is at its
        end; other prompts lose their end.
      max_new_tokens: of an answer, unless the config says. stop: language -> texts that end one.
    """

    prompt: str
    labels: tuple[str, ...]
    languages: tuple[str, ...]
    source: Source | None = None
    sources: dict[str, Source] = field(default_factory=dict)
    others: tuple[Source, ...] = ()
    files: Source | None = None
    spellings: tuple[str, ...] = ()
    extract: Callable[[str], str] | None = None
    unlabelled: bool = False
    parallel: bool = False
    keeps_end: bool = False
    max_new_tokens: int = 16
    stop: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def at(self, place: str) -> Source:
        """The source that another place is. One of the kind that is declared keeps its columns,
        splits and configuration: a mirror, or the user's files elsewhere."""
        wanted = Source(place)
        for source in (self.source, *self.others):
            if source is not None and source.place == place:
                return source
        for source in (self.source, *self.others):
            # Of tensorflow-datasets the directory of a version, which has its name in it.
            named = wanted.kind != "tfds" or (source and source.name in wanted.name.split("/"))
            if source is not None and source.kind == wanted.kind and named:
                return replace(source, place=place)
        return replace(wanted, splits=SAME) if wanted.kind == "files" else wanted

    @property
    def target_column(self) -> str:
        """The column of the answer."""
        return "label" if self.labels else "target"

    @property
    def scoring(self) -> str:
        """How an answer counts in tables: see `evaluation/scoring.py`."""
        return "likelihood" if self.labels else "exact_match"


# A minus is one at the start of a number alone, as in "5-3" it is none.
NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?|\d[\d,]*(?:\.\d+)?")


def last_number(text: str) -> str:
    """The last number of a text, in ASCII digits, without thousands' commas and zeros behind the
    point; or empty. Digits may be of any script."""
    text = "".join(str(unicodedata.digit(x)) if x.isdigit() else x
                   for x in unicodedata.normalize("NFKC", text))
    found = NUMBER.findall(text.replace("\u2212", "-"))
    if not found:
        return ""
    number = found[-1].replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


def last_unsigned(text: str) -> str:
    """The last number of a text without its sign, as a float; `0.0` where there is none.

    So LangBridge's authors count (github.com/kaistAI/LangBridge, lm_eval/tasks/mgsm.py), after
    MathOctopus.
    """
    found = re.findall(r"\d+(?:\.\d+)?", re.sub(r"(\d),(\d)", r"\1\2", text))
    return str(float(found[-1])) if found else "0.0"
