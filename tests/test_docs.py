"""The documents: the site builds without a warning, links lead somewhere, commands are real."""

import ast
import re
import shlex
import subprocess
import sys

import pytest
from helpers import ROOT, flags_error

PAGES = [ROOT / "README.md", ROOT / "pocket" / "README.md", ROOT / "CONTRIBUTING.md",
         *sorted((ROOT / "docs").glob("*.md"))]
HOOKS = {"setup", "forward"}  # that Flax and PyTorch call


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    """Every reference between pages, and the API's docstrings."""
    copy = tmp_path / "docs"  # the API's pages are written among the others
    subprocess.run(["cp", "-r", str(ROOT / "docs"), str(copy)], check=True)
    for name in ("jaxfusion", "configs", "benchmarks", "notebooks", "pocket", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", copy, tmp_path / "out"],
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Which fusion" in (tmp_path / "out" / "choosing.html").read_text()
    api = (tmp_path / "out" / "api" / "jaxfusion.nn.fusion.html").read_text()
    assert "TransformerSoftmax" in api and "2508.09091" in api


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name} -> {target}"
        if heading:
            titles = re.findall(r"^#+ (.*)$", there.read_text(), re.M)
            slugs = {re.sub(r"[^\w -]", "", x.lower()).replace(" ", "-") for x in titles}
            assert heading in slugs, f"{page.name} -> {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_are_there(page):
    rooms = "benchmarks|configs|jaxfusion|notebooks|pocket|tests"
    named = set(re.findall(rf"`((?:{rooms})/[\w/]+\.(?:py|sh|json|ipynb))`", page.read_text()))
    assert not [x for x in named if "NAME" not in x and not (ROOT / x).exists()]


def commands():
    """Every command of this project in the pages' bash blocks and tables."""
    found = {}
    for page in PAGES:
        text = page.read_text()
        blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S)).replace("\\\n", " ")
        ours = "(?:train|eval|export|serve)"
        inline = re.findall(rf"`((?:python {ours}\.py|jaxfusion {ours}) [^`]*)`", text)
        for line in [*blocks.splitlines(), *inline]:
            for part in re.split(r"&&|;", line.partition("  #")[0]):
                part = re.sub(r"^\s*jaxfusion (train|eval|export|serve) ", r"python \1.py ", part)
                words = part.strip().split("python ", 1)
                if len(words) == 2 and "…" not in part and not words[1].startswith(("-m venv",)):
                    found[words[1].strip()] = page.name
    return found


def check(command: str) -> str:
    """An error of the command's words; nothing is run."""
    words = shlex.split(command)
    if words[0] in ("train.py", "eval.py", "export.py", "serve.py"):
        return flags_error(words)
    if words[0] == "-m":
        name = words[1]
        file = ROOT / f"{name.replace('.', '/')}.py"
        known = name in ("pytest", "sphinx") or file.is_file()
        flags = [x.partition("=")[0] for x in words[2:] if x.startswith("--")]
        text = file.read_text() if file.is_file() else ""
        own = "argparse" in text
        unknown = [x for x in flags if own and f'"{x}"' not in text]
        return "" if known and not unknown else f"no such module or flag: {command} {unknown}"
    return "" if (ROOT / words[0]).is_file() else f"no such script: {command}"


def test_every_command_is_one_that_the_scripts_take():
    """Scripts, configs, fields and flags exist; the configs' debug runs are tests of their own."""
    found = commands()
    assert len(found) > 30
    errors = {command: check(command) for command in found}
    assert not {f"{found[c]}: {c}": error for c, error in errors.items() if error}


@pytest.mark.parametrize("command,said", [
    ("train.py --config configs/none.py", "none.py"),
    ("train.py --config configs/gpu.py --config.train.step=1", "step"),
    ("train.py --config gqu", "gqu"),
    ("eval.py --workdir a --langauges si", "langauges"), ("export.py --workdir", "workdir"),
    ("serve.py --workdir a --prot 1", "prot"),
    ("-m jaxfusion.runs.none", "no such module"), ("benchmarks/none.py", "no such script"),
    ("-m jaxfusion.runs.adopt --nothing=1", "--nothing"),
])
def test_a_command_that_is_wrong_would_be_found(command, said):
    assert said in check(command)


def test_messages_in_the_troubleshooting_page_are_in_the_code():
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    source = "\n".join(file.read_text() for file in (ROOT / "jaxfusion").rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source).replace("{{", "{").replace("}}", "}")
    messages = re.findall(r"^\| `(.*?)` \|", text, re.M)
    assert len(messages) > 10 and not [x for x in messages if x not in source]


def test_nothing_public_lacks_a_docstring():
    def missing(node, where):
        for x in node.body:
            if isinstance(x, ast.FunctionDef | ast.ClassDef) and x.name not in HOOKS:
                if not x.name.startswith("_") and not ast.get_docstring(x):
                    yield f"{where}.{x.name}"
                if isinstance(x, ast.ClassDef) and not x.name.startswith("_"):
                    yield from missing(x, f"{where}.{x.name}")

    found = []
    for file in sorted((ROOT / "jaxfusion").rglob("*.py")):
        tree = ast.parse(file.read_text())
        if file.name != "__init__.py" and not ast.get_docstring(tree):
            found.append(str(file))
        found += missing(tree, file.name)
    assert not found


@pytest.mark.parametrize("known", [
    "encoder, LLM and fusion in bfloat16 and evaluate in float32", "first 33,333 of each class",
    "two micro-batches of 4", "They shuffle all rows", "hold out 1,000 rows",
    "Arabic where the published data set has Japanese", "ends in a `TypeError`",
    "squeeze padding to the left", "300 prompts of one set and train on 200 of another",
    "1,000 rows of `alexandrainst/m_mmlu`", "Arabic letters for Arabic",
])
def test_what_differs_from_the_authors_code_is_told(known):
    page = (ROOT / "docs" / "reproducing.md").read_text()
    assert known in " ".join(page.split("## What is known to differ")[1].split())
