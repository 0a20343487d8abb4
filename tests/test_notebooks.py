"""The notebooks run in pocket mode from start to end, are in step with their scripts, and refuse in
one line."""

import importlib.util
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
from helpers import ROOT
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from transformers import AutoConfig, AutoTokenizer

from jaxfusion import notebook
from jaxfusion.errors import InputError
from jaxfusion.evaluation.layers import retrieval_accuracy
from jaxfusion.hf import hub
from jaxfusion.notebook import BRIDGES, GIB, LLMS, Device
from jaxfusion.reports.page import token_table

NAMES = ("bridge_colab_tpu", "explore_layers", "lens_colab_tpu")
# Pictures that each shows, and files that it leaves.
LEAVES = {
    "bridge_colab_tpu": (2, ("runs/bridge/table.tex", "runs/bridge/report.html")),
    "explore_layers": (3, ("runs/explore/layers.md", "runs/explore/retrieval.png")),
    "lens_colab_tpu": (3, ("runs/lens/table.tex", "runs/lens/moved/report.md")),
}
TPU = Device("TPU v5 lite", 1, 15.75 * GIB)


def pair():
    spec = importlib.util.spec_from_file_location("pair", ROOT / "notebooks" / "pair.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(book, folder: Path, **env):
    """Executes a notebook with a fresh kernel in a folder; its outputs are in it afterwards.

    XLA compiles as it does for users, not as for other tests: here most of the time is computing.
    """
    client = NotebookClient(book, timeout=600, kernel_name="python3",
                            resources={"metadata": {"path": str(folder)}})
    client.execute(env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "", **env})
    return book


def outputs(book):
    return [x for cell in book.cells if cell.cell_type == "code" for x in cell.outputs]


def said(book, stream: str) -> str:
    return "".join(x.text for x in outputs(book) if x.output_type == "stream" and x.name == stream)


def check(book, name: str) -> None:
    """Raises unless a run went as a user would want it."""
    assert said(book, "stderr") == ""
    assert "warning" not in said(book, "stdout").lower()
    shown = [x.data for x in outputs(book) if x.output_type == "display_data"]
    assert sum("image/png" in data for data in shown) == LEAVES[name][0]
    assert any("| --- |" in data.get("text/markdown", "") for data in shown)


def smaller(book):
    """The notebook of Lens on fewer rows and steps, which still shows and leaves everything."""
    for old, new in (("TASK_ROWS = 96, 96, 48, 96", "TASK_ROWS = 16, 16, 8, 12"),
                     ("STEPS, RATE = 40,", "STEPS, RATE = 4,")):
        cell, = [cell for cell in book.cells if old in cell.source]
        cell.source = cell.source.replace(old, new)
    return book


@pytest.mark.parametrize("name,whole", [
    pytest.param("lens_colab_tpu", False, marks=pytest.mark.slow),
    *(pytest.param(x, True, marks=pytest.mark.slow) for x in NAMES)])
