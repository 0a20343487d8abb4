"""Writes NAME.ipynb from NAME.py: `python notebooks/pair.py`. Needs the extra `test` (jupytext).

The script is what is edited and reviewed. The same script gives the same notebook, byte for byte:
cells are numbered, and there are no outputs.
"""

from pathlib import Path

import jupytext
import nbformat

FOLDER = Path(__file__).parent
SCRIPTS = sorted(file for file in FOLDER.glob("*.py") if file != Path(__file__))


def notebook(script: Path) -> str:
    """The notebook of a percent script, as the text of its file."""
    made = jupytext.read(script)
    del made.metadata["jupytext"]
    made.nbformat, made.nbformat_minor = 4, 5
    for number, cell in enumerate(made.cells):
        cell.id = f"cell-{number}"
    nbformat.validate(made)
    return nbformat.writes(made) + "\n"


if __name__ == "__main__":
    for script in SCRIPTS:
        script.with_suffix(".ipynb").write_text(notebook(script), "utf-8")
        print(script.with_suffix(".ipynb"))
