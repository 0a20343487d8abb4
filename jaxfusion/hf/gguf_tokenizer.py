"""The tokenizer in a GGUF file's metadata.

GGUF names the rules by which a text is cut into words (`tokenizer.ggml.pre`) but not the rules
themselves; those of the supported families are here. An unknown name is refused, since other rules
give other ids without any sign of it. transformers falls back to GPT-2's, and drops what the rules
imply: Qwen's Unicode normalization, Llama 3's whole words, and BOS if no field mentions it.
"""

from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from jaxfusion.errors import InputError, first_line
from jaxfusion.hf.gguf_config import Metadata
from jaxfusion.hf.sentencepiece_rules import SPACE, merges_by_score

# llama.h's kinds of tokens.
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
BYTE = 6
PROBES = ("Is this  a test? Yes: 12 ñ 中文 සිංහල", " one", "  two\nthree  ", "(un)known: 1,234.5",
          "You'll SEE it's fine\t\t\n\n  end", "ক\u09c7\u09be e\u0301 🙂")


@dataclass(frozen=True)
class Rules:
    """How a byte-level BPE tokenizer treats a text before its merges.

    Attributes:
      split: pattern of words; None: GPT-2's own.
      digits: every digit is a word.
      whole: a word in the vocabulary is one token, whatever the merges say.
      bos: texts begin with BOS unless the file says otherwise.
      nfc: texts are normalized to composed characters.
    """

    split: str | None = None
    digits: bool = False
    whole: bool = False
    bos: bool = False
    nfc: bool = False


_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = (rf"[\p{{{x}}}\p{{Lm}}\p{{Lo}}\p{{M}}]" for x in (r"Lu}\p{Lt", "Ll"))


def _uncased(numbers: str) -> str:
    return "|".join((_ENDINGS, r"[^\r\n\p{L}\p{N}]?\p{L}+", numbers,
                     r" ?[^\s\p{L}\p{N}]+[\r\n]*", _REST))


def _cased(numbers: str, endings: str) -> str:
    """Words end where a capital follows a small letter."""
    words = (f"{_UPPER}*{_LOWER}+", f"{_UPPER}+{_LOWER}*")
    return "|".join((*(rf"[^\r\n\p{{L}}\p{{N}}]?{x}{endings}" for x in words), numbers,
                     r" ?[^\s\p{L}\p{N}]+[\r\n/]*", _REST))


_LLAMA3 = Rules(_uncased(r"\p{N}{1,3}"), whole=True, bos=True)
RULES = {
    "llama-bpe": _LLAMA3, "llama3": _LLAMA3, "llama-v3": _LLAMA3,
    "qwen2": Rules(_uncased(r"\p{N}"), nfc=True),
    "smollm": Rules(digits=True),
    "tekken": Rules(_cased(r"\p{N}", ""), whole=True, bos=True),
    "gpt-2": Rules(),
    "gpt-4o": Rules(_cased(r"\p{N}{1,3}", f"{_ENDINGS}?")),
    "dbrx": Rules(_uncased(r"\p{N}{1,3}")),
}


def gguf_tokenizer(meta: Metadata, rows: int) -> tuple[Any, list[str]]:
    """The tokenizer of a GGUF file, and remarks on what the file does not say.

    Args:
      rows: of the model's table.

    Raises:
      InputError: no tokenizer, a kind or rules that are not known, fields that contradict each
        other, or ids that differ from SentencePiece's.
    """
    from transformers import PreTrainedTokenizerFast

    kind = meta.get("tokenizer.ggml.model", str, "none")
    if kind == "none" or not meta.get("tokenizer.ggml.tokens", list, []):
        raise InputError(f"{meta.file} has no tokenizer (tokenizer.ggml.model and .tokens)")
    tokens = _values_of(meta, "tokens", str)
    if kind not in ("gpt2", "llama"):
        raise InputError(f"{meta.file}: a tokenizer of kind {kind!r:.80} is not supported; known: "
                         "gpt2 (byte-level BPE), llama (SentencePiece)")
    types = _check_vocabulary(meta, tokens, rows)
    special = _special_ids(meta, kind, tokens)
    build = _byte_level if kind == "gpt2" else _sentencepiece
    backend, tokens, begins = build(meta, tokens, types)
    _add_tokens(backend, meta, tokens, types, special)
    named = {f"{name}_token": tokens[i] for name, i in special.items()}
    remarks = _set_template(backend, meta, named, special, begins)
    template = meta.get("tokenizer.chat_template", str, None)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **named, chat_template=template,
                                        clean_up_tokenization_spaces=False)
    _check(tokenizer, meta, kind, tokens, types)
    if others := [key for key in meta.fields if key.startswith("tokenizer.chat_template.")]:
        remarks.append(f"other chat templates are left out: {', '.join(sorted(others))}")
    return tokenizer, remarks


