"""The command `jaxfusion`: names of configs, help, completion, and what a wheel has inside."""

import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers import FILES, ROOT, command, flags_error

from jaxfusion.cli import help_text, typed
from jaxfusion.commands import configs, main
from jaxfusion.commands.completion import script
from jaxfusion.errors import InputError

WITH_FLAGS = [name for name in main.COMMANDS if hasattr(command(name), "FLAGS")]


def jaxfusion(*words, cwd, **more):
    """The command as pip installs it, on the package of this checkout."""
    return subprocess.run(
        [sys.executable, "-c", "from jaxfusion.commands.main import main; main()", *words],
        cwd=cwd, env={"PYTHONPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True, **more)


@pytest.mark.parametrize("words,path", [
    (["--config", "xnli_paper"], "xnli_paper.py"),
    (["--config=xnli_paper:last,debug", "--workdir=x"], "xnli_paper.py:last,debug"),
    (["-config", "gpu:debug"], "gpu.py:debug")])
def test_a_name_is_a_config_of_the_project(words, path):
    found = configs.with_paths(["train", *words])
    assert any(word.endswith(f"{ROOT}/configs/{path}") for word in found)
    assert len(found) == len(words) + 1 and flags_error(["train.py", *words]) == ""


@pytest.mark.parametrize("words", [
    ["--config", "configs/gpu.py:debug"], ["--config=mine.py"], ["--config=./gpu"], ["--config"],
    ["--config", "--workdir=x"], ["--config="], ["--config.data.path", "gpu"], ["--workdir", "gpu"],
    ["--configs=gpu"], ["gpu"], ["--config.data.path=xnli_paper"]])
def test_a_path_and_all_else_stay_as_they_are(words):
    assert configs.with_paths(words) == words


def test_a_name_that_no_config_has():
    with pytest.raises(InputError, match=r"'xnli_papr' \(did you mean 'xnli_paper'\?\).*\.py"):
        configs.with_paths(["--config=xnli_papr:debug"])


def test_the_command_from_an_empty_directory(tmp_path):
    """Configs are found and read there, with `configs.common` that they import, and refused in a
    line that says what to type; nothing is written."""
    done = jaxfusion("train", "--config=tpu_v4:debug", "--config.fusoin.name=last", cwd=tmp_path)
    assert done.returncode == 1 and "fusoin" in done.stderr and done.stderr.count("\n") == 1
    done = jaxfusion("train", "--config=mine.py", cwd=tmp_path)
    assert done.returncode == 1 and "jaxfusion train --config xnli_paper" in done.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("argv,said", [
    ([], "jaxfusion COMMAND --help"), (["--help"], "  train  "), (["--version"], "0."),
    (["configs"], "xnli_paper       The layer-fusion paper's XNLI run")])
def test_commands_that_only_print(argv, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jaxfusion", *argv])
    if argv == ["configs"]:
        assert [line.split()[0] for line in configs.list_configs().splitlines()] == [
            file.stem for file in FILES]
        print(configs.list_configs())
    else:
        main.main()
    assert said in capsys.readouterr().out


def test_messages_name_the_command_that_works_here(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert typed("eval") == "python eval.py"
    monkeypatch.chdir(tmp_path)
    assert typed("eval") == "jaxfusion eval"


def test_python_m_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["jaxfusion", "--version"])
    runpy.run_module("jaxfusion", run_name="__main__")
    assert capsys.readouterr().out.startswith("0.")


def test_a_command_that_is_none(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["jaxfusion", "trian"])
    with pytest.raises(SystemExit, match="did you mean 'train'"):
        main.main()


@pytest.mark.parametrize("name", WITH_FLAGS)
def test_help_has_every_flag_once_and_no_librarys(name):
    module = command(name)
    text = help_text(module.__doc__, module.FLAGS, module.GROUPS)
    listed = [line.split()[0].strip("-=") for line in text.splitlines() if line.startswith("  --")]
    assert sorted(listed) == sorted(module.FLAGS) and len(listed) > 3
    assert all(len(line) <= 100 for line in text.splitlines())


def test_help_and_completion_load_nothing_heavy(tmp_path):
    """jax, orbax, transformers: each alone takes longer than a second."""
    code = ("import sys\nfrom jaxfusion.commands.main import COMMANDS\n"
            "[__import__(f'jaxfusion.commands.{x}') for x in COMMANDS]\n"
            "print({'jax', 'numpy', 'transformers', 'datasets'} & {*sys.modules})")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


def completed(line):
    """What bash offers at the end of a line, which it splits at spaces and at `=`."""
    words = line.replace("=", " = ").split(" ")
    quoted = " ".join(f"'{word}'" for word in words if word or word is words[-1])
    code = (f"{script('bash')}\nCOMP_WORDS=({quoted}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))\n"
            'COMPREPLY=(); _jaxfusion; echo "${COMPREPLY[@]}"')
    return subprocess.run(["bash", "-c", code], capture_output=True, text=True,
                          check=True).stdout.split()


@pytest.mark.parametrize("line,found", [
    ("jaxfusion ", list(main.COMMANDS)), ("jaxfusion ex", ["export"]),
    ("jaxfusion train --config xnli", ["xnli_file", "xnli_paper"]),
    ("jaxfusion train --config=xnli_p", ["xnli_paper"]),
    ("jaxfusion train --wo", ["--workdir"]), ("jaxfusion eval --to", ["--top_p"]),
    ("jaxfusion completion f", ["fish"]), ("jaxfusion train --config mine/", [])])
def test_bash_completes(line, found):
    assert completed(line) == found


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_know_every_flag(shell):
    text = script(shell)
    for name in WITH_FLAGS:
        flag = "-l {}" if shell == "fish" else "--{}"
        assert all(flag.format(x) in text for x in command(name).FLAGS)
    assert "quickstart" in text and "bash zsh fish" in text


def test_the_dockerfile_is_clean():
    hadolint = shutil.which("hadolint", path=Path(sys.executable).parent)
    done = subprocess.run([hadolint, ROOT / "docker" / "Dockerfile"], capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_a_wheel_has_the_configs_and_the_pocket_models(tmp_path):
    source = tmp_path / "source"  # building leaves directories behind
    source.mkdir()
    for name in ("jaxfusion", "configs", "pocket", "pyproject.toml", "setup.py", "README.md",
                 "LICENSE"):
        subprocess.run(["cp", "-r", ROOT / name, source], check=True)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", tmp_path,
                    source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        inside = {x for x in opened.namelist() if "__pycache__" not in x}
        entry = opened.read(next(x for x in inside if x.endswith("entry_points.txt"))).decode()
        opened.extractall(tmp_path / "site")
    assert "jaxfusion = jaxfusion.commands.main:main" in entry
    ours = {"jaxfusion": "*", "configs": "*.py", "pocket": "*/*"}
    for folder, pattern in ours.items():
        place = "" if folder == "jaxfusion" else "jaxfusion/"
        files = (ROOT / folder).rglob("*") if pattern == "*" else (ROOT / folder).glob(pattern)
        wanted = {f"{place}{x.relative_to(ROOT)}" for x in files
                  if x.is_file() and "__pycache__" not in x.parts}
        assert wanted <= inside, wanted - inside
    assert {x.split("/")[0] for x in inside if "dist-info" not in x} == {"jaxfusion"}
    empty = tmp_path / "empty"
    empty.mkdir()
    code = ("from jaxfusion.commands.main import main; import jaxfusion, sys\n"
            f"assert jaxfusion.__file__.startswith('{tmp_path}'); main()")
    done = subprocess.run([sys.executable, "-c", code, "train", "--config=quickstart:debug",
                           "--config.base.fusion.nosuch=1"], cwd=empty, capture_output=True,
                          text=True, env={"PYTHONPATH": str(tmp_path / "site"), "PATH": ""})
    assert done.stderr.startswith("error: ") and "nosuch" in done.stderr, done.stderr
