"""Opens a finished run: reads its config at once, its model on first use."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from jaxfusion import config as configs
from jaxfusion.config import CONFIG_FILE, run_folders
from jaxfusion.data.rows.examples import Example
from jaxfusion.data.tasks.catalogue import get_task
from jaxfusion.data.tasks.spec import Task
from jaxfusion.data.tokenizers import Tokenizers
from jaxfusion.errors import InputError
from jaxfusion.evaluation.layers import layer_weigher, mean_states, token_weights
from jaxfusion.evaluation.scoring import Scorer, for_task
from jaxfusion.fields import CompareConfig, Config
from jaxfusion.nn.bridge import Params
from jaxfusion.reports.scored_runs import lens_report
from jaxfusion.sharding.hosts import all_or_none, fetch
from jaxfusion.sharding.mesh import make_mesh
from jaxfusion.training.checkpoint import trained_part
from jaxfusion.training.frozen import frozen_of
from jaxfusion.training.load import Model, load_model, overlay
from jaxfusion.training.origin import check_origin, digest_trained
from jaxfusion.training.state import Flat, merge


def open_run(
    workdir: Path | str, decoding: dict[str, Any] | None = None, llm_only: bool = False,
    share_states: bool = False,
) -> "OpenRun":
    """Opens the workdir of a bridge; its weights are read on first use.

    Args:
      decoding: fields of `EvalConfig` that override the run's own.
      llm_only: use the bare LLM, which needs no checkpoint.
      share_states: whether this process reads the same texts with other runs too, and keeps
        the encoder's states for them as far as `encoder.keep_states` allows.

    Raises:
      InputError: not the workdir of a bridge.
    """
    workdir = Path(workdir)
    config = configs.load(workdir / CONFIG_FILE)
    if isinstance(config, CompareConfig):
        inside = ", ".join(str(workdir / x) for runs in run_folders(config).values() for x in runs)
        raise InputError(f"{workdir} is a comparison; give one of its bridges: {inside}")
    if not isinstance(config, Config):
        instead = f"; its training scores it ({lens_report(workdir)}), and serve.py asks it" if (
            config.job == "lens") else ""
        raise InputError(f"{workdir} is a run of job '{config.job}', expected a bridge{instead}")
    keep = config.encoder.keep_states if share_states else 0.0
    config = replace(config, eval=replace(config.eval, **decoding or {}),
                     encoder=replace(config.encoder, keep_states=keep))
    configs.check(config)
    return OpenRun(workdir, config, llm_only)


@dataclass(frozen=True)
class OpenRun:
    """The best checkpoint of a bridge, or its bare LLM.

    Attributes:
      config: the run's; `model.config` also has the resolved commits of hub ids.
    """

    workdir: Path
    config: Config
    llm_only: bool = False

    def trained(self) -> tuple[int, dict[str, np.ndarray]]:
        """The best checkpoint's step and trained parameters by path; 0 and none for the bare LLM.
        They are read from disk each time: a cached copy would stay in host memory.

        Raises:
          InputError: no readable checkpoint.
        """
        return (0, {}) if self.llm_only else trained_part(self.workdir)

    @property
    def step(self) -> int:
        """The best checkpoint's step."""
        return self._loaded[0]

    @cached_property
    def mesh(self) -> Mesh:
        """The mesh of the run's config, over all devices."""
        return make_mesh(**vars(self.config.mesh))

    def on_mesh(self) -> AbstractContextManager:
        """A context with the mesh set, for computation."""
        return jax.set_mesh(self.mesh)

    @property
    def model(self) -> Model:
        """The bridge and its parameters, on the mesh.

        Raises:
          InputError: towers or checkpoint cannot be read, or do not match.
        """
        return self._loaded[1]

    @cached_property
    def _loaded(self) -> tuple[int, Model, bool]:
        """Step and model, and whether the LLM is the checkpoint's own."""
        step, trained = self.trained()  # before the towers, which take longer to load
        with self.on_mesh():
            with all_or_none():  # before anything that processes compute together
                model = load_model(self.config, self.mesh)
                check_origin(self.workdir, {part: x for part, x in model.origin.items()
                                            if not (self.llm_only and part.startswith("encoder"))})
            if self.llm_only:
                return step, model, True
            own = frozen_of(model, self.workdir, self.config) | trained
            untouched = not any(path.startswith("decoder/") for path in own)
            return step, overlay(model, own, str(self.workdir)), untouched

    @property
    def origin(self) -> dict[str, str]:
        """Digests of its towers and of what it trained; see `training/origin.py`."""
        trained = ((name, fetch(x)) for name, x in sorted(self.model.trainable.items()))
        return {**self.model.origin, "bridge": digest_trained(trained),
                "source": f"step {self.step} of {self.workdir}"}

    def bare(self) -> "OpenRun":
        """The bare LLM of this bridge. It shares the bridge's parameters in memory, unless the run
        trained some of the LLM's: then the towers are read again."""
        other = replace(self, llm_only=True)
        if self._loaded[2]:
            vars(other)["_loaded"] = self._loaded  # where cached_property looks
        return other

    def with_frozen(self, change: Callable[[Flat], Flat]) -> "OpenRun":
        """This run with other frozen parameters, such as an LLM that Lens moved.

        Args:
          change: frozen parameters by path -> those in their place.
        """
        other = replace(self)
        with self.on_mesh():
            step, model, untouched = self._loaded
            vars(other)["_loaded"] = step, replace(model, frozen=change(model.frozen)), untouched
        return other

    @cached_property
    def params(self) -> Params:
        """All parameters of the bridge."""
        return merge(self.model.trainable, self.model.frozen)

    @property
    def tokenizers(self) -> Tokenizers:
        """The tokenizers of both towers."""
        return self.model.tokenizers

    @property
    def task(self) -> Task:
        """The task that the run was trained on."""
        return get_task(self.config.data.task, self.config.tasks)

    def scorer(self, task: Task, language: str | None = None, **decoding: Any) -> Scorer:
        """The scorer of a task's rows; call it within `on_mesh`.

        Args:
          language: of the rows, for tasks whose stop strings depend on it.
          decoding: fields of `EvalConfig` that override the run's own.
        """
        settings = for_task(replace(self.config.eval, **decoding), task, language)
        return Scorer(self.model.bridge, self.tokenizers, settings, self.config.data.text_prompt,
                      self.llm_only, self.config.encoder.keep_states)

    def checked_language(self, language: str) -> str:
        """The language of a text.

        Raises:
          InputError: the encoder is told no languages, or does not have this one.
        """
        if self.llm_only and language:
            raise InputError("--language is for the encoder, which the bare LLM has not; leave it "
                             "out")
        if not self.llm_only and self.tokenizers.languages is not None:
            self.tokenizers.around_query(language)
        elif language:
            raise InputError("--language is for encoders that are told it (NLLB, M2M100), and this "
                             "run's is not; leave it out")
        return language

    def layers_of(self, text: str, language: str = "") -> dict[str, Any] | None:
        """The `tokens` of a text and their layer `weights`; see `token_weights`."""
        return self._read(token_weights, Example(text, "", -1, language))

    def weights_of(self, texts: Sequence[str], language: str = "") -> list[float] | None:
        """The mean weight of each layer over the texts' tokens; see `layer_weigher`."""
        weights = layer_weigher(self.model.bridge, self.tokenizers, self.config.eval)
        with self.on_mesh():
            return weights and weights(self.params, [Example(x, "", -1, language) for x in texts])

    def states_of(self, texts: Sequence[str], language: str = "") -> Float[np.ndarray, "L N D"]:
        """Every text's mean state in each layer of the encoder; see `mean_states`."""
        return self._read(mean_states, [Example(x, "", -1, language) for x in texts])

    def _read(self, read, examples):
        with self.on_mesh():
            return read(self.model.bridge, self.tokenizers, self.config.eval, self.params, examples)