def end_tokens(meta: Metadata) -> list[int]:
    """The ids that end a text, a turn or a message, as far as the file names them."""
    ids = (meta.get(f"tokenizer.ggml.{name}_token_id", int, None) for name in ("eos", "eot", "eom"))
    return list(dict.fromkeys(i for i in ids if i is not None))


def _check_vocabulary(meta: Metadata, tokens: list[Any], rows: int) -> list[int]:
    """The types of the tokens."""
    types = _values_of(meta, "token_type", int, len(tokens))
    if wrong := [x for x in types if not 1 <= x <= BYTE]:
        raise InputError(f"{meta.file}: a token of type {wrong[0]}, expected 1 to {BYTE}")
    if len(tokens) > rows:
        raise InputError(f"{meta.file}: {len(tokens)} tokens, but the model's table has {rows} "
                         "rows")
    if len(set(tokens)) != len(tokens):
        twice = next(x for i, x in enumerate(tokens) if x in tokens[:i])
        raise InputError(f"{meta.file}: token {twice!r:.80} is there twice")
    return types


def _values_of(meta: Metadata, name: str, kind: type, length: int | None = None) -> list[Any]:
    """A list of the tokenizer's, checked for its length and the type of its values."""
    values = meta.get(f"tokenizer.ggml.{name}", list)
    if length not in (None, len(values)) or not all(type(x) is kind for x in values):
        raise InputError(f"{meta.file}: tokenizer.ggml.{name} has {len(values)} values, expected "
                         f"{'' if length is None else f'{length} of '}type {kind.__name__}")
    return values


def _special_ids(meta: Metadata, kind: str, tokens: list[str]) -> dict[str, int]:
    """The special tokens by transformers' name."""
    usual = {"bos": 1, "eos": 2, "unknown": 0} if kind == "llama" else {}  # as in llama.cpp
    special = {}
    for theirs, ours in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        i = meta.get(f"tokenizer.ggml.{theirs}_token_id", int, usual.get(theirs))
        if i is not None:
            special[ours] = i
    ids = [*special.values(), *end_tokens(meta)]
    if wrong := [i for i in ids if not 0 <= i < len(tokens)]:
        raise InputError(f"{meta.file}: special token {wrong[0]} is not one of {len(tokens)}")
    if "eos" not in special:
        raise InputError(f"{meta.file}: tokenizer.ggml.eos_token_id is missing")
    return special


