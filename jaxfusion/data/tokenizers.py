"""The two tokenizers of a bridge, and the check that each belongs to its model."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from jaxfusion.data.sentencepiece import mend
from jaxfusion.errors import InputError, first_line

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
    """

    encoder: object
    decoder: object
    turn: Turn | None = None

    @cached_property
    def start(self) -> list[int]:
        """What every decoder row starts with: the header of a chat, or BOS if there is one."""
        if self.turn is not None:
            return self.encode_texts([self._header])[0]
        return [] if self.decoder.bos_token_id is None else [self.decoder.bos_token_id]

    @property
    def _header(self) -> str:
        # Without its last space, which SentencePiece takes as part of the user's first word.
        return self.turn.before.rstrip(" ")

    @property
    def eos(self) -> int:
        """What ends an answer."""
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
        taken (as EleutherAI's lm-evaluation-harness does).
        """
        return [
            whole[len(context):]
            for context, whole in zip(
                self.encode_texts(contexts), self.encode_texts(wholes), strict=True
            )
        ]


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
        raise InputError(f"the decoder's chat template gives {asked!r} for {WORDS!r} and "
                         f"{answered!r} with an answer: wanted the words as they are, once; set "
                         "data.chat_template=False")
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
    """The tokenizer of a checkpoint directory, through transformers; no remote code.

    Args:
      path: the directory. vocab_size: rows of the model's embedding table.
      role: 'encoder' or 'decoder', for messages.
      added_tokens: text pieces to add as tokens; they take the table's unused last rows.

    Raises:
      InputError: no tokenizer there, none with an end token, or one of another model.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        raise InputError(
            f"{path} has no {role} tokenizer that can be read (tokenizer.json or a SentencePiece "
            f"model): {first_line(error)}"
        ) from None
    mend(tokenizer, path)
    if added_tokens:
        # As special ones: others are normalized, and mT5's makes every whitespace a space.
        tokenizer.add_tokens(list(added_tokens), special_tokens=True)
    ids = tokenizer.get_vocab().values()
    if max(ids) >= vocab_size or len(ids) < LEAST_COVERAGE * vocab_size:
        raise InputError(
            f"the tokenizer in {path} does not belong to the {role}: it has {len(ids)} tokens "
            f"(highest id {max(ids)}), the model's table {vocab_size} rows"
        )
    if tokenizer.eos_token_id is None:
        raise InputError(f"the {role} tokenizer in {path} has no end token (eos_token)")
    return tokenizer


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
