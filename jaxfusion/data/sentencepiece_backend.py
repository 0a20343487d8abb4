"""Builds a `tokenizers` backend from a bare SentencePiece model.

Without a `tokenizer.json`, transformers guesses: it orders the merges of a BPE model by id instead
of by score, drops the space before the first word, and assumes T5's ids of special tokens. The
backend here is built from the model file and compared with SentencePiece.
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from jaxfusion.errors import InputError, first_line
from jaxfusion.files import read_object
from jaxfusion.hf.sentencepiece_rules import SPACE, merges_by_score
from jaxfusion.hf.tokenization_jaxfusion import SentencePieceTokenizer

XLM_R = "sentencepiece.bpe.model"  # fairseq's file name, and its own ids of special tokens
FILES = ("tokenizer.model", "spiece.model", XLM_R)
FAIRSEQ = ("<s>", "<pad>", "</s>", "<unk>")  # ids 0 to 3; a piece's id is SentencePiece's plus 1
PROBES = ("Is this  a test? Yes: 12 ñ 中文 සිංහල", " one", "  two\nthree  ", "(un)known: 1,234.5",
          "Ａ① ﬁne e\u0301", "\x85one\x85",
          "ক\u09c7\u09be \u1112\u1161\u11ab ක\u0dd9\u0dcf \u06cc\u0654\u064e")


def find_model(path: Path) -> Path | None:
    """The SentencePiece model of a checkpoint directory; None for M2M100's, whose ids come from a
    vocabulary next to it."""
    if (path / XLM_R).is_file() and (path / "vocab.json").is_file():
        return None
    return next((path / name for name in FILES if (path / name).is_file()), None)


def read_processor(file: Path):
    """The model, as SentencePiece reads it.

    Raises:
      InputError: not a SentencePiece model.
    """
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as error:
        raise InputError(f"{file} is not a SentencePiece model ({first_line(error)}); put the "
                         "model's own tokenizer.json next to it") from None


def read_sentencepiece(file: Path, role: str, vocab_size: int) -> SentencePieceTokenizer:
    """The tokenizer of a directory with a SentencePiece model and no `tokenizer.json`.

    Special tokens come from the files next to the model, or from the model itself. An encoder's
    text ends with its end token, as T5's does, and XLM-R's begins with BOS, too. An LLM's begins
    with BOS, as Llama's does, unless `tokenizer_config.json` sets `add_bos_token` to false.

    Args:
      role: 'encoder' or 'decoder'. vocab_size: rows of the model's embedding table.

    Raises:
      InputError: not a SentencePiece model, or ids that differ from SentencePiece's.
    """
    from sentencepiece import sentencepiece_model_pb2

    spm, config = read_processor(file), _config(file.parent)
    proto = sentencepiece_model_pb2.ModelProto.FromString(spm.serialized_model_proto())
    fairseq, special = file.name == XLM_R, _special_tokens(spm, config)
    backend = _make_backend(spm, proto, fairseq)
    if fairseq:
        special |= {"pad_token": "<pad>", "mask_token": "<mask>"}
    backend.add_special_tokens([AddedToken(x, normalized=False) for x in special.values()])
    _add_tokens(backend, spm, config, file.parent, role, vocab_size)
    backend.post_processor = _template(backend, special, config, role == "decoder" or fairseq,
                                       role == "encoder")
    chat = file.with_name("chat_template.jinja")
    normalizes = bool(proto.normalizer_spec.precompiled_charsmap)
    kind = SentencePieceTokenizer if normalizes else PreTrainedTokenizerFast
    tokenizer = kind(
        tokenizer_object=backend, **special, clean_up_tokenization_spaces=False,
        chat_template=chat.read_text("utf-8") if chat.is_file() else config.get("chat_template"))
    if normalizes:
        tokenizer.spm = spm
    for text in PROBES + _symbols(proto):
        ids, expected = tokenizer(text, add_special_tokens=False)["input_ids"], spm.encode(text)
        if fairseq:
            expected = [FAIRSEQ.index("<unk>") if i == spm.unk_id() else i + 1 for i in expected]
        if ids != expected:
            raise InputError(f"tokenizers and SentencePiece differ on {file}: {text!r} gives "
                             f"{ids}, expected {expected}; put the model's own tokenizer.json next "
                             "to it")
    return tokenizer


def _config(path: Path) -> dict[str, Any]:
    """The settings in the files next to the model; `tokenizer_config.json` takes precedence."""
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (path / name).is_file():
            config |= {key: x for key, x in read_object(path / name).items() if x is not None}
    return config


def _special_tokens(spm, config: dict[str, Any]) -> dict[str, str]:
    """The special tokens by name; the model's own where none is configured."""
    own = {"unk_token": spm.unk_id(), "bos_token": spm.bos_id(), "eos_token": spm.eos_id(),
           "pad_token": spm.pad_id()}
    special = {name: spm.id_to_piece(i) for name, i in own.items() if i >= 0}
    for name in special | {"pad_token": ""}:
        if name in config:
            special[name] = _content(config[name])
    return special


