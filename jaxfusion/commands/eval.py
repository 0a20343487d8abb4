"""Scores a trained bridge, or its bare LLM, and says how runs differ.

    eval --workdir DIR[,DIR2 …] [--tasks a,b] [--languages x,y] [--limit N] [--llm_only]
    eval --compare RUN_A RUN_B [--scoring exact_match]     # what B gets right more than A
    eval --compare DIR                                     # the same of a comparison's variants
    eval --workdir DIR --report                            # one HTML file on what was scored
    eval --workdir DIR --input FILE --output OUT.jsonl     # answers a file's rows
    eval --workdir DIR --ask "PREMISE | HYPOTHESIS"

Scoring writes `DIR/eval/results.json` (`llm_only.json` for the bare LLM), every row's answer beside
it, and prints a table; of several workdirs, as of several seeds, also their mean and spread.
"""

from functools import partial
from pathlib import Path
from typing import Any

from absl import flags

from jaxfusion.cli import local_path, refuse_words, run_main, set_up_jax, set_up_logging
from jaxfusion.errors import InputError

FLAGS = flags.FlagValues()
text, texts, several, switch, whole, number = (partial(x, flag_values=FLAGS) for x in (
    flags.DEFINE_string, flags.DEFINE_multi_string, flags.DEFINE_list, flags.DEFINE_bool,
    flags.DEFINE_integer, flags.DEFINE_float))
WORKDIR = several("workdir", [], "directory of a run, or of several seeds by comma")
TASKS = several("tasks", [], "default: config.eval.tasks, or the training task")
LANGUAGES = several("languages", [], "default: config.eval.languages, or all of a task")
LIMIT = whole("limit", None, "score only the first N rows", lower_bound=1)
DATA_PATH = text("data_path", None, "where the rows are, as config.data.path")
DROP_SEEN = switch("drop_seen", False, "leave out test rows that were trained on")
LLM_ONLY = switch("llm_only", False, "the bare LLM, on the query and the text prompt")
DISTRIBUTED = switch("distributed", False, "this process is one of several")
ASK = text("ask", None, "answer one input: its columns, apart by ' | '")
INPUT = text("input", None, "answer the rows of this file")
LANGUAGE = text(
    "language", "", "of --ask and --input, for encoders that are told it (NLLB, M2M100)")
OUTPUT = text("output", None, "of --input: a .jsonl file, continued where it stands")
COMPARE = text("compare", None, "RUN_A RUN_B …, each a workdir, or several by comma; "
               "or a comparison's workdir")
SCORING = text("scoring", None, "of --compare: how an answer counts")
REPORT = switch("report", False, "write report.html and report.md on what was scored")
DECODING = {
    "max_new_tokens": whole("max_new_tokens", None, "of an answer", lower_bound=0),
    "temperature": number("temperature", None, "0: the likeliest token; above: drawn"),
    "top_p": number("top_p", None, "sample among tokens of this total probability"),
    "seed": whole("seed", None, "of what is drawn"),
    "stop": texts("stop", None, "text that ends an answer; may be repeated"),
    "batch_size": whole("batch_size", None, "rows at once", lower_bound=1),
}
GROUPS = {
    "The run": (WORKDIR, LLM_ONLY, DISTRIBUTED),
    "Scoring": (TASKS, LANGUAGES, LIMIT, DATA_PATH, DROP_SEEN),
    "Comparing and reporting": (COMPARE, SCORING, REPORT),
    "Answering": (ASK, INPUT, OUTPUT, LANGUAGE),
    "An answer": tuple(DECODING.values()),
}


def main(argv: list[str]) -> None:
    """Scores, compares, reports or answers."""
    words = argv[1:] if COMPARE.value is not None else []
    refuse_words(argv[: len(argv) - len(words)])
    set_up_logging()
    _check_flags()
    set_up_jax()
    from jaxfusion.sharding.hosts import join

    if DISTRIBUTED.value:
        join(preemptible=False)
    workdirs = [local_path(place) for place in WORKDIR.value]
    if COMPARE.value is not None:
        _compare([COMPARE.value, *words])
    elif ASK.value is not None:
        from jaxfusion.runs.ask import ask

        ask(workdirs[0], ASK.value, language=LANGUAGE.value, llm_only=LLM_ONLY.value,
            decoding=_decoding())
    elif INPUT.value is not None:
        from jaxfusion.runs.answer_file import answer_file

        count = answer_file(workdirs[0], local_path(INPUT.value), local_path(OUTPUT.value),
                            language=LANGUAGE.value, llm_only=LLM_ONLY.value, decoding=_decoding())
        print(f"{count} rows answered; all are in {OUTPUT.value}")
    elif REPORT.value:
        print(_report(workdirs))
    else:
        _score(workdirs)


