"""The model that a Lens run moved: what it was, and whether it still is what is there now."""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxfusion.errors import InputError
from jaxfusion.files import read_json
from jaxfusion.hf.hub import resolve
from jaxfusion.hf.load import open_tensors
from jaxfusion.runs.open_run import OpenRun
from jaxfusion.sharding.hosts import fetch
from jaxfusion.training.workdir import ORIGIN

PROBE_FILE = "probe.safetensors"
# What is compared, with what another one is called: the whole model, its tokenizers, of a model
# behind a bridge the LLM alone, and the prompts of a run that goes on.
PARTS = {"model": "another model", "tokenizer": "another tokenizer", "llm": "another LLM",
         "prompts": "other prompts"}
SAMPLE = 64  # bytes from the middle row of every tensor
logger = logging.getLogger(__name__)


def origin_of_llm(path: Path, tokenizer, name: str) -> dict[str, str]:
    """Digests of an LLM by the names of `PARTS`, and its name as `source`."""
    model, words = digest(path), digest_tokenizer(tokenizer)
    return {"model": model, "tokenizer": words, "llm": _joined(model, words), "source": name}


def origin_of_bridge(run: OpenRun) -> dict[str, str]:
    """As `origin_of_llm`, of the LLM behind a bridge: `model` is of both."""
    model = run.model
    path, _ = resolve(model.config.decoder.checkpoint, model.config.decoder.revision)
    llm = digest(path)
    trained = hashlib.sha256(llm.encode())
    for name, x in sorted(model.trainable.items()):
        trained.update(name.encode() + np.asarray(fetch(x)).tobytes())
    encoder, decoder = map(digest_tokenizer, (model.tokenizers.encoder, model.tokenizers.decoder))
    return {"model": trained.hexdigest(), "tokenizer": encoder + decoder,
            "llm": _joined(llm, decoder), "source": f"step {run.step} of {run.workdir}"}


def _joined(*digests: str) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def digest(path: Path) -> str:
    """A digest of every tensor's name, shape and some of its bytes, without reading all weights."""
    hasher, tensors = hashlib.sha256(), open_tensors(path)
    for name, shape in sorted(tensors.shapes().items()):
        row = tensors.read(name, (slice(shape[0] // 2, shape[0] // 2 + 1),)) if shape else None
        sample = b"" if row is None else row.tobytes()[:SAMPLE]
        hasher.update(f"{name} {shape}".encode() + sample)
    return hasher.hexdigest()


def digest_tokenizer(tokenizer) -> str:
    """A digest of a tokenizer, including its chat template."""
    content = [sorted(tokenizer.get_vocab().items()), tokenizer.chat_template,
             str(tokenizer.special_tokens_map)]
    return digest_of(content)


def digest_of(content: Any) -> str:
    """A digest of what can be written as JSON."""
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()


def different(was: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The parts that two models have in another form; what one of them does not say is left out."""
    return [part for part in PARTS if was.get(part, now.get(part)) != now.get(part, was.get(part))]


def check_origin(workdir: Path, now: Mapping[str, str]) -> None:
    """Compares the model that a run's blocks were trained on with what is there now.

    Runs of earlier versions have no record of their own: then the probe beside them tells. Where
    nothing does, a warning says that nothing was compared.

    Args:
      workdir: of one run of a sweep. now: of the model there, as far as it is used.

    Raises:
      InputError: it is another model; or the record is damaged.
    """
    records, was = _recorded(workdir)
    if not was.keys() & now.keys() & PARTS.keys():
        logger.warning("%s has no record of the model that it was made from: whether %s is still "
                       "that model is not known", workdir, now["source"])
        return
    if not (parts := different(was, now)):
        return
    part, what = parts[0], PARTS[parts[0]].split()[-1]
    repair = ("or train again with another --workdir; to use it all the same, move away "
              f"{' and '.join(map(str, records))}")
    if part == "prompts":
        raise InputError(f"{workdir} was trained on other prompts than its files have now: put the "
                         f"earlier ones back, {repair}")
    source = was.get("source", PARTS[part])
    raise InputError(
        f"{workdir} was made from {source} ({what} {was[part]:.8}), and now there is "
        f"{now['source']} ({what} {now[part]:.8}): put the earlier one back, {repair}")


def _recorded(workdir: Path) -> tuple[list[Path], dict[str, str]]:
    """The files that say what a run of a sweep was trained on, and what the first of them says;
    nothing where none does."""
    file, probe = workdir / ORIGIN, workdir.absolute().parent / PROBE_FILE
    files = [x for x in (file, probe) if x.is_file()]
    if file.is_file():
        repair = "put back a copy, or remove it: then the probe in the directory above tells"
        return files, read_json(file, repair)
    try:
        with safe_open(probe, framework="numpy") as opened:
            return files, dict(json.loads(opened.metadata()["identity"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return files, {}
