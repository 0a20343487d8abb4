"""The two tokenizers of a bridge, and the check that each belongs to its model."""

import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxfusion.errors import InputError, first_line
from jaxfusion.files import read_object

logger = logging.getLogger(__name__)

# A tokenizer of a model covers its embedding table up to the padding of the table's size.
LEAST_COVERAGE = 0.9
# What LangBridge's authors add to the encoder's tokenizer; their order decides the ids.
LANGBRIDGE_WHITESPACE = ("\t", "\n", "\r", "\x0b", "\x0c", "  ", "   ", "    ")


@dataclass(frozen=True)
class Turn:
    """One question and answer as an LLM's chat template writes them.

    Attributes:
      before: the text before the user's words, BOS included where the template writes one.
      after: the text from the user's words to where the assistant's are generated.
      lead: what stands there before the assistant's own words (Llama 2: a space).
      end: the token that ends the assistant's turn; None is the tokenizer's end token.
    """

    before: str
    after: str
    lead: str
    end: int | None


@dataclass(frozen=True)
class Tokenizers:
    """A bridge's tokenizers: anything with transformers' tokenizer interface.

    Attributes:
      turn: of the decoder's chats; None where there is no chat.
      end_tokens: of the LLM's own files: an answer ends at any of them.
      ends_targets: whether `eos` is trained on behind every answer.
      bos: whether rows begin with BOS; None is where the tokenizer's own texts do.
    """

    encoder: object
    decoder: object
    turn: Turn | None = None
    end_tokens: tuple[int, ...] = ()
    ends_targets: bool = True
    bos: bool | None = None

    @cached_property
    def start(self) -> list[int]:
        """What every decoder row starts with: the header of a chat, or BOS where the tokenizer
        begins a text with it."""
        if self.turn is not None:
            return self.encode_texts([self._header])[0]
        bos = self.decoder.bos_token_id
        begins = adds_bos(self.decoder) if self.bos is None else self.bos
        return [bos] if begins and bos is not None else []

    @property
    def _header(self) -> str:
        # Without its last space, which SentencePiece takes as part of the user's first word.
        return self.turn.before.rstrip(" ")

    @property
    def ends(self) -> tuple[int, ...]:
        """Every token that ends an answer, ascending."""
        return tuple(sorted({self.eos, *self.end_tokens}))

    @property
    def ending(self) -> list[int]:
        """What is trained on behind an answer."""
        return [self.eos] if self.ends_targets else []

    @property
    def eos(self) -> int:
        """What ends an answer that is trained on."""
        if self.turn is None or self.turn.end is None:
            return self.decoder.eos_token_id
        return self.turn.end

    def encode_queries(self, texts: list[str]) -> list[list[int]]:
        """Encoder ids, with the encoder's own special tokens (mT5: `</s>` at the end)."""
        return self.encoder(texts)["input_ids"] if texts else []

    def encode_texts(self, texts: list[str]) -> list[list[int]]:
        """Decoder ids, without special tokens: where BOS and EOS go is the bridge's business."""
        return self.decoder(texts, add_special_tokens=False)["input_ids"] if texts else []

    def encode_prompts(self, prompts: list[str]) -> list[list[int]]:
        """Decoder ids of what stands between the prefix and the answer."""
        asked = [self.asked(prompt) for prompt in prompts]
        if self.turn is None:
            return self.encode_texts(asked)
        # Where there is no text, the header follows the prefix as it follows words.
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
        """Decoder ids of answers as they continue their prompts; without a chat, trailing spaces of
        a prompt go to its answer."""
        contexts = [self.asked(prompt) for prompt in prompts]
        leads = [self.turn.lead if self.turn else prompt[len(prompt.rstrip()) :]
                 for prompt in prompts]
        wholes = ["".join(parts) for parts in zip(contexts, leads, answers, strict=True)]
        return self._continue(contexts, wholes)

    def asked(self, prompt: str) -> str:
        """The prompt up to where the answer starts."""
        return prompt.rstrip() if self.turn is None else prompt.strip() + self.turn.after

    def _continue(self, contexts: list[str], wholes: list[str]) -> list[list[int]]:
        """Ids of what follows each context in its whole.

        A BPE token may span a space: both are encoded, and what follows the context's own ids is
        taken (as EleutherAI's lm-evaluation-harness does). Where a token spans the seam itself
        (`(` and `A` as `(A`), what follows is encoded alone: the LLM reads the context's own ids,
        and never meets the token that spans.
        """
        pairs = zip(self.encode_texts(contexts), self.encode_texts(wholes), strict=True)
        return [
            whole[len(context):] if whole[: len(context)] == context
            else self._alone(text[len(start):])
            for (context, whole), start, text in zip(pairs, contexts, wholes, strict=True)
        ]

    def _alone(self, text: str) -> list[int]:
        """Ids of a text as it stands inside another: without a space that its tokenizer adds."""
        for before in ("\n", "|", "\u2603"):
            start, whole = self.encode_texts([before, before + text])
            if whole[: len(start)] == start:
                return whole[len(start):]
        raise InputError(f"the decoder's tokenizer joins {text!r} to whatever is before it: its "
                         "tokens cannot be told; put a space or a line end before the answer")


