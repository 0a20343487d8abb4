"""Scores a trained bridge, or its bare LLM: `python eval.py --workdir DIR [--tasks a,b]
[--languages x,y] [--limit N] [--llm_only] [--data_path DIR]`.

Writes `DIR/eval/results.json` (`llm_only.json` for the bare LLM) and prints a table.
"""

from pathlib import Path

from absl import flags

from jaxfusion.cli import refuse_words, run_main, set_up_logging

WORKDIR = flags.DEFINE_string("workdir", None, "workdir of a run of train.py", required=True)
TASKS = flags.DEFINE_list("tasks", [], "default: config.eval.tasks, or the training task")
LANGUAGES = flags.DEFINE_list("languages", [], "default: config.eval.languages, or all of a task")
LIMIT = flags.DEFINE_integer("limit", None, "score the first so many rows", lower_bound=1)
DATA_PATH = flags.DEFINE_string("data_path", None, "directory of the tasks' files")
LLM_ONLY = flags.DEFINE_bool("llm_only", False, "score the bare LLM on the text prompt")


def main(argv: list[str]) -> None:
    refuse_words(argv)
    set_up_logging()
    from jaxfusion.training.evaluate import evaluate

    evaluate(
        Path(WORKDIR.value), tasks=tuple(TASKS.value), languages=tuple(LANGUAGES.value),
        limit=LIMIT.value, llm_only=LLM_ONLY.value, data_path=DATA_PATH.value,
    )


if __name__ == "__main__":
    run_main(main)