def test_pocket_mode_runs_from_start_to_end(name, whole, cache_dir, tmp_path):
    book = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4)
    if whole:
        run(book, tmp_path, POCKET="1")
    else:
        run(smaller(book), tmp_path, POCKET="1", XLA_FLAGS=os.environ["XLA_FLAGS"])
    check(book, name)
    for file in LEAVES[name][1]:
        assert (tmp_path / file).stat().st_size > 100
    if name == "explore_layers":
        html = "".join(x.data.get("text/html", "") for x in outputs(book) if "data" in x)
        assert 'dir="auto"' in html and "සෙ" in html
    elif name == "bridge_colab_tpu":
        exported = tmp_path / "exported_bridge"
        found = AutoConfig.from_pretrained(exported, trust_remote_code=True)
        assert found.model_type == "jaxfusion_bridge"
        for part in ("encoder", "decoder"):
            assert AutoTokenizer.from_pretrained(exported / part).vocab_size > 100
            assert AutoConfig.from_pretrained(exported / part).vocab_size > 100
        accuracy = json.loads((tmp_path / "runs/bridge/report.json").read_text())["languages"]
        assert accuracy["transformer_softmax"]["en"]["accuracy"] > 0.6  # a third is chance
    else:
        exported = tmp_path / "exported_lens"
        assert AutoConfig.from_pretrained(exported).model_type == "llama"
        assert AutoTokenizer.from_pretrained(exported).vocab_size > 100


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_second_run_goes_on_with_what_is_there(name, cache_dir, tmp_path):
    for _ in range(2):
        book = run(nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", 4), tmp_path, POCKET="1")
        check(book, name)
    assert "finished: " in said(book, "stdout")
    assert not any("examples/s" in x.data.get("text/plain", "")
                   for x in outputs(book) if x.output_type == "display_data")


@pytest.mark.parametrize("name", NAMES)
def test_the_pair_is_in_step_and_opens_with_what_a_user_must_know(name):
    made = pair()
    assert [file.stem for file in made.SCRIPTS] == list(NAMES)
    text = (ROOT / "notebooks" / f"{name}.ipynb").read_text("utf-8")
    assert text == made.notebook(ROOT / "notebooks" / f"{name}.py"), "python notebooks/pair.py"
    book = nbformat.reads(text, 4)
    assert not outputs(book)
    head = book.cells[0].source
    for words in ("What it does.", "What it needs.", "How long it takes.", "Open in Colab"):
        assert words in head
    owner, = set(re.findall(r"github(?:\.com)?/(\w+/\w+)", text)) - {"MicrosoftTranslator/NTREX"}
    assert f"github/{owner}/blob/main/notebooks/{name}.ipynb)" in head
    assert f'REPOSITORY = "https://github.com/{owner}"' in book.cells[1].source


def test_a_refusal_ends_its_cell_with_one_line(tmp_path):
    cell = nbformat.v4.new_code_cell(
        "from jaxfusion.notebook import start\nstart(False)")
    book = nbformat.v4.new_notebook(cells=[cell])
    with pytest.raises(CellExecutionError):
        run(book, tmp_path, JAX_PLATFORMS="cpu")
    line = said(book, "stderr")
    assert line.startswith("error: no TPU or GPU found: choose Runtime") and line.count("\n") == 1
    assert not [x for x in outputs(book) if x.output_type == "error"]


def test_a_cpu_serves_pocket_models_alone():
    assert notebook.find_device(pocket=True).memory is None
    with pytest.raises(InputError, match=r"no TPU or GPU found.*POCKET = True"):
        notebook.find_device(pocket=False)


@pytest.mark.parametrize("stats, kind, memory", [
    ({"bytes_limit": 5e9}, "Tesla T4", 5e9), (None, "TPU v5 lite", 15.75 * GIB),
    (None, "unheard of", notebook.UNKNOWN),
])
def test_memory_is_what_the_device_tells_or_its_data_sheet(monkeypatch, stats, kind, memory):
    import jax

    device = SimpleNamespace(platform="gpu", device_kind=kind, memory_stats=lambda: stats)
    monkeypatch.setattr(jax, "devices", lambda: [device, device])
    assert notebook.find_device(False) == Device(kind, 2, memory)


def test_a_device_that_cannot_be_used_is_told(monkeypatch):
    import jax

    def refuse():
        raise RuntimeError("Unable to initialize backend 'tpu': busy\nmore")

    monkeypatch.setattr(jax, "devices", refuse)
    with pytest.raises(InputError, match=r"device \(Unable .*: busy\): choose Runtime > Change"):
        notebook.find_device(False)


def test_another_jax_is_told(monkeypatch):
    notebook.check_jax()
    true = notebook.metadata.version
    monkeypatch.setattr(notebook.metadata, "version", lambda name: "0.4.30")
    with pytest.raises(InputError, match=r"has jax 0\.4\.30, jaxfusion needs jax .*install cell"):
        notebook.check_jax()
    monkeypatch.setattr(notebook.metadata, "version", true)
    monkeypatch.setattr("jax.__version__", "0.4.30")
    with pytest.raises(InputError, match=r"jax 0\.4\.30 was loaded before .*Restart session"):
        notebook.check_jax()


def test_the_largest_models_that_fit_are_picked(monkeypatch, capsys):
    monkeypatch.setattr(notebook, "check_access", lambda *_: None)
    assert notebook.pick_models(TPU, BRIDGES) == BRIDGES[1]
    assert "mt5-large and Qwen/Qwen2.5-1.5B-Instruct: 3.9 GiB" in capsys.readouterr().out
    assert notebook.pick_models(TPU, LLMS)[1] == "Qwen/Qwen2.5-3B-Instruct"
    assert notebook.pick_models(Device("TPU v2", 8, 7.5 * GIB), BRIDGES) == BRIDGES[2]
    own = ("google/mt5-base", "meta-llama/Llama-3.2-1B-Instruct")
    assert notebook.pick_models(TPU, BRIDGES, own) == own


def test_too_little_memory_is_told_with_what_fits(monkeypatch):
    monkeypatch.setattr(notebook, "check_access", lambda *_: None)
    own = ("google/mt5-xl", "Qwen/Qwen2.5-7B-Instruct")
    with pytest.raises(InputError, match=r"take 17\.3 GiB .*1 × TPU v5 lite, 15\.8 GiB each; "
                                         r"choose google/mt5-large and Qwen/Qwen2\.5-1\.5B"):
        notebook.pick_models(TPU, BRIDGES, own)
    with pytest.raises(InputError, match="choose pocket models"):
        notebook.pick_models(Device("small", 1, GIB), BRIDGES)


def test_a_hub_out_of_reach_is_told(monkeypatch, tiny):
    monkeypatch.setattr(hub, "hub_in_reach", lambda: False)
    notebook.check_access(str(tiny / "encoder"), "another")
    with pytest.raises(InputError, match=r"hub cannot .* and google/mt5-large is not cached"):
        notebook.check_access("google/mt5-large", "another")


def test_a_gated_model_without_a_token_is_told(monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    def refuse(kind):
        def auth_check(name):
            raise kind("no", response=SimpleNamespace(headers={}, request=None, status_code=403))
        monkeypatch.setattr(huggingface_hub, "auth_check", auth_check)

    monkeypatch.setattr(hub, "hub_in_reach", lambda: True)
    refuse(errors.GatedRepoError)
    name = "meta-llama/Llama-3.2-1B-Instruct"
    with pytest.raises(InputError, match=rf"{name} is gated.*HF_TOKEN.*or choose open, which is"):
        notebook.check_access(name, "open")
    refuse(errors.RepositoryNotFoundError)
    with pytest.raises(InputError, match=r"not on the hub, or is private.*choose open"):
        notebook.check_access("meta-llama/Lama", "open")


def test_a_pickle_is_converted_once_and_again_in_another_session(monkeypatch, tmp_path, tiny):
    made = []

    def convert(name, out):
        made.append(name)
        out.mkdir(parents=True)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jaxfusion.hf.convert.convert", convert)
    assert notebook.converted(str(tiny / "encoder")) == str(tiny / "encoder")
    first = notebook.converted("google/mt5-small")
    assert notebook.converted("google/mt5-small") == notebook.converted(first) == first
    Path(first).rmdir()
    assert notebook.converted(first) == first and made == ["google/mt5-small"] * 2

    def without_torch(name, out):
        raise ModuleNotFoundError("no", name="torch")

    monkeypatch.setattr("jaxfusion.hf.convert.convert", without_torch)
    with pytest.raises(InputError, match=r"torch is missing; .* google/mt5-base: run %pip install"):
        notebook.converted("google/mt5-base")


def test_translations_are_found_once_the_languages_means_are_gone():
    rng = np.random.default_rng(0)
    meaning = rng.normal(size=(2, 20, 8))
    # Layer 1 knows what is meant, layer 2 does not; both know the language.
    other = np.stack([meaning[0], rng.normal(size=(20, 8))]) + 30 * rng.normal(size=8)
    assert retrieval_accuracy(other, meaning)[0] < 0.5
    first, second = retrieval_accuracy(other, meaning, centred=True)
    assert first == 1.0 and second < 0.5


def test_tokens_are_a_table_in_their_own_direction():
    html = token_table({"tokens": ["<b>", "سيري"], "weights": [[0.25, 0.75], [1.0, 0.0]]})
    assert html.count('dir="auto"') == 2 and "&lt;b&gt;" in html and "سيري" in html
    assert re.findall(r">(\d+)</td>", html) == ["25", "75", "100", "0"]
