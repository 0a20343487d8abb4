"""Trains what a config says: `train --config NAME[:words] [--workdir DIR] [--config.FIELD=VALUE]`.

NAME is one of this project's configs, which `jaxfusion configs` lists, or the path of a file. Any
field of the config is a flag, as --config.train.steps=100; all are in jaxfusion/fields.py.

The same command started again resumes where the run stands. With --compile_only nothing runs: the
training step is compiled, for the devices that are here or for --topology v4-32, and what it takes
is printed. SIGTERM saves what there is to save and ends the run with exit status 75.
"""

import re
from functools import partial
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from jaxfusion import fields
from jaxfusion.cli import (
    end_on_sigterm,
    local_path,
    refuse_words,
    run_main,
    set_up_jax,
    set_up_logging,
    typed,
)
from jaxfusion.commands.configs import list_configs, offer_common, with_paths
from jaxfusion.commands.overrides import CheckedParser
from jaxfusion.config import from_config_dict, one_by_seeds
from jaxfusion.errors import InputError

FLAGS = flags.FlagValues()
text, switch = (partial(x, flag_values=FLAGS) for x in (flags.DEFINE_string, flags.DEFINE_bool))
CONFIG = config_flags.DEFINE_config_file("config", None, "NAME[:words], or the path of a file",
                                         lock_config=True, flag_values=FLAGS)
FLAGS["config"].parser = CheckedParser(FLAGS["config"].parser)
WORKDIR = text("workdir", None, "directory of the run; default: runs/<config name>")
COMPILE_ONLY = switch("compile_only", False, "compile the step, print what it takes")
TOPOLOGY = text("topology", None, "TPU slice to compile for, such as v4-32")
PROFILE = text("profile_steps", None, "FIRST:LAST, traced into WORKDIR/profile")
DISTRIBUTED = switch("distributed", False, "this process is one of several")
GROUPS = {
    "The run": (CONFIG, WORKDIR),
    "What it takes": (COMPILE_ONLY, TOPOLOGY, PROFILE),
    "Several processes": (DISTRIBUTED,),
}


def default_workdir(config_flag: str) -> Path:
    """`configs/xnli_paper.py:debug` -> `runs/xnli_paper_debug`."""
    path, _, arg = config_flag.partition(":")
    return Path("runs") / re.sub(r"\W+", "_", f"{Path(path).stem}_{arg}").strip("_")


def main(argv: list[str]) -> None:
    """Runs the job of the config."""
    refuse_words(argv)
    set_up_logging()
    name = "" if CONFIG.value is None else config_flags.get_config_filename(FLAGS["config"])
    file = name.partition(":")[0]
    if not file:
        print(list_configs())
        raise InputError("--config is missing: choose one of these, or a file of your own")
    if not local_path(file).is_file():
        raise InputError(f"the config file {file} is missing; this project's own go by name: "
                         f"{typed('train')} --config xnli_paper")
    config = from_config_dict(CONFIG.value)
    if config.job == "bridge" and config.seeds and not COMPILE_ONLY.value:
        config = one_by_seeds(config)
    workdir = local_path(WORKDIR.value or str(default_workdir(name)))
    if TOPOLOGY.value is not None and not COMPILE_ONLY.value:
        raise InputError("--topology goes with --compile_only; a run takes the devices it finds")
    if PROFILE.value and (COMPILE_ONLY.value or config.job in ("compare", "lens")):
        raise InputError("--profile_steps is for a single run")
    set_up_jax()
    # jax, and all that stands on it, is imported only once the config is known to be right, and of
    # the jobs only the one that runs.
    from jaxfusion.miniatures.inputs import make_inputs

    if DISTRIBUTED.value:
        from jaxfusion.sharding.hosts import join

        join()
    if COMPILE_ONLY.value:
        _compile(config)
    elif config.job == "compare":
        from jaxfusion.bridge.compare import compare

        compare(make_inputs(config), workdir)
        print(f"done: {workdir / 'report.html'}, and the same as report.md")
    elif config.job == "pretrain":
        from jaxfusion.pretraining.job import CHECKPOINT, pretrain

        pretrain(make_inputs(config), workdir, _steps(PROFILE.value))
        print(f"done: {workdir / CHECKPOINT} is a Hugging Face directory")
    elif config.job == "lens":
        from jaxfusion.lens.job import lens

        lens(make_inputs(config), workdir)
        print(f"done: {workdir / 'report.html'}, and the same as report.md")
    else:
        from jaxfusion.bridge.job import train

        train(make_inputs(config), workdir, _steps(PROFILE.value))
        print(f"done: {workdir}; score it with: {typed('eval')} --workdir {workdir}")


def _steps(text: str | None) -> tuple[int, int] | None:
    """`10:15` as its two numbers."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if not found or not 0 < int(found[1]) <= int(found[2]):
        raise InputError(f"--profile_steps is '{text}', wanted FIRST:LAST such as 10:15")
    return int(found[1]), int(found[2])


def _compile(config) -> None:
    import jax

    from jaxfusion.bridge.compile_only import compile_only
    from jaxfusion.miniatures.inputs import make_inputs

    if config.job != "bridge":
        raise InputError(f"--compile_only is for bridges, this config's job is '{config.job}'")
    if TOPOLOGY.value is not None:  # libtpu compiles without a TPU; nothing runs elsewhere either
        jax.config.update("jax_platforms", "cpu")
    compile_only(make_inputs(config), TOPOLOGY.value)


def run() -> None:
    """The command `train`."""
    end_on_sigterm()
    offer_common()
    about = __doc__.replace("jaxfusion/fields.py", fields.__file__)
    run_main(main, about, FLAGS, GROUPS, with_paths)
