"""What a Lens run reads its languages in: an LLM, or the LLM behind a trained bridge."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from jaxfusion.data.tokenizers import Tokenizers, chat_turn, load_tokenizer, read_end_tokens
from jaxfusion.errors import InputError, choose
from jaxfusion.fields import DTYPES, REMATS, LensRunConfig
from jaxfusion.hf.hub import resolve
from jaxfusion.hf.load import load_params, open_tensors, read_shape
from jaxfusion.hf.tables import table
from jaxfusion.nn.bridge import Bridge, Params
from jaxfusion.nn.decoder import Decoder
from jaxfusion.runs.open_run import open_run
from jaxfusion.sharding.hosts import fetch
from jaxfusion.training.state import describe, kernel_for, merge


@dataclass(frozen=True)
class Model:
    """An LLM on the mesh, alone or behind a bridge.

    Attributes:
      bridge: without an encoder where the LLM is alone.
      text_prompt: what follows a bridge's prefix.
      identity: digests of `model` and `tokenizer`, by which a probe is known to be of this one.
    """

    bridge: Bridge
    params: Params
    tokenizers: Tokenizers
    text_prompt: str
    identity: dict[str, str]

    @property
    def bare(self) -> bool:
        """Whether the LLM reads prompts itself."""
        return self.bridge.encoder is None


def load_model(config: LensRunConfig, mesh) -> tuple[Model, LensRunConfig]:
    """The model, and the config with the hub commit that was resolved.

    Raises:
      InputError: whatever is wrong with the checkpoint or the bridge's workdir.
    """
    return _behind_bridge(config) if config.bridge else _alone(config, mesh)


def _alone(config: LensRunConfig, mesh) -> tuple[Model, LensRunConfig]:
    tower = config.decoder
    path, commit = resolve(tower.checkpoint, tower.revision)
    shape = read_shape("decoder", path)
    decoder = Decoder(shape, jnp.dtype(choose("dtype", tower.dtype, DTYPES)),
                      choose("remat", tower.remat, REMATS),
                      kernel_for("decoder", tower.attention))
    tokens = jnp.zeros((1, 2), jnp.int32)
    places = describe(lambda: decoder.init(
        jax.random.key(0), tokens, tokens, tokens, method="score")["params"], mesh)
    params = traverse_util.unflatten_dict(load_params(path, table(shape), places), sep="/")
    tokenizer = load_tokenizer(path, shape.vocab_size, "decoder")
    turn = chat_turn(tokenizer) if config.data.chat_template else None
    model = Model(Bridge(None, decoder, None, "last"), {"decoder": params},
                  Tokenizers(None, tokenizer, turn, read_end_tokens(path, shape.vocab_size),
                             bos=config.data.bos), "",
                  {"model": digest(path), "tokenizer": digest_tokenizer(tokenizer)})
    return model, replace(config, decoder=replace(tower, revision=commit or tower.revision))


def _behind_bridge(config: LensRunConfig) -> tuple[Model, LensRunConfig]:
    workdir = Path(config.bridge)
    run = open_run(workdir)
    found = replace(run, config=replace(run.config, mesh=config.mesh)).model
    if own := [path for path in found.groups if path.startswith("decoder/")]:
        raise InputError(f"{workdir} trained {own[0]}, too: wanted a bridge whose LLM stayed as it "
                         "was, so that what Lens makes of it can be exported")
    tokenizers = found.tokenizers
    path, _ = resolve(found.config.decoder.checkpoint, found.config.decoder.revision)
    trained = hashlib.sha256(digest(path).encode())
    for name, x in sorted(found.trainable.items()):
        trained.update(name.encode() + np.asarray(fetch(x)).tobytes())
    both = digest_tokenizer(tokenizers.encoder) + digest_tokenizer(tokenizers.decoder)
    model = Model(found.bridge, merge(found.trainable, found.frozen), tokenizers,
                  run.config.data.text_prompt,
                  {"model": trained.hexdigest(), "tokenizer": both})
    return model, config


SAMPLE = 64  # bytes from the middle of every tensor


def digest(path: Path) -> str:
    """Tells checkpoints apart without reading them whole: every tensor's name, shape, and some of
    its bytes."""
    found, tensors = hashlib.sha256(), open_tensors(path)
    for name, shape in sorted(tensors.shapes().items()):
        row = tensors.read(name, (slice(shape[0] // 2, shape[0] // 2 + 1),)) if shape else None
        sample = b"" if row is None else row.tobytes()[:SAMPLE]
        found.update(f"{name} {shape}".encode() + sample)
    return found.hexdigest()


def digest_tokenizer(tokenizer) -> str:
    """Tells tokenizers apart, their chat templates counted."""
    about = [sorted(tokenizer.get_vocab().items()), tokenizer.chat_template,
             str(tokenizer.special_tokens_map)]
    return hashlib.sha256(json.dumps(about, ensure_ascii=False).encode()).hexdigest()
