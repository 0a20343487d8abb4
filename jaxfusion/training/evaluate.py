"""Scores a workdir's best checkpoint on tasks and languages."""

import logging
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import Progress

from jaxfusion import config as configs
from jaxfusion.config import Config
from jaxfusion.data.sources import Example, read_examples
from jaxfusion.data.tasks import check_languages, get_task
from jaxfusion.evaluation.metrics import accuracy
from jaxfusion.evaluation.report import Results, merge_results, print_table
from jaxfusion.evaluation.scoring import Scorer
from jaxfusion.sharding.mesh import make_mesh
from jaxfusion.training.checkpoint import Checkpoints
from jaxfusion.training.loop import CONFIG_FILE
from jaxfusion.training.state import load_model, merge, overlay

logger = logging.getLogger(__name__)
Rows = dict[tuple[str, str], list[Example]]  # by task and language


def evaluate(
    workdir: Path, *, tasks: tuple[str, ...] = (), languages: tuple[str, ...] = (),
    limit: int | None = None, llm_only: bool = False, data_path: str | None = None,
) -> Results:
    """Scores the test split and writes `eval/results.json` (or `eval/llm_only.json`).

    Args:
      tasks, languages: default to the config's, and these to the training task and all of its
        languages. limit: rows of each.
      llm_only: the LLM alone, on the text prompt.
      data_path: directory of the tasks' files; defaults to the config's for the training task, and
        to the hub for others.

    Returns:
      All results that the file now holds.

    Raises:
      InputError: no such run, task, language or data.
    """
    config = configs.load(workdir / CONFIG_FILE)
    rows = read_rows(config, tasks, languages, limit, data_path)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    with jax.set_mesh(mesh):
        model = load_model(config, mesh)
        step = 0
        if not llm_only:
            checkpoints = Checkpoints(workdir, read_only=True)
            try:
                step, trained = checkpoints.restore_trained()
            finally:
                checkpoints.close()
            model = overlay(model, trained, str(workdir))
        scorer = Scorer(
            model.bridge, model.tokenizers, config.eval, config.data.text_prompt, llm_only
        )
        new = _score(scorer, merge(model.trainable, model.frozen), rows)
    name = "llm_only" if llm_only else "results"
    about = {"step": step, "limit": limit, "encoder": config.encoder.checkpoint,
             "decoder": config.decoder.checkpoint}
    results = merge_results(workdir / "eval" / f"{name}.json", new, about)
    title = "LLM alone" if llm_only else f"{config.fusion.name} + {config.projector.name}"
    print_table(results, title)
    print(f"{workdir / 'eval' / name}.json")
    return results


def read_rows(
    config: Config, tasks: tuple[str, ...], languages: tuple[str, ...], limit: int | None,
    data_path: str | None,
) -> Rows:
    """Test rows of every task and language asked for, all read before anything is scored."""
    wanted = {}
    for name in tasks or config.eval.tasks or (config.data.task,):
        task = get_task(name)
        # Another task's rows are not where the training task's files are.
        path = data_path or (config.data.path if name == config.data.task else None)
        chosen = languages or config.eval.languages or _at_hand(name, path)
        check_languages(name, chosen)
        for language in chosen:
            wanted[name, language] = read_examples(name, task, "test", language, path)[:limit]
    return wanted


def _at_hand(name: str, path: str | None) -> tuple[str, ...]:
    """All languages of a task; of a directory of JSONL files, those that are there."""
    languages = get_task(name).languages
    there = tuple(x for x in languages if Path(path or "", f"test-{x}.jsonl").is_file())
    return there or languages


def _score(scorer: Scorer, params, rows: Rows) -> Results:
    results: Results = {}
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("scoring", total=sum(len(examples) for examples in rows.values()))
        for (name, language), examples in rows.items():
            progress.update(bar, description=f"{name} {language}")
            scored = scorer(
                params, examples, get_task(name).labels, lambda n: progress.advance(bar, n)
            )
            if scored.cut.any:
                logger.warning("%s %s, longer than the limits: %s", name, language, scored.cut)
            results.setdefault(name, {})[language] = {
                scoring: accuracy(correct) for scoring, correct in scored.correct.items()
            }
    return results
