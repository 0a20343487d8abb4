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
class Tokenizers:
    """A bridge's tokenizers: anything with transformers' tokenizer interface.

    Attributes:
      turn: of a chat, the text before the user's words and the one up to the assistant's.
    """

    encoder: object
    decoder: object
    turn: tuple[str, str] = ("", "")

    @cached_property
    def start(self) -> list[int]:
        """What every decoder row starts with: BOS, if there is one, and the header of a chat."""
        bos = [] if self.decoder.bos_token_id is None else [self.decoder.bos_token_id]
        header = self.turn[0].rstrip(" ")
        return bos + self.encode_texts([header])[0] if header else bos

    @property
    def eos(self) -> int:
        """What ends an answer."""
        return self.decoder.eos_token_id

    def encode_queries(self, texts: list[str]) -> list[list[int]]:
        """Encoder ids, with the encoder's own special tokens (mT5: `</s>` at the end)."""
        return self.encoder(texts)["input_ids"] if texts else []

    def encode_texts(self, texts: list[str]) -> list[list[int]]:
        """Decoder ids, without special tokens: where BOS and EOS go is the bridge's business."""
        return self.decoder(texts, add_special_tokens=False)["input_ids"] if texts else []

    def encode_prompts(self, prompts: list[str]) -> list[list[int]]:
        """Decoder ids of what stands between the prefix and the answer."""
        return self.encode_texts([self.asked(prompt) for prompt in prompts])

    def encode_bare(self, prompts: list[str]) -> list[list[int]]:
        """Decoder ids of prompts that follow `start` without a prefix."""
        header = self.turn[0].rstrip(" ")
        wholes = [self.turn[0] + self.asked(prompt) for prompt in prompts]
        return self._continue([header] * len(wholes), wholes)

    def encode_answers(self, prompts: list[str], answers: list[str]) -> list[list[int]]:
        """Decoder ids of answers as they continue their prompts; trailing spaces of a prompt go to
        its answer."""
        contexts = [self.asked(prompt) for prompt in prompts]
        wholes = [
            context + ("" if self.turn[1] else prompt[len(prompt.rstrip()) :]) + answer
            for context, prompt, answer in zip(contexts, prompts, answers, strict=True)
        ]
        return self._continue(contexts, wholes)

    def asked(self, prompt: str) -> str:
        """The prompt up to where the answer starts."""
        return prompt.strip() + self.turn[1] if self.turn[1] else prompt.rstrip()

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


def chat_turn(tokenizer) -> tuple[str, str]:
    """The texts round the user's words in a tokenizer's chat template, without BOS.

    Raises:
      InputError: it has no template, or one that does not take the user's words as they are.
    """
    words = "the user's words"
    if not tokenizer.chat_template:
        raise InputError("the decoder's tokenizer has no chat template; set "
                         "data.chat_template=False, or take an LLM tuned on chats")
    # Llama 3's template writes today's date, and Qwen 3's an empty thought, unless told not to.
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": words}], tokenize=False, add_generation_prompt=True,
        date_string="26 Jul 2024", enable_thinking=False,
    )
    before, found, after = text.partition(words)
    if not found or not after or words in after:
        raise InputError(f"the decoder's chat template gives {text!r} for {words!r}: wanted it "
                         "once, with the assistant's header behind; set data.chat_template=False")
    return before.removeprefix(tokenizer.bos_token or ""), after


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
