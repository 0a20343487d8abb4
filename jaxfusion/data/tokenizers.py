"""The two tokenizers of a bridge, checked against their models."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from jaxfusion.data.languages import token_of
from jaxfusion.errors import InputError, first_line
from jaxfusion.files import read_object

logger = logging.getLogger(__name__)

# A model's own tokenizer covers its embedding table, except for the table's padding.
LEAST_COVERAGE = 0.9
# Tokens that LangBridge's authors add to the encoder's tokenizer; the order decides the ids.
LANGBRIDGE_WHITESPACE = ("\t", "\n", "\r", "\x0b", "\x0c", "  ", "   ", "    ")


@dataclass(frozen=True)
class Turn:
    """One question and answer in the format of an LLM's chat template.

    Attributes:
      before: the text before the user's words, including BOS if the template writes one.
      after: the text from the user's words to the start of generation.
      lead: the text between that start and the assistant's words (Llama 2: a space).
      end: the token that ends the assistant's turn; None: the tokenizer's end token.
    """

    before: str
    after: str
    lead: str
    end: int | None


@dataclass(frozen=True)
class Tokenizers:
    """A bridge's tokenizers: anything with transformers' tokenizer interface.

    Attributes:
      turn: the decoder's chat format; None: no chat.
      end_tokens: from the LLM's own files: an answer ends at any of them.
      ends_targets: whether every training target ends in `eos`.
      bos: whether rows begin with BOS; None: as the tokenizer's own texts do.
      query_prefix: in front of every text that the encoder reads (E5: "query: ").
      languages: the encoder's tokens of languages, with which its texts begin (NLLB); None: it is
        told no language.
    """

    encoder: object
    decoder: object
    turn: Turn | None = None
    end_tokens: tuple[int, ...] = ()
    ends_targets: bool = True
    bos: bool | None = None
    query_prefix: str = ""
    languages: dict[str, int] | None = None

    @cached_property
    def start(self) -> list[int]:
        """The ids at the start of every decoder row: the header of a chat, or BOS if texts begin
        with it."""
        if self.turn is not None:
            return self.encode_texts([self._header])[0]
        bos = self.decoder.bos_token_id
        begins = adds_bos(self.decoder) if self.bos is None else self.bos
        return [bos] if begins and bos is not None else []

    @property
    def _header(self) -> str:
        # Without trailing spaces, which SentencePiece joins to the user's first word.
        return self.turn.before.rstrip(" ")

    @property
    def ends(self) -> tuple[int, ...]:
        """Every token that ends an answer, ascending."""
        return tuple(sorted({self.eos, *self.end_tokens}))

    @property
    def ending(self) -> list[int]:
        """The ids after the answer in a training target."""
        return [self.eos] if self.ends_targets else []

    @property
    def eos(self) -> int:
        """The id that ends an answer in training."""
        if self.turn is None or self.turn.end is None:
            return self.decoder.eos_token_id
        return self.turn.end

    def encode_queries(
        self, texts: list[str], languages: Sequence[str] | None = None
    ) -> list[list[int]]:
        """Encoder ids, with the encoder's own special tokens (mT5: `</s>` at the end).

        Args:
          languages: of each text, for an encoder that is told them.

        Raises:
          InputError: such an encoder, and no language, or one that it does not have.
        """
        if not texts:
            return []
        prefixed = [self.query_prefix + text for text in texts]
        if self.languages is None:
            return self.encoder(prefixed)["input_ids"]
        plain = self.encoder(prefixed, add_special_tokens=False)["input_ids"]
        frames = map(self.around_query, languages or [""] * len(texts))
        return [[*start, *ids, *end] for ids, (start, end) in zip(plain, frames, strict=True)]

    def around_query(self, language: str = "") -> tuple[list[int], list[int]]:
        """The special tokens before and after a text that the encoder reads."""
        if self.languages is not None:
            return [token_of(language, self.languages)], [self.encoder.eos_token_id]
        return self._around_query

    def check_languages(self, languages: Sequence[str]) -> None:
        """Raises InputError for a language that the encoder has to be told and does not have."""
        for language in languages:
            self.around_query(language)

    def kept_of_query(self, language: str = "") -> tuple[int, int]:
        """How many ids truncation keeps at a query's two ends: special tokens and the prefix."""
        before, after = self.around_query(language)
        return len(before) + self._prefix_length, len(after)

    @cached_property
    def _prefix_length(self) -> int:
        # Its last space may be part of the text's first token.
        prefix = self.query_prefix.rstrip()
        return len(self.encoder(prefix, add_special_tokens=False)["input_ids"]) if prefix else 0

    @cached_property
    def _around_query(self) -> tuple[list[int], list[int]]:
        plain = self.encoder("a", add_special_tokens=False)["input_ids"]
        whole = self.encoder("a")["input_ids"]
        first = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
        return whole[:first], whole[first + len(plain):]

    def encode_texts(self, texts: list[str]) -> list[list[int]]:
        """Decoder ids without special tokens: the bridge places BOS and EOS."""
        return self.decoder(texts, add_special_tokens=False)["input_ids"] if texts else []

    def encode_prompts(self, prompts: list[str]) -> list[list[int]]:
        """Decoder ids between the prefix and the answer."""
        asked = [self.asked(prompt) for prompt in prompts]
        if self.turn is None:
            return self.encode_texts(asked)
        # Without a text prompt, the prefix takes the place of the user's words.
        bare = [not prompt.strip() for prompt in prompts]
        return self._continue(
            [WORDS if x else "" for x in bare],
            [f"{WORDS}{text}" if x else text for x, text in zip(bare, asked, strict=True)],
        )

    def encode_bare(self, prompts: list[str]) -> list[list[int]]:
        """Decoder ids of prompts that follow `start` without a prefix."""
        asked = [self.asked(prompt) for prompt in prompts]
        if self.turn is None:
            return self.encode_texts(asked)
        return self._continue([self._header] * len(asked), [self.turn.before + x for x in asked])

    def encode_answers(self, prompts: list[str], answers: list[str]) -> list[list[int]]:
        """Decoder ids of answers that continue their prompts; without a chat, a prompt's trailing
        spaces move to its answer."""
        contexts = [self.asked(prompt) for prompt in prompts]
        leads = [self.turn.lead if self.turn else prompt[len(prompt.rstrip()) :]
                 for prompt in prompts]
        wholes = ["".join(parts) for parts in zip(contexts, leads, answers, strict=True)]
        return self._continue(contexts, wholes)

    def asked(self, prompt: str) -> str:
        """The prompt up to where the answer starts."""
        return prompt.rstrip() if self.turn is None else prompt.strip() + self.turn.after

    def _continue(self, contexts: list[str], wholes: list[str]) -> list[list[int]]:
        """Ids of the continuation of each context in its full text.

        A BPE token may include a space, so the context and the full text are both encoded, and the
        ids after the context's are returned (as in EleutherAI's lm-evaluation-harness). If a token
        spans the boundary (`(` and `A` as `(A`), the continuation is encoded alone: the LLM reads
        the context's own ids and never sees the spanning token.
        """
        pairs = zip(self.encode_texts(contexts), self.encode_texts(wholes), strict=True)
        return [
            whole[len(context):] if whole[: len(context)] == context
            else self._alone(text[len(start):])
            for (context, whole), start, text in zip(pairs, contexts, wholes, strict=True)
        ]

    def _alone(self, text: str) -> list[int]:
        """Ids of a text inside another one, without a space that the tokenizer adds."""
        for before in ("\n", "|", "\u2603"):
            start, whole = self.encode_texts([before, before + text])
            if whole[: len(start)] == start:
                return whole[len(start):]
        raise InputError(f"the decoder's tokenizer merges {text!r} with any text before it, so it "
                         "has no tokens of its own; put a space or a line end before the answer")


