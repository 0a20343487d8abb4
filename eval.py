"""Scores a run: `python eval.py --workdir DIR`, the same as `jaxfusion eval`."""

from jaxfusion.commands.eval import run

if __name__ == "__main__":
    run()
