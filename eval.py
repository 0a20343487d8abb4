"""Scores a trained bridge, or its bare LLM: `python eval.py --workdir DIR [--tasks a,b]
[--languages x,y] [--limit N] [--llm_only] [--data_path PLACE] [--distributed]`, or
answers one input: `python eval.py --workdir DIR --ask "PREMISE | HYPOTHESIS"`.

Scoring writes `DIR/eval/results.json` (`llm_only.json` for the bare LLM) and prints a table.
"""

from pathlib import Path

from absl import flags

from jaxfusion.cli import refuse_words, run_main, set_up_logging
from jaxfusion.errors import InputError

WORKDIR = flags.DEFINE_string("workdir", None, "workdir of a run of train.py", required=True)
TASKS = flags.DEFINE_list("tasks", [], "default: config.eval.tasks, or the training task")
LANGUAGES = flags.DEFINE_list("languages", [], "default: config.eval.languages, or all of a task")
LIMIT = flags.DEFINE_integer("limit", None, "score the first so many rows", lower_bound=1)
DATA_PATH = flags.DEFINE_string("data_path", None, "where the tasks' rows are, as config.data.path")
ASK = flags.DEFINE_string("ask", None, "answer one input instead: its columns, apart by ' | '")
DISTRIBUTED = flags.DEFINE_bool("distributed", False, "this process is one of several")
LLM_ONLY = flags.DEFINE_bool("llm_only", False, "score the bare LLM on the text prompt")


def main(argv: list[str]) -> None:
    refuse_words(argv)
    set_up_logging()
    from jaxfusion.evaluation.report import print_table
    from jaxfusion.sharding.hosts import is_first, join
    from jaxfusion.training.evaluate import evaluate

    if DISTRIBUTED.value:
        if ASK.value is not None:
            raise InputError("--ask is answered by one process, without --distributed")
        join(preemptible=False)
    workdir = Path(WORKDIR.value)
    if ASK.value is not None:
        from jaxfusion.training.ask import ask

        ask(workdir, ASK.value)
        return
    results, _ = evaluate(
        workdir, tasks=tuple(TASKS.value), languages=tuple(LANGUAGES.value),
        limit=LIMIT.value, llm_only=LLM_ONLY.value, data_path=DATA_PATH.value,
    )
    if is_first():
        print_table(results, "LLM alone" if LLM_ONLY.value else str(workdir))
        print(workdir / "eval" / ("llm_only.json" if LLM_ONLY.value else "results.json"))


if __name__ == "__main__":
    run_main(main)