WORDS, ANSWER = "the user's words", "the assistant's words"


def chat_turn(tokenizer) -> Turn:
    """How a tokenizer's chat template writes a turn.

    Raises:
      InputError: it has no template, or one that does not take the words as they are.
    """
    if not tokenizer.chat_template:
        raise InputError("the decoder's tokenizer has no chat template; set "
                         "data.chat_template=False, or take an LLM tuned on chats")
    user = {"role": "user", "content": WORDS}
    asked = _render(tokenizer, [user], add_generation_prompt=True)
    answered = _render(tokenizer, [user, {"role": "assistant", "content": ANSWER}])
    before, found, after = asked.partition(WORDS)
    if not found or WORDS in after or ANSWER not in answered:
        raise InputError(f"the decoder's chat template gives {asked!r:.200} for {WORDS!r} and "
                         f"{answered!r:.200} with an answer: wanted the words as they are, once; "
                         "set data.chat_template=False")
    lead, _, end = answered.removeprefix(asked).partition(ANSWER)
    if not answered.startswith(asked):  # it writes past turns otherwise than one to come
        lead = ""
    ids = tokenizer(end.lstrip(" "), add_special_tokens=False)["input_ids"]
    marks = tokenizer.added_tokens_decoder
    return Turn(before, after, lead, ids[0] if ids and ids[0] in marks else None)


# Many templates write the day on which they are filled in; theirs is this one, a Friday.
DAY = {"%A": "Friday", "%d": "26", "%b": "Jul", "%B": "July", "%m": "07", "%Y": "2024"}
TODAY = "{% macro strftime_now(form) %}{{ form" + "".join(
    f" | replace('{code}', '{text}')" for code, text in DAY.items()
) + " }}{% endmacro %}{{ '' }}"


def _render(tokenizer, messages: list[dict[str, str]], **kwargs) -> str:
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=TODAY + tokenizer.get_chat_template(), tokenize=False,
            date_string="26 Jul 2024",
            enable_thinking=False,  # Qwen 3 thinks before it answers unless told not to
            **kwargs,
        )
    except Exception as error:  # whatever a template raises
        raise InputError("the decoder's chat template does not take a user's words alone: "
                         f"{first_line(error)}; set data.chat_template=False") from None


def load_tokenizer(
    path: Path, vocab_size: int, role: str, added_tokens: tuple[str, ...] = ()
):
    """The tokenizer of a checkpoint directory, with the ids that its own files give.

    No remote code is run.

    Args:
      path: the directory. vocab_size: rows of the model's embedding table.
      role: 'encoder' or 'decoder', for messages.
      added_tokens: text pieces to add as tokens; they take the table's unused last rows.

    Raises:
      InputError: no tokenizer there, none with an end token, or one of another model.
    """
    try:
        tokenizer = _read(path, role, vocab_size)
        tokenizer(["a"])  # what its files hold wrong shows here
    except InputError:
        raise
    except Exception as error:  # whatever transformers and tokenizers raise
        raise InputError(
            f"{path} has no {role} tokenizer that can be read (tokenizer.json or a SentencePiece "
            f"model): {first_line(error) or type(error).__name__}"
        ) from None
    if added_tokens:
        # As special ones: others are normalized, and mT5's makes every whitespace a space.
        tokenizer.add_tokens(list(added_tokens), special_tokens=True)
    ids = tokenizer.get_vocab().values()
    if max(ids) >= vocab_size or len(ids) < LEAST_COVERAGE * vocab_size:
        raise InputError(
            f"the tokenizer in {path} does not belong to the {role}: it has {len(ids)} tokens "
            f"(highest id {max(ids)}), the model's table {vocab_size} rows by its config.json; one "
            "of both files is of another model"
        )
    if tokenizer.eos_token_id is None:
        raise InputError(f"the {role} tokenizer in {path} has no end token (eos_token)")
    return tokenizer


