"""The papers' tasks: prompt, labels, languages, and where their data lives."""

from dataclasses import dataclass, field

from jaxfusion.data.lexicon import LANGUAGES as POCKET
from jaxfusion.errors import InputError, choose

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Hub:
    """A Hugging Face dataset; `{language}` and `{split}` are filled in.

    Attributes:
      name: dataset id.
      config: its configuration.
      splits: their name of each of our splits; may end in a slice such as `train[:500]`.
      rename: their column -> ours.
    """

    name: str
    config: str | None = None
    splits: dict[str, str] = field(default_factory=lambda: {
        "train": "train", "dev": "validation", "test": "test"
    })
    rename: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Files:
    """Files below a directory; `{language}` is filled in, `[a:b]` takes rows a to b-1.

    Attributes:
      splits: path of each split's file, `.tsv` or `.jsonl`.
      columns: names of a TSV without header.
      rename: their column -> ours.
    """

    splits: dict[str, str] = field(default_factory=dict)
    columns: tuple[str, ...] | None = None
    rename: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
      prompt: the encoder's text; `{column}` names a column of the data.
      labels: what the LLM answers, by class; empty for free text, read from column `target`.
      languages: as the data source writes them.
      hub: its dataset. files: its files below `data.path`; `{split}-{language}.jsonl` works too.
    """

    prompt: str
    labels: tuple[str, ...]
    languages: tuple[str, ...]
    hub: Hub | None = None
    files: Files = Files()

    @property
    def target_column(self) -> str:
        return "label" if self.labels else "target"


NLI_PROMPT = "Premise: {premise} Hypothesis: {hypothesis} Label: "
NLI_LABELS = ("Entailment", "Neutral", "Contradiction")
QA_PROMPT = "Text: {text} Question: {question} Answer: "

# The prompt that MetaMath was tuned with (arXiv:2309.12284).
ALPACA_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{query}\n\n### Response: Let's think step by step."
)

TASKS: dict[str, Task] = {
    "xnli": Task(
        NLI_PROMPT,
        NLI_LABELS,
        (
            "en", "ar", "bg", "de", "el", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi",
            "zh",
        ),
        hub=Hub("facebook/xnli", "{language}"),
        # XNLI's released TSVs hold 830 premises of 3 pairs each; cuts fall between premises.
        files=Files(
            {"train": "dev-{language}.tsv[0:1890]", "dev": "dev-{language}.tsv[1890:2190]",
             "test": "dev-{language}.tsv[2190:2490]"},
            columns=("premise", "hypothesis", "label"),
        ),
    ),
    "indicxnli": Task(
        NLI_PROMPT,
        NLI_LABELS,
        ("as", "bn", "gu", "hi", "kn", "ml", "mr", "or", "pa", "ta", "te"),
        hub=Hub("Divyanshu/indicxnli", "{language}"),
    ),
    # The authors' loader reads the configuration train_{language} for testing too; this one reads
    # test_{language}. Say so before comparing with their figure.
    "sinhala_news": Task(
        "News Sentence: {sentence} Category: ",
        ("Business", "Entertainment", "Political", "Sports", "Science"),
        ("en", "si"),
        hub=Hub(
            "Themira/en_si_news_classification_with_label_name", "{split}_{language}",
            {"train": "train[500:]", "dev": "train[:500]", "test": "train"},
        ),
    ),
    "amazon_reviews": Task(
        "Review: {text} Label: ",
        ("Very Negative", "Negative", "Neutral", "Positive", "Very Positive"),
        ("en", "es", "fr", "de", "zh", "ja"),
        hub=Hub("mteb/amazon_reviews_multi", "{language}"),
    ),
    "sib200": Task(
        "Sentence: {text} Topic: ",
        ("science/technology", "travel", "politics", "sports", "health", "entertainment",
         "geography"),
        (
            "eng_Latn", "sin_Sinh", "tam_Taml", "swh_Latn", "urd_Arab", "asm_Beng", "ben_Beng",
            "guj_Gujr", "hin_Deva", "kan_Knda", "mal_Mlym", "mar_Deva", "ory_Orya", "pan_Guru",
            "tel_Telu", "arb_Arab", "jpn_Jpan", "kor_Hang", "spa_Latn", "zho_Hans",
        ),
        hub=Hub("Davlan/sib200", "{language}", rename={"category": "label"}),
        files=Files(
            {split: f"data/annotated/{{language}}/{split}.tsv" for split in SPLITS},
            rename={"category": "label"},
        ),
    ),
    # Of the made-up world in data/pocket.py.
    "pocket_nli": Task(NLI_PROMPT, NLI_LABELS, tuple(POCKET)),
    "pocket_qa": Task(QA_PROMPT, (), tuple(POCKET)),
    # LangBridge's labelled corpora: English question and answer, no classes.
    "metamath": Task(
        ALPACA_PROMPT,
        (),
        ("en",),
        hub=Hub(
            "meta-math/MetaMathQA", None,
            {"train": "train[1000:]", "dev": "train[:500]", "test": "train[500:1000]"},
            rename={"response": "target"},
        ),
    ),
}


def get_task(name: str) -> Task:
    """The task of that name.

    Raises:
      InputError: there is none; the near match is named.
    """
    return TASKS[choose("task", name, TASKS)]


def check_languages(name: str, languages: tuple[str, ...]) -> None:
    """Raises InputError if the task lacks one of the languages."""
    known = get_task(name).languages
    for language in languages:
        if language not in known:
            raise InputError(
                f"task '{name}' has no language '{language}'; it has {', '.join(known)}"
            )
