"""What a run was trained on: its models and rows, and whether they are still what is there now."""

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxfusion.errors import InputError
from jaxfusion.files import read_json
from jaxfusion.hf.load import open_tensors

ORIGIN = "model.json"
PROBE_FILE = "probe.safetensors"  # of a Lens run, in the directory above its runs
# What is compared, with what a different one is called; `bridge` is what was trained of a bridge
# whose LLM Lens moves.
PARTS = {
    "encoder": "another encoder", "encoder_tokenizer": "another tokenizer of the encoder",
    "decoder": "another LLM", "decoder_tokenizer": "another tokenizer of the LLM",
    "bridge": "another bridge", "rows": "other rows",
}
SAMPLE = 64  # bytes from the middle row of every tensor
EVERY = 97  # ids from one token that is looked at to the next
# Ids of these texts tell what a tokenizer normalises and splits.
TEXTS = ("The quick brown fox: 3.14 (a+b)!", " two  spaces\n\tand lines\n", "සිංහල භාෂාව", "தமிழ்",
         "Kiswahili ng'ombe", "বাংলা ভাষা", "हिन्दी", "اللغة العربية", "中文 日本語 한국어", "ﬁne é 🙂")
logger = logging.getLogger(__name__)


def origin_of(towers: Mapping[str, tuple[Path, Any]], source: str) -> dict[str, str]:
    """Digests by the names of `PARTS`.

    Args:
      towers: directory and tokenizer by role. source: their name in messages.
    """
    digests = {"source": source}
    for role, (path, tokenizer) in towers.items():
        digests |= {role: digest(path), f"{role}_tokenizer": digest_tokenizer(tokenizer)}
    return digests


def digest(path: Path) -> str:
    """A digest of every tensor's name, shape and, of floats, some bytes; the rest is not read."""
    hasher, tensors = hashlib.sha256(), open_tensors(path)
    rows = tensors.middle_rows()
    for name, shape in sorted(tensors.shapes().items()):
        sample = rows[name].tobytes()[:SAMPLE] if name in rows else b""
        hasher.update(f"{name} {shape}".encode() + sample)
    return hasher.hexdigest()


def digest_tokenizer(tokenizer) -> str:
    """A digest of a tokenizer's ids of some texts, some of its tokens, its two ends, and its chat
    template: of what it does, which no release of a library writes in another way."""
    ids = tokenizer(list(TEXTS))["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(list(range(0, len(tokenizer), EVERY)))
    ends = [tokenizer.bos_token_id, tokenizer.eos_token_id]  # answers end there in training
    return digest_of([len(tokenizer), ids, tokens, ends, tokenizer.chat_template])


def digest_trained(trained: Iterable[tuple[str, np.ndarray]]) -> str:
    """A digest of all bytes of parameters, which are read one at a time."""
    hasher = hashlib.sha256()
    for name, x in trained:
        hasher.update(name.encode() + x.tobytes())
    return hasher.hexdigest()


def digest_rows(rows: Sequence[tuple[str, ...]]) -> str:
    """A digest of rows in their order."""
    hasher = hashlib.sha256()
    for row in rows:
        hasher.update(json.dumps(row, ensure_ascii=False).encode(errors="surrogatepass"))
    return hasher.hexdigest()


def digest_of(content: Any) -> str:
    """A digest of what can be written as JSON."""
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()


def different(was: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The parts that two origins have in another form; what one of them lacks is left out."""
    return [part for part in PARTS if was.get(part, now.get(part)) != now.get(part, was.get(part))]


def is_known(was: Mapping[str, str], now: Mapping[str, str]) -> bool:
    """Whether two origins have a digest of the same model."""
    return bool(was.keys() & now.keys() & (PARTS.keys() - {"rows"}))


def check_origin(workdir: Path, now: Mapping[str, str]) -> None:
    """Compares what a run was trained on with what is there now.

    Runs of Lens of earlier versions have no record of their own: then the probe beside them tells.
    Where nothing does, a warning says that nothing was compared.

    Args:
      now: as far as it is used.

    Raises:
      InputError: it is another model, or there are other rows; or the record is damaged.
    """
    records, was = read_origin(workdir)
    if not is_known(was, now):
        logger.warning("%s has no record of what it was made from (an adopted bridge, or a run of "
                       "an earlier version): %s is not compared with it", workdir, now["source"])
        return
    if not (parts := different(was, now)):
        return
    part, what = parts[0], PARTS[parts[0]].removeprefix("another ")
    repair = ("or train again with another --workdir; to use it all the same, move away "
              f"{' and '.join(map(str, records))}")
    if part == "rows":
        raise InputError(f"{workdir} was trained on other rows than its files have now, or in "
                         f"another order, or with other answers: put the earlier ones back, "
                         f"{repair}")
    source = was.get("source", PARTS[part])  # a hand may have changed the file
    raise InputError(
        f"{workdir} was made from {source} ({what} {was[part]:.8}), and now there is "
        f"{now['source']} ({what} {now[part]:.8}): put the earlier one back, {repair}")


def read_origin(workdir: Path) -> tuple[list[Path], dict[str, str]]:
    """The files that say what a run was trained on, and what the first of them says; nothing where
    none does.

    Raises:
      InputError: the run's own record is damaged.
    """
    file, probe = workdir / ORIGIN, workdir.absolute().parent / PROBE_FILE
    files = [x for x in (file, probe) if x.is_file()]
    if file.is_file():
        return files, read_json(file, "put back a copy, or remove it: then nothing is compared, or "
                                      "what a probe in the directory above tells")
    try:
        with safe_open(probe, framework="numpy") as opened:
            return files, dict(json.loads(opened.metadata()["identity"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return files, {}