def _read(path: Path, role: str, vocab_size: int):
    """The tokenizer of a directory, from its `tokenizer.json` or SentencePiece model.

    transformers has the class of a tokenizer rebuild it, and so drops what its files say; it reads
    by class only what has no such file (ByT5, or a vocabulary with its merges).
    """
    if (path / "tokenizer.json").is_file():
        return _from_json(path, role, vocab_size)
    from jaxfusion.data.sentencepiece_backend import find_model, read_sentencepiece

    if model := find_model(path):
        return read_sentencepiece(model, role, vocab_size)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def _from_json(path: Path, role: str, vocab_size: int):
    """A `tokenizer.json` as it is, with the special tokens and the chat template beside it.

    An added token beyond the model's table (Gemma 3's `<image_soft_token>`) is left out: no text
    needs it, and the model has no row for it.
    """
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    from jaxfusion.data.sentencepiece_backend import read_model
    from jaxfusion.hf.tokenization_jaxfusion import NORMALIZER, SentencePieceTokenizer

    source = path / "tokenizer.json"
    backend = Tokenizer.from_file(str(source))
    beyond = [token.content for i, token in backend.get_added_tokens_decoder().items()
              if i >= vocab_size]
    if beyond:
        content = read_object(source)
        content["added_tokens"] = [x for x in content["added_tokens"]
                                   if x["content"] not in beyond]
        backend = Tokenizer.from_str(json.dumps(content))
    file = path / "tokenizer_config.json"
    config = read_object(file) if file.is_file() else {}
    if (model := config.get(NORMALIZER)) is not None:
        if not isinstance(model, str) or not model or Path(model).name != model:
            raise InputError(f"{file}: {NORMALIZER} is {model!r:.80}, expected the name of a file "
                             "in the same directory")
        tokenizer = SentencePieceTokenizer.from_pretrained(path)
        tokenizer.spm = read_model(path / model)
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    for token_id, token in sorted(_configured(config).items()):
        if backend.token_to_id(token.content) is None and token_id < vocab_size:
            backend.add_tokens([token])
            if backend.token_to_id(token.content) != token_id:
                raise InputError(f"{file}: token {token.content!r:.80} has id {token_id} there, "
                                 f"but comes out as {backend.token_to_id(token.content)}; put it "
                                 "into tokenizer.json")
    begins = config.get("add_bos_token")
    if begins is not None and not isinstance(begins, bool):
        raise InputError(f"{file}: add_bos_token is {begins!r:.80}, expected true or false")
    if role == "decoder" and begins is not None and tokenizer.bos_token is not None:
        # It decides, as in transformers, whatever tokenizer.json does.
        bos, i = tokenizer.bos_token, tokenizer.bos_token_id
        backend.post_processor = TemplateProcessing(
            single=f"{bos} $A" if begins else "$A", special_tokens=[(bos, i)] if begins else [])
    tokenizer._tokenizer = backend  # transformers may have changed its own copy
    needed = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token}
    template = str(tokenizer.chat_template or "")
    if lost := [x for x in beyond if x in needed or x in template]:
        raise InputError(f"the tokenizer in {path} does not belong to the model: its token "
                         f"{lost[0]!r} is beyond the model's table of {vocab_size} rows")
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = getattr(tokenizer, name)
        if token is not None and backend.token_to_id(token) is None:
            raise InputError(f"{path}: {name} {token!r:.80} is missing from tokenizer.json; one of "
                             "both files is of another model")
    if beyond:
        logger.warning("%s: tokens beyond the model's table of %d rows are left out: %s", path,
                       vocab_size, ", ".join(beyond))
    return tokenizer


def _configured(config: dict[str, Any]) -> dict[int, Any]:
    """Added tokens of a `tokenizer_config.json`, by id."""
    from tokenizers import AddedToken

    return {int(i): AddedToken(**{name: x for name, x in token.items() if name != "__type"})
            for i, token in config.get("added_tokens_decoder", {}).items()}


def read_end_tokens(path: Path, vocab_size: int) -> tuple[int, ...]:
    """Ids at which an LLM's answers end, as transformers takes them: `eos_token_id`, one or a list,
    of `generation_config.json`, or of `config.json` where that file is missing.

    Raises:
      InputError: not ids of the model's table.
    """
    files = [path / name for name in ("generation_config.json", "config.json")]
    file = next((x for x in files if x.is_file()), None)
    found = None if file is None else read_object(file).get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(i) is int and 0 <= i < vocab_size for i in ids):
        raise InputError(f"{file}: eos_token_id is {found!r:.80}, expected ids below {vocab_size}")
    return tuple(ids)


def adds_bos(tokenizer) -> bool:
    """Whether a text of this tokenizer begins with BOS: where its files say so."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


SPECIALS = {
    "encoder": ("<pad>", "</s>", "<unk>", "<extra_id_0>"), "decoder": ("<unk>", "<s>", "</s>"),
}


def train_tokenizer(role: str, texts: Iterable[str], vocab_size: int):
    """A tokenizer of at most `vocab_size` tokens with T5's or Llama's special tokens.

    Both are BPE (arXiv:1508.07909): the encoder's over the characters of words that carry their
    leading space, as in SentencePiece, the decoder's over bytes, so that it writes any script and
    falls apart where it was not trained.
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
    # No token for a space at the end, and none that spans a word and its punctuation.
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
