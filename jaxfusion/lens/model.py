"""The model of a Lens run: an LLM, or the LLM behind a trained bridge."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from jaxfusion.data.tokenizers import Tokenizers
from jaxfusion.errors import InputError
from jaxfusion.fields import LensRunConfig
from jaxfusion.hf.hub import resolve
from jaxfusion.hf.load import open_tensors
from jaxfusion.nn.bridge import Bridge, Params
from jaxfusion.runs.open_run import open_run
from jaxfusion.sharding.hosts import fetch
from jaxfusion.training.load import load_llm
from jaxfusion.training.state import merge


@dataclass(frozen=True)
class LensModel:
    """An LLM on the mesh, alone or behind a bridge.

    Attributes:
      bridge: without an encoder if the LLM is alone.
      text_prompt: the text after a bridge's prefix.
      identity: digests of `model` and `tokenizer`, to check that a probe belongs to them.
    """

    bridge: Bridge
    params: Params
    tokenizers: Tokenizers
    text_prompt: str
    identity: dict[str, str]

    @property
    def bare(self) -> bool:
        """Whether the LLM reads prompts without a bridge."""
        return self.bridge.encoder is None


def load_lens_model(config: LensRunConfig, mesh) -> tuple[LensModel, LensRunConfig]:
    """The model, and the config with the resolved hub commit.

    Raises:
      InputError: an invalid checkpoint, or an invalid workdir of the bridge.
    """
    return _behind_bridge(config) if config.bridge else _alone(config, mesh)


def _alone(config: LensRunConfig, mesh) -> tuple[LensModel, LensRunConfig]:
    tower = config.decoder
    llm = load_llm(tower, config.data.chat_template, config.data.bos, mesh)
    model = LensModel(
        Bridge(None, llm.decoder, None, "last"), llm.params, llm.tokenizers, "",
        {"model": digest(llm.path), "tokenizer": digest_tokenizer(llm.tokenizers.decoder)})
    return model, replace(config, decoder=replace(tower, revision=llm.commit or tower.revision))


def _behind_bridge(config: LensRunConfig) -> tuple[LensModel, LensRunConfig]:
    workdir = Path(config.bridge)
    run = open_run(workdir)
    model = replace(run, config=replace(
        run.config, mesh=config.mesh, decoder=config.decoder)).model
    if own := [path for path in model.groups if path.startswith("decoder/")]:
        raise InputError(f"{workdir} also trained {own[0]}: expected a bridge with a frozen LLM, "
                         "so that the LLM can be exported after Lens")
    tokenizers = model.tokenizers
    path, _ = resolve(model.config.decoder.checkpoint, model.config.decoder.revision)
    trained = hashlib.sha256(digest(path).encode())
    for name, x in sorted(model.trainable.items()):
        trained.update(name.encode() + np.asarray(fetch(x)).tobytes())
    both = digest_tokenizer(tokenizers.encoder) + digest_tokenizer(tokenizers.decoder)
    loaded = LensModel(model.bridge, merge(model.trainable, model.frozen), tokenizers,
                       run.config.data.text_prompt,
                       {"model": trained.hexdigest(), "tokenizer": both})
    return loaded, config


SAMPLE = 64  # bytes from the middle row of every tensor


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
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()
