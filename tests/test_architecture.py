"""Imports go one way, and the rooms of docs/architecture.md are those that there are."""

import ast
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import jaxfusion

PACKAGE = Path(jaxfusion.__file__).parent
ROOT = PACKAGE.parent
DRAWING = (ROOT / "docs" / "architecture.md").read_text("utf-8").split("```")[1]
ROOMS = re.findall(r"^  (\w+)/ ", DRAWING, re.MULTILINE)
BASE = {"schema", "fields", "config", "errors", "files", "background", "cli"}


def imports():
    """Every import of one part of the package by another, as (file, part, part)."""
    for file in PACKAGE.rglob("*.py"):
        part = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxfusion"):
                _, *inner = node.module.split(".")
                for name in inner[:1] or [alias.name for alias in node.names]:
                    if name != part:
                        yield file.relative_to(ROOT), part, name


def test_imports_go_one_way():
    order = {name: i for i, name in enumerate(ROOMS)} | dict.fromkeys(BASE, -1)
    order |= dict.fromkeys(("notebook", "__init__", "__main__"), len(ROOMS))
    upwards = [(str(file), name) for file, part, name in imports() if order[name] > order[part]]
    assert not upwards


def test_every_module_is_drawn():
    files = [x for x in PACKAGE.rglob("*.py") if x.stem != "__init__"]
    missing = [str(x) for x in files if not re.search(rf"\b{x.stem}\b", DRAWING)]
    assert not missing
    assert {x.parent.name for x in PACKAGE.glob("*/__init__.py")} == set(ROOMS)


@lru_cache
def names_in(module):
    """Everything that a module's text gives a name to; of a package, its modules too."""
    found = {x.stem for x in module.glob("*")}
    text = module / "__init__.py" if module.is_dir() else module.with_suffix(".py")
    for node in ast.walk(ast.parse(text.read_text("utf-8"))):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                found.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                found.add(name)
            case ast.alias(name=name, asname=other):
                found.add(other or name)
    return found


def test_what_scripts_import_is_there():
    """No test runs the benchmarks: what they import may move away unseen."""
    missing = []
    for file in (*ROOT.glob("benchmarks/*.py"), *ROOT.glob("configs/*.py"),
                 *ROOT.glob("notebooks/*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxfusion"):
                there = names_in(ROOT / node.module.replace(".", "/"))
                missing += [(file.name, x.name) for x in node.names if x.name not in there]
    assert not missing


def test_public_names_are_there_and_import_no_jax():
    code = ("import sys, jaxfusion\n"
            "jaxfusion.from_config_dict(jaxfusion.default_config())\n"
            "assert 'jax' not in sys.modules\n"
            "assert all(callable(getattr(jaxfusion, name)) for name in jaxfusion.__all__)")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
