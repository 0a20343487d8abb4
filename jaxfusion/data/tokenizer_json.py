"""Reads a `tokenizer.json` as it is; transformers drops settings when it rebuilds one."""

import json
import logging
from pathlib import Path
from typing import Any

from jaxfusion.errors import InputError
from jaxfusion.files import read_object

logger = logging.getLogger(__name__)


def read_tokenizer_json(path: Path, role: str, vocab_size: int):
    """A `tokenizer.json` unchanged, with the special tokens and the chat template next to it.

    An added token beyond the model's table (Gemma 3's `<image_soft_token>`) is dropped: no text
    needs it, and the model has no row for it.
    """
    from transformers import PreTrainedTokenizerFast

    from jaxfusion.data.sentencepiece_backend import read_processor
    from jaxfusion.hf.tokenization_jaxfusion import NORMALIZER, SentencePieceTokenizer

    backend, dropped = _read_backend(path / "tokenizer.json", vocab_size)
    file = path / "tokenizer_config.json"
    config = read_object(file) if file.is_file() else {}
    if (model := config.get(NORMALIZER)) is not None:
        if not isinstance(model, str) or not model or Path(model).name != model:
            raise InputError(f"{file}: {NORMALIZER} is {model!r:.80}, expected the name of a file "
                             "in the same directory")
        tokenizer = SentencePieceTokenizer.from_pretrained(path)
        tokenizer.spm = read_processor(path / model)
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    _add_configured(backend, config, file, vocab_size)
    _set_bos(backend, tokenizer, config.get("add_bos_token"), file, role)
    tokenizer._tokenizer = backend  # transformers may have changed its own copy
    _check_special(tokenizer, dropped, path, vocab_size)
    return tokenizer


def _read_backend(source: Path, vocab_size: int) -> tuple[Any, list[str]]:
    """The backend of a `tokenizer.json`, and its added tokens beyond the model's table, which are
    dropped."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(source))
    beyond = [token.content for i, token in backend.get_added_tokens_decoder().items()
              if i >= vocab_size]
    if beyond:
        content = read_object(source)
        content["added_tokens"] = [x for x in content["added_tokens"]
                                   if x["content"] not in beyond]
        backend = Tokenizer.from_str(json.dumps(content))
    return backend, beyond


def _add_configured(backend, config: dict[str, Any], file: Path, vocab_size: int) -> None:
    """Adds the tokens that only `tokenizer_config.json` names, with their ids."""
    for token_id, token in sorted(_configured(config).items()):
        if backend.token_to_id(token.content) is None and token_id < vocab_size:
            backend.add_tokens([token])
            if backend.token_to_id(token.content) != token_id:
                raise InputError(f"{file}: token {token.content!r:.80} has id {token_id} there, "
                                 f"but got id {backend.token_to_id(token.content)}; add it to "
                                 "tokenizer.json")


def _set_bos(backend, tokenizer, begins: Any, file: Path, role: str) -> None:
    """Lets `add_bos_token` override an LLM's `tokenizer.json`, as in transformers."""
    from tokenizers.processors import TemplateProcessing

    if begins is not None and not isinstance(begins, bool):
        raise InputError(f"{file}: add_bos_token is {begins!r:.80}, expected true or false")
    if role == "decoder" and begins is not None and tokenizer.bos_token is not None:
        bos, i = tokenizer.bos_token, tokenizer.bos_token_id
        backend.post_processor = TemplateProcessing(
            single=f"{bos} $A" if begins else "$A", special_tokens=[(bos, i)] if begins else [])


def _check_special(tokenizer, dropped: list[str], path: Path, vocab_size: int) -> None:
    """Raises InputError if a token that is needed was dropped, or is not in `tokenizer.json`."""
    needed = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token}
    template = str(tokenizer.chat_template or "")
    if missing := [x for x in dropped if x in needed or x in template]:
        raise InputError(f"the tokenizer in {path} does not belong to the model: its token "
                         f"{missing[0]!r} is beyond the model's table of {vocab_size} rows")
    for name in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = getattr(tokenizer, name)
        if token is not None and tokenizer.backend_tokenizer.token_to_id(token) is None:
            raise InputError(f"{path}: {name} {token!r:.80} is missing from tokenizer.json; one of "
                             "the two files is from another model")
    if dropped:
        logger.warning("%s: tokens beyond the model's table of %d rows are dropped: %s", path,
                       vocab_size, ", ".join(dropped))


def _configured(config: dict[str, Any]) -> dict[int, Any]:
    """Added tokens of a `tokenizer_config.json`, by id."""
    from tokenizers import AddedToken

    return {int(i): AddedToken(**{name: x for name, x in token.items() if name != "__type"})
            for i, token in config.get("added_tokens_decoder", {}).items()}
