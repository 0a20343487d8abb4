"""Task definitions: prompt, labels or answer, languages, and the source of the rows."""

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from jaxfusion.config import EVERY
from jaxfusion.errors import InputError
from jaxfusion.fields import DataConfig

SPLITS = ("train", "dev", "test")
SAME = {split: split for split in SPLITS}
HUB_SPLITS = {"train": "train", "dev": "validation", "test": "test"}
Row = dict[str, Any]
Placed = tuple[Row, str]  # a row, and its place for messages
# A source's row, and the source's name of the language -> our columns.
Make = Callable[[Row, str], Row]
SLICE = re.compile(r"(.*?)(?:\[(\d*):(\d*)\])?")


@dataclass(frozen=True)
class Source:
    """Where rows are, and how they map to our columns.

    Attributes:
      place: a path or pattern of files, where `{language}` and `{split}` are substituted; `hub:ID`
        on the Hugging Face hub; `tfds:NAME` or `tfds:DIRECTORY` of tensorflow-datasets.
      config: dataset configuration; `{language}` and `{split}` are substituted.
      revision: of a hub dataset.
      splits: our split -> the source's; a suffix `[a:b]` takes rows a to b-1.
      columns: names of a TSV or CSV without a header.
      rename: source column -> ours. make: for what renaming cannot do.
      names: our language -> the source's name, where they differ.
      borrowed: column -> language to copy it from, where other languages' files are wrong.
      answers: of parallel text: a pattern like `place`; the line of the same number is the answer.
      streaming: whether a hub dataset is downloaded only as it is read.
      quoted: whether fields of TSVs may be quoted, as pandas writes them.
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
    answers: str | None = None
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
        """Whether each language has its own file or configuration."""
        return "{language}" in self.place + (self.config or "")

    def rows(self, split: str) -> tuple[str, slice]:
        """The source's name of one of our splits, and the slice of its rows.

        Raises:
          InputError: rows of files that are not counted from the first; the hub's own data sets
            take percentages and rows from the end, too.
        """
        theirs, first, last = SLICE.fullmatch(self.splits[split]).groups()
        if self.kind == "files" and re.search(r"\[.*:.*\]$", theirs):
            raise InputError(f"splits.{split} is '{theirs}', expected rows counted from the first, "
                             "such as all[0:900] or all[900:]")
        return theirs, slice(int(first) if first else None, int(last) if last else None)


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
      prompt: the encoder's text; `{column}` names a column of the data.
      labels: the LLM's answer for each class; empty for free text, read from column `target`.
      languages: our names of them.
      source: of the rows. sources: of languages whose rows are elsewhere.
      others: more sources that `data.path` can name.
      files: files below a directory `data.path`; `{split}-{language}.jsonl` works too.
      spellings: the labels in the data, if neither the labels themselves nor 0, 1, …
      extract: maps a free text to what is compared with the target; None: the text itself.
      unlabelled: no answer: the encoder reads the beginning of the text, the LLM learns the rest.
      translation: the answer is a translation, of which a good one rarely equals the target.
      parallel: whether test rows with the same number are translations of each other, except for
        languages in `sources`.
      keeps_end: whether a prompt that is too long is truncated at its beginning, because its
        question is at the end; other prompts are truncated at their end.
      max_new_tokens: of an answer, unless the config sets it. stop: language -> stop texts.
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
    translation: bool = False
    parallel: bool = False
    keeps_end: bool = False
    max_new_tokens: int = 16
    stop: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def at(self, place: str) -> Source:
        """The source at another place. It keeps the columns, splits and configuration of a
        declared source of the same kind: a mirror, or the user's files."""
        requested = Source(place)
        for source in (self.source, *self.others):
            if source is not None and source.place == place:
                return source
        for source in (self.source, *self.others):
            # For tensorflow-datasets: a version's directory, whose path contains the name.
            named = requested.kind != "tfds" or (source and (
                not source.name or source.name in requested.name.split("/")))
            if source is not None and source.kind == requested.kind and named:
                return replace(source, place=place)
        return replace(requested, splits=SAME) if requested.kind == "files" else requested

    @property
    def target_column(self) -> str:
        """The column of the answer."""
        return "label" if self.labels else "target"

    def training_languages(self, language: str) -> tuple[str, ...]:
        """The languages that `data.language` means."""
        every = language == EVERY and EVERY not in self.languages
        return self.languages if every else (language,)

    @property
    def development(self) -> str:
        """The score of development rows that decides which checkpoint is best: the one that tables
        report, except for texts of which a good one rarely equals the target."""
        return "log_likelihood" if self.unlabelled or self.translation else self.scoring

    @property
    def scoring(self) -> str:
        """The scoring that tables report: see `evaluation/scoring.py`."""
        return "likelihood" if self.labels else "exact_match"


def configured(task: Task, data: DataConfig) -> Task:
    """The training task with the config's settings for its hub datasets: place, streaming, and the
    revision, which is that of the first training language's dataset."""
    languages = task.training_languages(data.language)
    first = task.sources.get(languages[0], task.source) if data.path is None else task.at(data.path)

    def set_up(source: Source | None) -> Source | None:
        if source is None or source.kind != "hub":
            return source
        revision = data.revision if source.place == first.place else None
        return replace(source, streaming=data.streaming, revision=revision or source.revision)

    if data.path is not None:
        return replace(task, source=set_up(first)) if first.kind == "hub" else task
    sources = {language: set_up(source) if language in languages else source
               for language, source in task.sources.items()}
    shared = set_up(task.source) if set(languages) - task.sources.keys() else task.source
    return replace(task, source=shared, sources=sources)


# A minus counts only at the start of a number: "5-3" has no negative number.
NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?|\d[\d,]*(?:\.\d+)?")


def last_number(text: str) -> str:
    """The last number of a text, or an empty string. Digits of any script become ASCII; commas of
    thousands and trailing zeros of a fraction are removed."""
    text = "".join(str(unicodedata.digit(x)) if x.isdigit() else x
                   for x in unicodedata.normalize("NFKC", text))
    numbers = NUMBER.findall(text.replace("\u2212", "-"))
    if not numbers:
        return ""
    number = numbers[-1].replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


def last_unsigned(text: str) -> str:
    """The last number of a text without its sign, as a float; `0.0` if it has none.

    As LangBridge's authors do (github.com/kaistAI/LangBridge, lm_eval/tasks/mgsm.py), after
    MathOctopus.
    """
    numbers = re.findall(r"\d+(?:\.\d+)?", re.sub(r"(\d),(\d)", r"\1\2", text))
    return str(float(numbers[-1])) if numbers else "0.0"