def _byte_level(
    meta: Metadata, tokens: list[str], types: list[int]
) -> tuple[Tokenizer, list[str], bool]:
    """The backend of a byte-level BPE, its tokens, and whether its texts usually begin with BOS."""
    name = meta.get("tokenizer.ggml.pre", str, "default")
    if name not in RULES:
        raise InputError(f"{meta.file}: how its tokenizer cuts words ({name!r:.80}) is not known, "
                         f"so ids could differ from the model's; known: {', '.join(RULES)}. Use "
                         "the model's original checkpoint, or a newer GGUF file of it")
    rules = RULES[name]
    merges = [tuple(x.split(" ")) for x in _values_of(meta, "merges", str)]
    vocab = {token: i for i, token in enumerate(tokens)}
    try:
        backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=rules.whole))
    except Exception as error:  # tokenizers raises no class of its own
        raise InputError(f"{meta.file}: tokenizer.ggml.merges is damaged: {first_line(error)}"
                         ) from None
    if rules.nfc:
        backend.normalizer = normalizers.NFC()
    steps = [pre_tokenizers.Digits(individual_digits=True)] if rules.digits else []
    if rules.split is not None:
        steps.append(pre_tokenizers.Split(Regex(rules.split), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rules.split is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend, tokens, rules.bos


def _sentencepiece(
    meta: Metadata, tokens: list[str], types: list[int]
) -> tuple[Tokenizer, list[str], bool]:
    """As `_byte_level`, for a SentencePiece BPE model.

    Like SentencePiece and llama.cpp, it puts a space before a text even if the text begins with
    one. transformers does so only for Phi-3.
    """
    scores = _values_of(meta, "scores", float, len(tokens))
    # Converters write Gemma's runs of spaces as spaces.
    tokens = [SPACE * len(x) if len(x) > 1 and not x.strip(" ") else x for x in tokens]
    plain = {}
    for i, (token, score, kind) in enumerate(zip(tokens, scores, types, strict=True)):
        if kind not in (UNKNOWN, CONTROL, BYTE):
            # SentencePiece cuts off a user's tokens before anything else.
            plain[token] = float(len(tokens) - i) if kind == USER_DEFINED else float(score)
    unknown = meta.get("tokenizer.ggml.unknown_token_id", int, 0)
    backend = Tokenizer(models.BPE(
        {token: i for i, token in enumerate(tokens)}, merges_by_score(plain),
        unk_token=tokens[unknown], fuse_unk=True, byte_fallback=BYTE in types))
    prefix = meta.get("tokenizer.ggml.add_space_prefix", bool, True)
    backend.normalizer = normalizers.Sequence(
        [*[normalizers.Prepend(SPACE)] * prefix, normalizers.Replace(" ", SPACE)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
         *[decoders.Strip(" ", 1, 0)] * prefix])
    return backend, tokens, True


def _add_tokens(backend, meta: Metadata, tokens, types, special: dict[str, int]) -> None:
    """Lets the file's control and user-defined tokens be found whole in a text."""
    # Phi-3's own file lets these tokens take the white space behind them; GGUF has no field for it.
    strips = meta.architecture == "phi3" and meta.get("tokenizer.ggml.model", str) == "llama"
    keeps = ("<unk>", "<s>", "<|endoftext|>")
    for i, (token, kind) in enumerate(zip(tokens, types, strict=True)):
        control = kind == CONTROL or i in special.values()
        added = AddedToken(token, normalized=False, special=control,
                           rstrip=strips and token not in keeps)
        if control:
            backend.add_special_tokens([added])
        elif kind == USER_DEFINED and token.strip(SPACE):
            backend.add_tokens([added])


def _set_template(backend, meta: Metadata, named, special, begins: bool) -> list[str]:
    """Puts BOS and the end token around texts; returns remarks."""
    said = meta.get("tokenizer.ggml.add_bos_token", bool, None)
    begins = (begins if said is None else said) and "bos" in special
    ends = meta.get("tokenizer.ggml.add_eos_token", bool, False)
    around = [name for name, is_used in (("bos", begins), ("eos", ends)) if is_used]
    text = " ".join(["$A" if x is None else named[f"{x}_token"] for x in
                     [*["bos"] * begins, None, *["eos"] * ends]])
    backend.post_processor = TemplateProcessing(
        single=text, special_tokens=[(named[f"{x}_token"], special[x]) for x in around])
    if said is None:
        does = "begin" if begins else "do not begin"
        return [f"the file does not say whether texts begin with BOS: they {does} with it, as in "
                "llama.cpp"]
    if meta.architecture.startswith("gemma") and not begins:
        return ["texts do not begin with BOS, as the file says, but Gemma expects it"]
    return []


def _check(tokenizer, meta: Metadata, kind: str, tokens: list[str], types: list[int]) -> None:
    """Compares the tokenizer with the file.

    Raises:
      InputError: they differ.
    """
    backend = tokenizer.backend_tokenizer
    wrong = [i for i, token in enumerate(tokens) if backend.token_to_id(token) != i]
    if wrong or backend.get_vocab_size() != len(tokens):
        at = wrong[0] if wrong else len(tokens) - 1
        raise InputError(f"{meta.file}: token {tokens[at]!r:.80} has id {at} in the file, but "
                         f"{backend.token_to_id(tokens[at])} in the tokenizer made of it")
    for i, (token, type_) in enumerate(zip(tokens, types, strict=True)):
        if type_ == CONTROL and backend.encode(token, add_special_tokens=False).ids != [i]:
            raise InputError(f"{meta.file}: control token {token!r:.80} is not found in texts")
    expected = _spell(meta, tokens, types) if kind == "llama" else None
    for text in PROBES:
        ids = backend.encode(text, add_special_tokens=False).ids
        if expected is not None and ids != (theirs := expected(text)):
            raise InputError(f"{meta.file}: tokenizers and SentencePiece differ on it: {text!r} "
                             f"gives {ids}, expected {theirs}")
        if expected is None and backend.decode(ids, skip_special_tokens=False) != (
                backend.normalizer.normalize_str(text) if backend.normalizer else text):
            raise InputError(f"{meta.file}: the text {text!r} is lost in its tokenizer, which is "
                             "damaged")


def _spell(meta: Metadata, tokens: list[str], types: list[int]):
    """What SentencePiece makes of a text with the file's vocabulary."""
    from sentencepiece import SentencePieceProcessor
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    proto, scores = ModelProto(), meta.get("tokenizer.ggml.scores", list)
    for token, score, kind in zip(tokens, scores, types, strict=True):
        proto.pieces.add(piece=token, score=score, type=kind)
    proto.trainer_spec.model_type = proto.trainer_spec.ModelType.BPE
    proto.trainer_spec.byte_fallback = BYTE in types
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = meta.get("tokenizer.ggml.add_space_prefix", bool, True)
    proto.normalizer_spec.remove_extra_whitespaces = False
    try:
        return SentencePieceProcessor(model_proto=proto.SerializeToString()).encode
    except (RuntimeError, ValueError, TypeError) as error:
        raise InputError(f"{meta.file}: its vocabulary is not SentencePiece's: {first_line(error)}"
                         ) from None
