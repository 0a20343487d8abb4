"""Serves a run: `python serve.py --workdir DIR`, the same as `jaxfusion serve`."""

from jaxfusion.commands.serve import run

if __name__ == "__main__":
    run()
