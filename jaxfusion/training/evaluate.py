"""Scores a workdir's best checkpoint on tasks and languages."""

import logging
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import Progress

from jaxfusion import config as configs
from jaxfusion.config import directory_name
from jaxfusion.data.sources import Example, at_hand, read_examples
from jaxfusion.data.tasks import check_languages, configured, get_task
from jaxfusion.errors import InputError
from jaxfusion.evaluation.layers import layer_weigher
from jaxfusion.evaluation.metrics import accuracy
from jaxfusion.evaluation.report import Results, merge_results
from jaxfusion.evaluation.scoring import Scorer
from jaxfusion.fields import CompareConfig, Config
from jaxfusion.sharding.hosts import check_peers, is_first
from jaxfusion.sharding.mesh import make_mesh
from jaxfusion.training.checkpoint import trained_part
from jaxfusion.training.loop import CONFIG_FILE
from jaxfusion.training.state import Model, load_model, merge, overlay

logger = logging.getLogger(__name__)
Details = dict[str, dict[str, dict[str, Any]]]  # by task and language
Rows = dict[tuple[str, str], list[Example]]  # by task and language


def evaluate(
    workdir: Path, *, tasks: tuple[str, ...] = (), languages: tuple[str, ...] = (),
    limit: int | None = None, llm_only: bool = False, data_path: str | None = None,
) -> tuple[Results, Details]:
    """Scores the test split and writes `eval/results.json` (or `eval/llm_only.json`).

    `eval/details.json` (`llm_only_details.json`) has by task and language what is behind them:
    `correct`, by scoring a 0 or 1 for each row, and a fusion's mean `layer_weights`.

    Args:
      tasks, languages: default to the config's, and these to the training task and all of its
        languages. limit: rows of each.
      llm_only: the LLM alone, on the text prompt.
      data_path: where the tasks' rows are, as `data.path`; defaults to the config's for the
        training task, and to their own sources for others.

    Returns:
      All results that the file now holds (in other processes than the first: what was scored now),
      and the details of what was scored now.

    Raises:
      InputError: no such run, task, language or data.
    """
    config = load_config(workdir)
    check_peers(workdir=str(workdir), asked=str((tasks, languages, limit, llm_only, data_path)))
    rows = read_rows(config, tasks, languages, limit, data_path)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    with jax.set_mesh(mesh):
        step, model = (0, load_model(config, mesh)) if llm_only else load_trained(
            config, workdir, mesh)
        new, details = _score(model, rows, llm_only)
    if not is_first():
        return new, details
    name, more = ("llm_only", "llm_only_details") if llm_only else ("results", "details")
    about = {"step": step, "limit": limit, "encoder": config.encoder.checkpoint,
             "decoder": config.decoder.checkpoint}
    merge_results(workdir / "eval" / f"{more}.json", details, about)
    return merge_results(workdir / "eval" / f"{name}.json", new, about), details


def load_config(workdir: Path) -> Config:
    """The config of a bridge's workdir.

    Raises:
      InputError: it is none, or that of another job.
    """
    config = configs.load(workdir / CONFIG_FILE)
    if isinstance(config, CompareConfig):
        inside = ", ".join(str(workdir / directory_name(x["name"])) for x in config.variants)
        raise InputError(f"{workdir} is a comparison; give one of its bridges: {inside}")
    if not isinstance(config, Config):
        raise InputError(f"{workdir} holds no bridge but a run of job '{config.job}'")
    return config


def load_trained(config: Config, workdir: Path, mesh) -> tuple[int, Model]:
    """The step of a workdir's best checkpoint, and the model with it.

    Raises:
      InputError: there is none, or it does not fit.
    """
    step, trained = trained_part(workdir)
    return step, overlay(load_model(config, mesh), trained, str(workdir))


def read_rows(
    config: Config, tasks: tuple[str, ...], languages: tuple[str, ...], limit: int | None,
    data_path: str | None,
) -> Rows:
    """Test rows of every task and language asked for, all read before anything is scored."""
    wanted = {}
    for name in tasks or config.eval.tasks or (config.data.task,):
        task, path = get_task(name, config.tasks), data_path
        if name == config.data.task:  # another task's rows are not where this one's are
            task, path = configured(task, config.data), data_path or config.data.path
        chosen = languages or config.eval.languages or at_hand(name, task, "test", path)
        check_languages(name, chosen, config.tasks)
        for language in chosen:
            wanted[name, language] = read_examples(name, task, "test", language, path)[:limit]
    return wanted


def _score(model: Model, rows: Rows, llm_only: bool) -> tuple[Results, Details]:
    config, results, details = model.config, {}, {}
    scorer = Scorer(model.bridge, model.tokenizers, config.eval, config.data.text_prompt, llm_only)
    params = merge(model.trainable, model.frozen)
    weigh = None if llm_only else layer_weigher(model.bridge, model.tokenizers, config.eval)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("scoring", total=sum(len(examples) for examples in rows.values()))
        for (name, language), examples in rows.items():
            progress.update(bar, description=f"{name} {language}")
            scored = scorer(
                params, examples, get_task(name, config.tasks), lambda n: progress.advance(bar, n)
            )
            if scored.cut.any:
                logger.warning("%s %s, longer than the limits: %s", name, language, scored.cut)
            results.setdefault(name, {})[language] = {
                scoring: accuracy(correct) for scoring, correct in scored.correct.items()
            }
            details.setdefault(name, {})[language] = {
                "correct": {scoring: [int(right) for right in correct]
                            for scoring, correct in scored.correct.items()},
                "layer_weights": weigh and weigh(params, examples),
            }
    return results, details
