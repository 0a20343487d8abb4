"""The two tokenizers of a bridge, and the check that each belongs to its model."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from jaxfusion.errors import InputError, first_line

# A tokenizer of a model covers its embedding table up to the padding of the table's size.
LEAST_COVERAGE = 0.9
# What LangBridge's authors add to the encoder's tokenizer; their order decides the ids.
LANGBRIDGE_WHITESPACE = ("\t", "\n", "\r", "\x0b", "\x0c", "  ", "   ", "    ")


@dataclass(frozen=True)
class Tokenizers:
    """A bridge's tokenizers: anything with transformers' tokenizer interface."""

    encoder: object
    decoder: object

    @property
    def bos(self) -> list[int]:
        """The decoder's first token, if it has one."""
        return [] if self.decoder.bos_token_id is None else [self.decoder.bos_token_id]

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

    def encode_answers(self, prompts: list[str], answers: list[str]) -> list[list[int]]:
        """Decoder ids of answers as they continue their prompts.

        A BPE token may span a space: prompt and answer are encoded together, trailing spaces of
        the prompt going to the answer, and what follows the prompt's own ids is the answer
        (as EleutherAI's lm-evaluation-harness does).
        """
        contexts = [prompt.rstrip() for prompt in prompts]
        wholes = [
            prompt + answer for prompt, answer in zip(prompts, answers, strict=True)
        ]
        return [
            whole[len(context):]
            for context, whole in zip(
                self.encode_texts(contexts), self.encode_texts(wholes), strict=True
            )
        ]


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
    if added_tokens:
        tokenizer.add_tokens(list(added_tokens))
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
