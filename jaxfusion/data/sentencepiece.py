"""Bare SentencePiece models: transformers' tokenizer of one, made to give SentencePiece's ids.

transformers 5 guesses at what a model file without `tokenizer.json` says: it orders the merges of a
BPE model by id and not by score, leaves out the space before the first word, and takes T5's places
of special tokens for granted.
"""

from pathlib import Path

from jaxfusion.errors import InputError, first_line

FILES = ("tokenizer.model", "spiece.model")
PROBES = ("Is this  a test? Yes: 12 ñ 中文 සිංහල", " one", "  two\nthree  ", "(un)known: 1,234.5",
          "Ａ① ﬁne e\u0301")


def mend(tokenizer, path: Path) -> None:
    """Gives a tokenizer that was read from a bare SentencePiece model the model's own pieces.

    Raises:
      InputError: its ids still differ from SentencePiece's.
    """
    file = next((path / name for name in FILES if (path / name).is_file()), None)
    if file is None or (path / "tokenizer.json").is_file() or not tokenizer.is_fast:
        return
    from sentencepiece import SentencePieceProcessor
    from tokenizers import models

    try:
        spm = SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as error:
        raise InputError(f"{file} is no SentencePiece model ({first_line(error)}); put the "
                         "model's own tokenizer.json beside it") from None
    backend, probes = tokenizer.backend_tokenizer, PROBES
    if isinstance(backend.model, models.BPE):
        _mend_bpe(spm, backend)
        probes += _symbols(spm)
    elif isinstance(backend.model, models.Unigram):
        pieces = [(spm.id_to_piece(i), spm.get_score(i)) for i in range(len(spm))]
        backend.model = models.Unigram(pieces, spm.unk_id(), _falls_back(spm))
    for text in probes:
        found, wanted = tokenizer(text, add_special_tokens=False)["input_ids"], spm.encode(text)
        if found != wanted:
            raise InputError(f"transformers reads {file} otherwise than SentencePiece does: "
                             f"{text!r} gives {found}, wanted {wanted}; put the model's own "
                             "tokenizer.json beside it")


def _mend_bpe(spm, backend) -> None:
    from tokenizers import decoders, models, normalizers

    plain = [i for i in range(len(spm))
             if not (spm.is_control(i) or spm.is_unknown(i) or spm.is_byte(i))]
    vocab = {spm.id_to_piece(i): i for i in range(len(spm))}
    known = {spm.id_to_piece(i): spm.get_score(i) for i in plain}
    merges = [
        (-score, cut, piece[:cut], piece[cut:])
        for piece, score in known.items() for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]
    backend.model = models.BPE(
        vocab, [(left, right) for _, _, left, right in sorted(merges)],
        unk_token=spm.id_to_piece(spm.unk_id()), fuse_unk=True, byte_fallback=_falls_back(spm),
    )
    spaces = [normalizers.Replace(" ", "▁")]
    tail = []
    if spm.encode("a", out_type=str)[0].startswith("▁"):  # a space before the first word
        spaces.insert(0, normalizers.Prepend("▁"))
        tail = [decoders.Strip(" ", 1, 0)]
    backend.normalizer, backend.pre_tokenizer = normalizers.Sequence(spaces), None
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *tail])


def _symbols(spm) -> tuple[str, ...]:
    """Texts with symbols that the model's makers defined, which it cuts out before all else."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(spm.serialized_model_proto())
    pieces = [x.piece.replace("▁", " ") for x in proto.pieces if x.type == x.USER_DEFINED]
    return tuple(text for x in pieces[:64] for text in (f"{x}one", f"one{x}{x}two", f"a {x} b"))


def _falls_back(spm) -> bool:
    """Whether unknown characters become bytes."""
    return any(spm.is_byte(i) for i in range(len(spm)))