def _content(token: str | dict[str, Any]) -> str:
    return token["content"] if isinstance(token, dict) else str(token)


def _add_tokens(backend, spm, config, path: Path, role: str, vocab_size: int) -> None:
    """Adds tokens after the model's pieces: those of the files, and T5's sentinels if they fit."""
    extra = {int(i): token for i, token in config.get("added_tokens_decoder", {}).items()}
    if not extra and (path / "added_tokens.json").is_file():
        extra = {i: token for token, i in read_object(path / "added_tokens.json").items()}
    for i, token in sorted(extra.items()):
        fields = {key: x for key, x in token.items() if key not in ("content", "__type")
                  } if isinstance(token, dict) else {"normalized": False}
        backend.add_tokens([AddedToken(_content(token), **fields)])
        if backend.token_to_id(_content(token)) != i:
            raise InputError(f"{path}: token {_content(token)!r} has id {i} in its files, but got "
                             f"id {backend.token_to_id(_content(token))}; put the model's own "
                             "tokenizer.json next to it")
    if path.joinpath(XLM_R).is_file():
        return
    sentinels = config.get("extra_ids", 100)
    has_some = any(backend.token_to_id(f"{start}<extra_id_0>") is not None for start in ("", SPACE))
    if role == "encoder" and not has_some and len(spm) + sentinels <= vocab_size:
        backend.add_special_tokens([f"<extra_id_{i}>" for i in reversed(range(sentinels))])


def _template(backend, special: dict[str, str], config: dict[str, Any], begins: bool, ends: bool):
    """The template with the special tokens around a text.

    Args:
      begins, ends: whether there are such tokens, unless the config says otherwise.
    """
    parts = ["$A"]
    if config.get("add_bos_token", begins) and "bos_token" in special:
        parts.insert(0, special["bos_token"])
    if config.get("add_eos_token", ends) and "eos_token" in special:
        parts.append(special["eos_token"])
    return TemplateProcessing(single=" ".join(parts), special_tokens=[
        (x, backend.token_to_id(x)) for x in parts if x != "$A"])


def _make_backend(spm, proto, fairseq: bool) -> Tokenizer:
    """The backend of a model, without special tokens; with fairseq's ids of them if asked.

    Raises:
      InputError: a model type that `tokenizers` does not support.
    """
    kinds = proto.trainer_spec.ModelType
    falls_back = any(spm.is_byte(i) for i in range(len(spm)))
    match proto.trainer_spec.model_type:
        case kinds.UNIGRAM:
            pieces = [(piece.piece, piece.score) for piece in proto.pieces]
            if fairseq:  # in SentencePiece: <unk>, <s>, </s>, then the pieces
                pieces = [*((token, 0.0) for token in FAIRSEQ), *pieces[3:]]
            unknown = FAIRSEQ.index("<unk>") if fairseq else spm.unk_id()
            backend = Tokenizer(models.Unigram(pieces, unknown, falls_back))
        case kinds.BPE if not fairseq:
            backend = Tokenizer(_bpe(spm, falls_back))
        case other:
            raise InputError(f"a SentencePiece model of type {kinds.Name(other)} is not supported, "
                             "only UNIGRAM and BPE; put the model's own tokenizer.json next to it")
    rules, steps, tail = proto.normalizer_spec, [], []
    if rules.precompiled_charsmap:
        steps = [normalizers.Precompiled(rules.precompiled_charsmap)]
    if rules.remove_extra_whitespaces:
        # Spaces only: `Strip` would remove other white space, too.
        steps += [normalizers.Replace(Regex("^ +| +$"), ""),
                  normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        tail = [decoders.Strip(" ", 1, 0)]
    if isinstance(backend.model, models.BPE):  # its pieces may span words
        steps += [normalizers.Prepend(SPACE)] * rules.add_dummy_prefix
        steps += [normalizers.Replace(" ", SPACE)]
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(
            SPACE, "always" if rules.add_dummy_prefix else "never")
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *tail])
    return backend


def _bpe(spm, falls_back: bool) -> models.BPE:
    """The BPE model with its merges ordered by score, as in SentencePiece."""
    plain = [i for i in range(len(spm))
             if not (spm.is_control(i) or spm.is_unknown(i) or spm.is_byte(i))]
    vocab = {spm.id_to_piece(i): i for i in range(len(spm))}
    merges = merges_by_score({spm.id_to_piece(i): spm.get_score(i) for i in plain})
    return models.BPE(vocab, merges, unk_token=spm.id_to_piece(spm.unk_id()),
                      fuse_unk=True, byte_fallback=falls_back)


def _symbols(proto) -> tuple[str, ...]:
    """Probe texts with user-defined symbols, which the model splits off before anything else."""
    if proto.trainer_spec.model_type != proto.trainer_spec.ModelType.BPE:
        return ()
    pieces = [x.piece.replace(SPACE, " ") for x in proto.pieces if x.type == x.USER_DEFINED]
    return tuple(text for x in pieces[:64] for text in (f"{x}one", f"one{x}{x}two", f"a {x} b"))