WORDS, ANSWER = "the user's words", "the assistant's words"


def chat_turn(tokenizer) -> Turn:
    """The format of a turn in a tokenizer's chat template.

    Raises:
      InputError: the tokenizer has no template, or the template changes the words.
    """
    if not tokenizer.chat_template:
        raise InputError("the decoder's tokenizer has no chat template; set "
                         "data.chat_template=False, or use a chat-tuned LLM")
    user = {"role": "user", "content": WORDS}
    asked = _render(tokenizer, [user], add_generation_prompt=True)
    answered = _render(tokenizer, [user, {"role": "assistant", "content": ANSWER}])
    before, words, after = asked.partition(WORDS)
    if not words or WORDS in after or ANSWER not in answered:
        raise InputError(f"the decoder's chat template gives {asked!r:.200} for {WORDS!r} and "
                         f"{answered!r:.200} with an answer: expected the words unchanged, once; "
                         "set data.chat_template=False")
    lead, _, end = answered.removeprefix(asked).partition(ANSWER)
    if not answered.startswith(asked):  # past turns have another format than the next one
        lead = ""
    ids = tokenizer(end.lstrip(" "), add_special_tokens=False)["input_ids"]
    marks = tokenizer.added_tokens_decoder
    return Turn(before, after, lead, ids[0] if ids and ids[0] in marks else None)


# Many templates write today's date; this fixed one keeps prompts deterministic.
DAY = {"%A": "Friday", "%d": "26", "%b": "Jul", "%B": "July", "%m": "07", "%Y": "2024"}
TODAY = "{% macro strftime_now(form) %}{{ form" + "".join(
    f" | replace('{code}', '{text}')" for code, text in DAY.items()
) + " }}{% endmacro %}{{ '' }}"


