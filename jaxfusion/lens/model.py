"""The model of a Lens run: an LLM, or the LLM behind a trained bridge."""

from dataclasses import dataclass, replace
from pathlib import Path

from jaxfusion.data.tokenizers import Tokenizers
from jaxfusion.errors import InputError
from jaxfusion.fields import LensRunConfig
from jaxfusion.nn.bridge import Bridge, Params
from jaxfusion.runs.open_run import open_run
from jaxfusion.training.load import load_llm
from jaxfusion.training.state import merge


@dataclass(frozen=True)
class LensModel:
    """An LLM on the mesh, alone or behind a bridge.

    Attributes:
      bridge: without an encoder if the LLM is alone.
      text_prompt: the text after a bridge's prefix.
      identity: what it is, to check that a probe and trained blocks belong to it; see
        `training/origin.py`.
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
        Bridge(None, llm.decoder, None, "last"), llm.params, llm.tokenizers, "", llm.origin)
    return model, replace(config, decoder=replace(tower, revision=llm.commit or tower.revision))


def _behind_bridge(config: LensRunConfig) -> tuple[LensModel, LensRunConfig]:
    workdir = Path(config.bridge)
    run = open_run(workdir)
    run = replace(run, config=replace(run.config, mesh=config.mesh, decoder=config.decoder))
    model = run.model
    if own := [path for path in model.groups if path.startswith("decoder/")]:
        raise InputError(f"{workdir} also trained {own[0]}: expected a bridge with a frozen LLM, "
                         "so that the LLM can be exported after Lens")
    loaded = LensModel(model.bridge, merge(model.trainable, model.frozen), model.tokenizers,
                       run.config.data.text_prompt, run.origin)
    return loaded, config
