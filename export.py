"""Exports a run: `python export.py --workdir DIR --out HFDIR`, the same as `jaxfusion export`."""

from jaxfusion.commands.export import run

if __name__ == "__main__":
    run()