def _check_flags() -> None:
    """Raises InputError for flags that say two things, or too little."""
    modes = {"--ask": ASK.value, "--input": INPUT.value, "--compare": COMPARE.value}
    chosen = [name for name, value in modes.items() if value is not None]
    if len(chosen) > 1:
        raise InputError(f"{' and '.join(chosen)} are one at a time")
    if REPORT.value and (ASK.value is not None or INPUT.value is not None):
        raise InputError(f"{chosen[0]} and --report are one at a time")
    of_scoring = {"--tasks": TASKS.value, "--languages": LANGUAGES.value, "--limit": LIMIT.value,
                  "--data_path": DATA_PATH.value, "--drop_seen": DROP_SEEN.value}
    given = [name for name, value in of_scoring.items() if value]
    if given and (chosen or REPORT.value):
        raise InputError(f"{given[0]} is for scoring, and not for {[*chosen, '--report'][0]}")
    if (COMPARE.value is None) != bool(WORKDIR.value):
        raise InputError("wanted --workdir DIR, or --compare RUN_A RUN_B")
    if (INPUT.value is None) != (OUTPUT.value is None):
        raise InputError("--input FILE and --output OUT.jsonl go together")
    if LANGUAGE.value and ASK.value is None and INPUT.value is None:
        raise InputError("--language is for --ask and --input; for scoring there is --languages")
    if DISTRIBUTED.value and (chosen or REPORT.value):
        raise InputError("--distributed is for scoring; the rest is done by one process")
    if len(WORKDIR.value) > 1 and (ASK.value is not None or INPUT.value is not None):
        raise InputError(f"{chosen[0]} takes one --workdir")


def _decoding() -> dict[str, Any]:
    given = {name: flag.value for name, flag in DECODING.items() if flag.value is not None}
    return given | ({"stop": tuple(given["stop"])} if "stop" in given else {})


def _report(workdirs: list[Path]) -> Path:
    from jaxfusion.bridge.compare import read_config, report
    from jaxfusion.fields import LensRunConfig

    if not isinstance(read_config(workdirs[-1]), LensRunConfig):
        return report(workdirs, SCORING.value)
    from jaxfusion.lens.report import write_again

    if len(workdirs) > 1 or SCORING.value is not None:
        raise InputError("the report of a Lens run takes one --workdir, and no --scoring")
    return write_again(workdirs[0])


def _score(workdirs: list[Path]) -> None:
    from jaxfusion.reports.terminal import print_comparison, print_table
    from jaxfusion.runs.score import evaluate
    from jaxfusion.sharding.hosts import is_first

    for workdir in workdirs:
        results, _ = evaluate(
            workdir, tasks=tuple(TASKS.value), languages=tuple(LANGUAGES.value),
            limit=LIMIT.value, llm_only=LLM_ONLY.value, data_path=DATA_PATH.value,
            drop_seen=DROP_SEEN.value, decoding=_decoding(),
        )
        if is_first():
            print_table(results, "LLM alone" if LLM_ONLY.value else str(workdir))
            print(workdir / "eval" / ("llm_only.json" if LLM_ONLY.value else "results.json"))
    if len(workdirs) > 1 and is_first():
        from jaxfusion.bridge.compare import compared
        from jaxfusion.reports.scored_runs import read_run

        for comparison in compared(
            {f"{len(workdirs)} runs": [read_run(x, LLM_ONLY.value) for x in workdirs]},
            SCORING.value,
        ):
            print_comparison(comparison)


def _compare(asked: list[str]) -> None:
    from jaxfusion.bridge.compare import gather, report
    from jaxfusion.reports.page import write_page
    from jaxfusion.reports.summary import summary
    from jaxfusion.reports.terminal import print_comparison, print_differences

    models, comparisons = gather(asked, SCORING.value)
    for comparison in comparisons:
        print_comparison(comparison)
        print_differences(comparison)
        print(" ".join(summary(comparison)))
    if not REPORT.value:
        return
    if len(asked) == 1:
        print(report([Path(asked[0])], SCORING.value))
        return
    last = Path(asked[-1].split(",")[-1])
    folder = last.parent if last.is_file() else last / "eval"
    print(write_page(comparisons, models, folder, " against ".join(reversed(models)),
                     "comparison"))


def run() -> None:
    """The command `eval`."""
    run_main(main, __doc__, FLAGS, GROUPS)