def _render(tokenizer, messages: list[dict[str, str]], **kwargs) -> str:
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=TODAY + tokenizer.get_chat_template(), tokenize=False,
            date_string="26 Jul 2024",
            enable_thinking=False,  # Qwen 3 thinks before it answers by default
            **kwargs,
        )
    except Exception as error:  # whatever a template raises
        raise InputError("the decoder's chat template does not accept a single user turn: "
                         f"{first_line(error)}; set data.chat_template=False") from None


def load_tokenizer(
    path: Path, vocab_size: int, role: str, added_tokens: tuple[str, ...] = ()
):
    """The tokenizer of a checkpoint directory, with the ids of its own files.

    Runs no remote code.

    Args:
      path: the directory. vocab_size: rows of the model's embedding table.
      role: 'encoder' or 'decoder', for messages.
      added_tokens: text pieces to add as tokens; they take the table's unused last rows.

    Raises:
      InputError: no tokenizer, no end token, or a tokenizer of another model.
    """
    try:
        tokenizer = _read(path, role, vocab_size)
        tokenizer(["a"])  # errors in its files show here
    except InputError:
        raise
    except Exception as error:  # whatever transformers and tokenizers raise
        raise InputError(
            f"{path} has no readable {role} tokenizer (tokenizer.json or a SentencePiece "
            f"model): {first_line(error) or type(error).__name__}"
        ) from None
    if added_tokens:
        # As special tokens: others are normalized, and mT5 turns all white space into spaces.
        tokenizer.add_tokens(list(added_tokens), special_tokens=True)
    ids = tokenizer.get_vocab().values()
    if max(ids) >= vocab_size or len(ids) < LEAST_COVERAGE * vocab_size:
        raise InputError(
            f"the tokenizer in {path} does not belong to the {role}: it has {len(ids)} tokens "
            f"(highest id {max(ids)}), but by config.json the model's table has {vocab_size} rows; "
            "one of the two files is from another model"
        )
    if role == "encoder" and tokenizer.eos_token_id is None and tokenizer.sep_token_id is not None:
        tokenizer.eos_token = tokenizer.sep_token  # BERT's name of the token that ends a text
    if tokenizer.eos_token_id is None:
        raise InputError(f"the {role} tokenizer in {path} has no end token (eos_token)")
    return tokenizer


def _read(path: Path, role: str, vocab_size: int):
    """The tokenizer of a directory, from its `tokenizer.json` or SentencePiece model.

    transformers rebuilds a tokenizer through its class and drops settings of its files; it is used
    only if neither file exists (ByT5, or a vocabulary with its merges).
    """
    if (path / "tokenizer.json").is_file():
        from jaxfusion.data.tokenizer_json import read_tokenizer_json

        return read_tokenizer_json(path, role, vocab_size)
    from jaxfusion.data.sentencepiece_backend import find_model, read_sentencepiece

    if model := find_model(path):
        return read_sentencepiece(model, role, vocab_size)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def read_end_tokens(path: Path, vocab_size: int) -> tuple[int, ...]:
    """Ids at which an LLM's answers end, as in transformers: `eos_token_id` (one or a list) of
    `generation_config.json`, or of `config.json` if that file is missing.

    Raises:
      InputError: ids outside the model's table.
    """
    files = [path / name for name in ("generation_config.json", "config.json")]
    file = next((x for x in files if x.is_file()), None)
    eos = None if file is None else read_object(file).get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise InputError(f"{file}: eos_token_id is {eos!r:.80}, expected ids below {vocab_size}")
    return tuple(ids)


def adds_bos(tokenizer) -> bool:
    """Whether texts of this tokenizer begin with BOS."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


SPECIALS = {
    "encoder": ("<pad>", "</s>", "<unk>", "<extra_id_0>"), "decoder": ("<unk>", "<s>", "</s>"),
}


def train_tokenizer(role: str, texts: Iterable[str], vocab_size: int):
    """A tokenizer of at most `vocab_size` tokens with T5's or Llama's special tokens.

    Both are BPE (arXiv:1508.07909): the encoder's over characters of words with their leading
    space, as in SentencePiece; the decoder's over bytes, so that it encodes any script, in many
    tokens where it was not trained.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    kind = {"vocab_size": vocab_size, "special_tokens": list(SPECIALS[role]),
            "show_progress": False}
    if role == "decoder":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        backend.train_from_iterator(texts, trainers.BpeTrainer(initial_alphabet=alphabet, **kind))
        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[
            ("<s>", backend.token_to_id("<s>"))])
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
        )
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    # No token for a trailing space, and none that spans a word and its punctuation.
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()]
    )
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(texts, trainers.BpeTrainer(**kind))
    backend.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        mask_token="<extra_id_0>",
    )
