"""The models of a server: a bridge and its LLM alone, or an LLM."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from jaxfusion import config as configs
from jaxfusion.config import CONFIG_FILE
from jaxfusion.data.batching import TokenRow
from jaxfusion.data.rows.examples import Example
from jaxfusion.data.tasks.catalogue import get_task
from jaxfusion.data.tasks.spec import Task
from jaxfusion.data.tokenizers import Tokenizers
from jaxfusion.errors import InputError
from jaxfusion.evaluation.scoring import Scorer, answering, for_task
from jaxfusion.fields import Config, LensRunConfig
from jaxfusion.nn.bridge import Bridge, Params
from jaxfusion.runs.exported import described_in, is_export, open_export
from jaxfusion.runs.open_llm import OpenLLM, open_checkpoint, open_lens
from jaxfusion.runs.open_run import OpenRun, open_run

LLM = "llm"  # the name of the LLM beside: alone, or before Lens
CONTEXT = 2048  # most tokens of prompt and answer: bounds the cache of a batch


@dataclass(frozen=True)
class Served:
    """A model with a name.

    Attributes:
      bare: the LLM alone.
      config: the run's.
    """

    name: str
    bare: bool
    bridge: Bridge
    params: Params
    tokenizers: Tokenizers
    config: Config
    task: Task

    @property
    def context(self) -> int:
        """The most tokens that the LLM reads and writes for one prompt."""
        return min(self.bridge.decoder.config.max_length, CONTEXT)

    @cached_property
    def scorer(self) -> Scorer:
        """Of one row at a time, as `eval.py` makes it."""
        settings = replace(for_task(answering(self.config.eval), self.task), batch_size=1)
        return Scorer(self.bridge, self.tokenizers, settings, self.config.data.text_prompt,
                      self.bare)

    @cached_property
    def framing(self) -> Tokenizers:
        """What begins every row of a batch; rows of the LLM alone have it among their own ids."""
        return replace(self.tokenizers, turn=None, bos=False) if self.bare else self.tokenizers

    def prompt(self, text: str, language: str = "") -> TokenRow:
        """A text as `eval.py` reads it: with the run's text prompt and chat template.

        Raises:
          InputError: no text, one longer than the run's limits, or a wrong language.
        """
        if not text.strip():
            raise InputError("the prompt is empty; give a text")
        self.check_language(language)
        (row,), cut = self.scorer.rows([Example(text, "", -1, language)], self.task.keeps_end)
        limits = self.config.eval
        if cut.queries:
            raise InputError("the prompt is longer than what the encoder reads, "
                             f"{limits.max_encoder_tokens} tokens (the run's "
                             "eval.max_encoder_tokens); shorten it")
        if cut.texts:
            raise InputError("the prompt is longer than what the LLM reads, "
                             f"{limits.max_decoder_tokens} tokens (the run's "
                             "eval.max_decoder_tokens); shorten it")
        return self._begun(self.tokenizers.start, row.text) if self.bare else row

    def literal(self, prompt: str | Sequence[int], language: str = "") -> TokenRow:
        """A prompt of the LLM alone as it is. A text gets BOS in front where the LLM's tokenizer
        puts one; ids get nothing.

        Raises:
          InputError: ids that the LLM has not, or a language.
        """
        self.check_language(language)
        if isinstance(prompt, str):
            start = replace(self.tokenizers, turn=None).start
            return self._begun(start, self.tokenizers.encode_texts([prompt])[0])
        size = self.bridge.decoder.config.vocab_size
        wrong = next((i for i in prompt if not 0 <= i < size), None)
        if wrong is not None:
            raise InputError(f"prompt has token id {wrong}, expected ids from 0 to {size - 1}")
        return self._begun([], list(prompt))

    def _begun(self, start: list[int], text: list[int]) -> TokenRow:
        # An LLM without BOS starts a text without context after its end token.
        return TokenRow([], [*start, *text] or [self.tokenizers.eos], [])

    def length(self, row: TokenRow) -> int:
        """How many of the LLM's slots a prompt takes."""
        return len(self.framing.start) + row.prefix + len(row.text)

    def check_room(self, row: TokenRow, answer: int) -> None:
        """Raises InputError for a prompt that leaves no room for so long an answer."""
        length = self.length(row)
        if length + answer > self.context:
            raise InputError(
                f"the prompt takes {length:,} of the LLM's {self.context:,} tokens, which leaves "
                f"{max(0, self.context - length):,} for the answer, and max_tokens is {answer:,}; "
                "shorten one of them")

    @property
    def any_language(self) -> str:
        """A language that the encoder has, if it is told one."""
        told = None if self.bare else self.tokenizers.languages
        return next(iter(told or ()), "")

    def check_language(self, language: str) -> None:
        """Raises InputError for a language that the encoder is not told, or does not have."""
        if not self.bare and self.tokenizers.languages is not None:
            self.tokenizers.around_query(language)
        elif language:
            who = "the LLM alone" if self.bare else "this run's encoder"
            raise InputError(f"language is for encoders that are told it (NLLB, M2M100), and {who} "
                             "is told none; leave it out")


def open_models(place: Path) -> tuple[OpenRun | OpenLLM, dict[str, Served]]:
    """What is served, and its models by name; the first is the directory's.

    A bridge (a run, or an export of one) has the LLM alone beside it, a Lens run the LLM of before;
    both are `llm`. Another checkpoint of an LLM is alone.

    Raises:
      InputError: the directory is none of these, or cannot be read.
    """
    try:
        opened = _open(place)
    except InputError as error:
        raise InputError(f"{error}; serve.py serves a bridge (a workdir or an export), a run of "
                         "Lens, and LLMs in Hugging Face format") from None
    name = name_of(place)
    if isinstance(opened, OpenLLM):
        task = get_task(opened.config.data.task, opened.config.tasks)
        model = Served(name, True, opened.bridge, opened.params, opened.llm.tokenizers,
                       opened.config, task)
        before = opened.before and replace(model, name=LLM, params=opened.before)
        return opened, {name: model} | ({LLM: before} if before else {})
    models = {name: _served(opened, name)}
    bare = _served(opened.bare(), LLM)
    # Of towers that were read again only the LLM is needed.
    only = {part: bare.params[part] for part in ("decoder", "edits") if part in bare.params}
    return opened, models | {LLM: replace(bare, params=only)}


def _open(place: Path) -> OpenRun | OpenLLM:
    if is_export(place):
        return open_export(place)
    if "model_type" in described_in(place):
        return open_checkpoint(place)
    if isinstance(configs.load(place / CONFIG_FILE), LensRunConfig):
        return open_lens(place)
    return open_run(place)


def _served(run: OpenRun, name: str) -> Served:
    return Served(name, run.llm_only, run.model.bridge, run.params, run.tokenizers, run.config,
                  run.task)


def name_of(workdir: Path) -> str:
    """The name of a directory's model: its last part, or its last two where that is a seed's."""
    *_, parent, name = "", *workdir.resolve().parts
    if name.startswith("seed_"):
        name = f"{parent}-{name}"
    return "model" if name in (LLM, "/") else name
