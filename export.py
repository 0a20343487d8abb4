"""Exports a trained bridge in Hugging Face format: `python export.py --workdir DIR --out HFDIR
[--merge] [--dtype bfloat16] [--overwrite]`.

HFDIR loads in plain PyTorch with `AutoModelForCausalLM.from_pretrained(HFDIR,
trust_remote_code=True)`.
"""

from pathlib import Path

from absl import flags

from jaxfusion.cli import refuse_words, run_main, set_up_logging

WORKDIR = flags.DEFINE_string("workdir", None, "workdir of a run of train.py", required=True)
OUT = flags.DEFINE_string("out", None, "directory to write", required=True)
MERGE = flags.DEFINE_bool("merge", False, "write both backbones too, not only their names")
DTYPE = flags.DEFINE_string("dtype", None, "of merged backbones: float32 or bfloat16")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace what is in HFDIR")


def main(argv: list[str]) -> None:
    refuse_words(argv)
    set_up_logging()
    from jaxfusion.training.export import export

    export(Path(WORKDIR.value), Path(OUT.value), dtype=DTYPE.value, merge=MERGE.value,
           overwrite=OVERWRITE.value)
    print(f"done: {OUT.value}")


if __name__ == "__main__":
    run_main(main)
