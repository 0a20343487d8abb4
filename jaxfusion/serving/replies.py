"""Answers in the shapes of OpenAI's API."""

import re
from collections.abc import Sequence
from typing import Any

from jaxfusion.data.tokenizers import Tokenizers
from jaxfusion.errors import InputError
from jaxfusion.serving.answers import BROKEN, Part
from jaxfusion.serving.engine import Token

Json = dict[str, Any]
# The characters by which byte-level tokenizers name bytes, after GPT-2.
PRINTED = (*range(33, 127), *range(161, 173), *range(174, 256))
BYTES = {chr(byte): byte for byte in PRINTED} | {
    chr(256 + n): byte for n, byte in enumerate(x for x in range(256) if x not in PRINTED)}


def error_body(message: str, kind: str = "invalid_request_error", param: str | None = None,
               code: str | None = None) -> Json:
    """An error in OpenAI's shape, its message in one line."""
    message = str(InputError(message))
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def usage(prompt: int, answer: int) -> Json:
    """How many tokens a request read and wrote."""
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def joined(parts: Sequence[Part]) -> Part:
    """The parts of one answer as one."""
    return Part("".join(part.text for part in parts),
                tuple(token for part in parts for token in part.tokens),
                tuple(token for part in parts for token in part.prompt), parts[-1].finish)


def completion_choice(
    index: int, part: Part, tokenizers: Tokenizers, top: int | None, offset: int = 0
) -> Json:
    """A choice of `/v1/completions`, whole or a piece of a stream.

    Args:
      top: how many of the likeliest tokens are shown; None: no log-probabilities.
      offset: of the piece in the answer, in characters.
    """
    text = part.text
    if part.prompt:
        ids = [token.id for token in part.prompt]
        text = tokenizers.decoder.decode(ids, skip_special_tokens=True) + text
    return {"index": index, "text": text, "finish_reason": part.finish,
            "logprobs": None if top is None else _completion_chances(
                (*part.prompt, *part.tokens), tokenizers, top, offset)}


def _completion_chances(
    tokens: Sequence[Token], tokenizers: Tokenizers, top: int, offset: int
) -> Json:
    names, offsets, likeliest = [], [], []
    for token in tokens:
        names.append(token_name(tokenizers, token.id))
        offsets.append(offset)
        # The text has no special tokens.
        offset += 0 if token.id in tokenizers.decoder.all_special_ids else len(names[-1])
        # A chosen token that is not among the likeliest is shown besides, as OpenAI does. Of two
        # tokens with one name the likelier counts.
        shown = {}
        for i, chance in (*token.top[:top], (token.id, token.chance)):
            shown.setdefault(token_name(tokenizers, i), chance)
        likeliest.append(None if token.chance is None else shown)
    return {"tokens": names, "token_logprobs": [token.chance for token in tokens],
            "top_logprobs": likeliest, "text_offset": offsets}


def chat_choice(part: Part, tokenizers: Tokenizers, top: int | None, whole: bool,
                first: bool = False) -> Json:
    """The choice of `/v1/chat/completions`, whole or a piece of a stream.

    Args:
      first: whether the piece begins the stream, and names the role.
    """
    chances = None if top is None else {"content": [
        {**_chat_token(tokenizers, token.id, token.chance),
         "top_logprobs": [_chat_token(tokenizers, *x) for x in token.top[:top]]}
        for token in part.tokens], "refusal": None}
    words = {"content": part.text}
    if whole or first:
        words = {"role": "assistant", **words}
    return {"index": 0, "message" if whole else "delta": words, "logprobs": chances,
            "finish_reason": part.finish}


def _chat_token(tokenizers: Tokenizers, i: int, chance: float) -> Json:
    name = token_name(tokenizers, i)
    return {"token": name, "logprob": chance, "bytes": _bytes(tokenizers, i, name)}


def _bytes(tokenizers: Tokenizers, i: int, name: str) -> list[int] | None:
    """A token's bytes; clients join those of a character that takes several tokens. None where the
    tokenizer does not tell the bytes of such a part."""
    if BROKEN not in tokenizers.decoder.decode([i]):
        return list(name.encode())
    if alone := re.fullmatch("<0x([0-9A-F]{2})>", name):  # SentencePiece's
        return [int(alone[1], 16)]
    return [BYTES[x] for x in name] if all(x in BYTES for x in name) else None


def token_name(tokenizers: Tokenizers, i: int) -> str:
    """A token as text, with the space that it begins with; a part of a character by the
    tokenizer's own name for it, which no other token has."""
    text = tokenizers.decoder.decode([i])
    own = tokenizers.decoder.convert_ids_to_tokens(i)
    if own is None or (BROKEN not in text and text):
        starts = own is not None and own.startswith("▁") and not text.startswith(" ")
        return f" {text}" if starts else text
    return own
