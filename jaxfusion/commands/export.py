"""Exports what was trained in Hugging Face format: `export --workdir DIR --out HFDIR [--merge]
[--dtype bfloat16] [--format langbridge [--enc NAME] [--lm NAME]] [--overwrite]
[--push ORG/NAME [--private]]`.

A bridge loads in plain PyTorch with `AutoModelForCausalLM.from_pretrained(HFDIR,
trust_remote_code=True)`; with `--format langbridge` it is LangBridge's own layout. A pretrained
tower, and the LLM of a Lens run, is an ordinary checkpoint of its family, without remote code.
"""

from functools import partial

from absl import flags

from jaxfusion.cli import local_path, refuse_words, run_main, set_up_jax, set_up_logging
from jaxfusion.errors import InputError

FLAGS = flags.FlagValues()
text, switch = (partial(x, flag_values=FLAGS) for x in (flags.DEFINE_string, flags.DEFINE_bool))
WORKDIR = text("workdir", None, "directory of a run", required=True)
OUT = text("out", None, "directory to write", required=True)
MERGE = switch("merge", False, "write both backbones too, not only their names")
DTYPE = text("dtype", None, "of backbones or tower: float32 or bfloat16")
FORMAT = flags.DEFINE_enum("format", "jaxfusion", ["jaxfusion", "langbridge"],
                           "the layout of HFDIR", flag_values=FLAGS)
ENC = text("enc", None, "what LangBridge is to call the encoder")
LM = text("lm", None, "what LangBridge is to call the LLM")
OVERWRITE = switch("overwrite", False, "replace what is in HFDIR")
PUSH = text("push", None, "ORG/NAME: upload it to the Hugging Face hub, too")
PRIVATE = switch("private", False, "of --push: make the repository private if it is new")
GROUPS = {
    "The run": (WORKDIR, OUT, OVERWRITE),
    "What is written": (MERGE, DTYPE, FORMAT),
    "For LangBridge": (ENC, LM),
    "To the hub": (PUSH, PRIVATE),
}


def main(argv: list[str]) -> None:
    """Writes the export, and uploads it."""
    refuse_words(argv)
    set_up_logging()
    set_up_jax()
    from jaxfusion import config
    from jaxfusion.fields import LensRunConfig, PretrainConfig
    from jaxfusion.runs.export.bridge import export
    from jaxfusion.runs.export.langbridge import export_langbridge
    from jaxfusion.runs.export.push import check_push, push
    from jaxfusion.runs.export.tower import export_lens, export_tower

    workdir, out = local_path(WORKDIR.value), local_path(OUT.value)
    common = {"dtype": DTYPE.value, "overwrite": OVERWRITE.value}
    job = config.load(workdir / config.CONFIG_FILE)
    if (ENC.value or LM.value) and FORMAT.value != "langbridge":
        raise InputError("--enc and --lm are for --format langbridge")
    if PRIVATE.value and PUSH.value is None:
        raise InputError("--private is for --push ORG/NAME")
    if PUSH.value is not None:
        check_push(PUSH.value, PRIVATE.value)
    if isinstance(job, PretrainConfig | LensRunConfig):
        if MERGE.value or FORMAT.value != "jaxfusion":
            raise InputError(f"{workdir} holds no bridge: --merge and --format are for those")
        write = export_tower if isinstance(job, PretrainConfig) else export_lens
        write(workdir, out, **common)
    elif FORMAT.value == "langbridge":
        export_langbridge(workdir, out, enc=ENC.value, lm=LM.value, hub_name=PUSH.value,
                          **common)
    else:
        export(workdir, out, merge=MERGE.value, hub_name=PUSH.value, **common)
    print(f"done: {out}")
    if PUSH.value is not None:
        print(f"pushed: {push(out, PUSH.value, PRIVATE.value)}")


def run() -> None:
    """The command `export`."""
    run_main(main, __doc__, FLAGS, GROUPS)
