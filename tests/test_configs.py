"""Every config runs at its debug size, no field is dead, and the scripts refuse in one line."""

import ast
import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import BRIDGES, FILES, ROOT, get_config, run_script

from configs.common import finish
from jaxfusion import config as configs
from jaxfusion.bridge import warm_start
from jaxfusion.bridge.job import train
from jaxfusion.config import default_config, first_stage, from_config_dict, variants
from jaxfusion.data.rows.examples import read_examples
from jaxfusion.data.tasks.catalogue import TASKS, get_task
from jaxfusion.errors import InputError
from jaxfusion.fields import JOBS, GroupConfig, MeshConfig
from jaxfusion.miniatures.checkpoints import SIZES
from jaxfusion.miniatures.inputs import make_inputs
from jaxfusion.runs.score import evaluate
from jaxfusion.sharding.mesh import make_mesh

SCORED = ("xnli_paper",)  # the paper's
OTHERS = [file for file in BRIDGES if file.stem not in SCORED]
# Trained like the paper's, on other rows.
ALIKE = ("amazon_paper", "news_paper", "xnli_file")


@pytest.mark.parametrize("file", [
    *(file for file in BRIDGES if file.stem in SCORED),
    *(pytest.param(file, marks=pytest.mark.slow) for file in OTHERS)],
    ids=lambda file: file.stem)
def test_debug_runs_from_start_to_results(file, cache_dir, tmp_path):
    config = get_config(file, "debug").unlock()
    config.train.steps, config.train.eval_every, config.data.dev_rows = 4, 4, 8
    config = make_inputs(from_config_dict(config))
    state = train(config, tmp_path / "run")
    assert int(state.step) == config.train.steps
    results, _ = evaluate(tmp_path / "run", limit=5, languages=(config.data.language,))
    (languages,) = results.values()
    assert languages[config.data.language]["exact_match"]["n"] == 5


@pytest.mark.parametrize("file", [
    pytest.param(file, marks=pytest.mark.slow) if file.stem in ALIKE else file for file in OTHERS],
    ids=lambda file: file.stem)
def test_debug_runs_take_a_step(file, cache_dir, tmp_path, unscored, monkeypatch):
    monkeypatch.setattr(warm_start, "STEPS", 20)
    config = get_config(file, "debug").unlock()
    config.train.steps = config.train.eval_every = 1
    config.data.train_rows, config.data.dev_rows = 32, 8
    assert int(train(make_inputs(from_config_dict(config)), tmp_path / "run").step) == 1


@pytest.mark.parametrize("words", ["layer", "compare", "methods"])
def test_debug_fits_every_word_of_real_topics(words, cache_dir):
    """The layers of the tiny encoder, and rows made for a variant's first stage."""
    (file,) = (file for file in FILES if file.stem == "real_topics")
    config = make_inputs(from_config_dict(get_config(file, f"{words},debug")))
    runs = variants(config) if words != "layer" else {words: config}
    for run in runs.values():
        assert run.fusion.layer <= SIZES["tiny"][0].num_layers and run.train.steps <= 200
        stages = [run, first_stage(run)] if run.first else [run]
        assert all((Path(stage.data.path) / f"train-{x}.jsonl").is_file() for stage in stages
                   for x in get_task(stage.data.task, stage.tasks).training_languages(
                       stage.data.language))
    with_first = ["layer 11, translations first"] if words == "methods" else []
    assert [name for name, run in runs.items() if run.first] == with_first


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_config_is_locked_documented_and_survives_json(file, tmp_path):
    config = from_config_dict(get_config(file))
    configs.save(config, tmp_path / "config.json")
    assert configs.load(tmp_path / "config.json") == config
    assert get_config(file).is_locked
    text = file.read_text()
    assert f"--config configs/{file.name}" in text and "Needs:" in text
    assert "Published:" in text or file not in BRIDGES


def test_configs_start_no_jax():
    code = (
        "import sys, runpy\n"
        f"[runpy.run_path(str(f))['get_config']('debug') for f in {list(map(str, FILES))}]\n"
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_every_field_is_read_somewhere():
    read = set()
    for file in [*(ROOT / "jaxfusion").rglob("*.py"), *ROOT.glob("*.py")]:
        attributes = [x for x in ast.walk(ast.parse(file.read_text()))
                      if isinstance(x, ast.Attribute)]
        read |= {x.attr for x in attributes if isinstance(x.ctx, ast.Load)}

    def fields(kind):
        for field in dataclasses.fields(kind):
            yield field.name
            default = field.default
            if dataclasses.is_dataclass(default) and type(default) is not MeshConfig:
                yield from fields(type(default))

    jobs = (name for job in JOBS.values() for name in fields(job))
    assert not {*jobs, *(f.name for f in dataclasses.fields(GroupConfig))} - read
    # A mesh's go by name to the function that makes it.
    mesh = {f.name for f in dataclasses.fields(MeshConfig)}
    assert mesh == set(inspect.signature(make_mesh).parameters) - {"devices"}


def test_unknown_fields_and_wrong_types_are_named():
    config = default_config()
    config.fusion.nam = "last"
    with pytest.raises(InputError, match=r"field 'fusion\.nam' \(did you mean 'name'"):
        from_config_dict(config)
    config = default_config()
    with config.ignore_type():
        config.train.batch_size = "8"
    with pytest.raises(InputError, match=r"'train\.batch_size' is '8', expected a whole number"):
        from_config_dict(config)
    with pytest.raises(InputError, match="unknown config argument 'globl_softmax'"):
        finish(default_config(), "globl_softmax")


@pytest.mark.parametrize("words,message", [
    (["--config=configs/xnli_paper.py:debug", "--config.fusoin.name=last"], "fusoin"),
    (["--config=configs/xnli_paper.py:debug", "--config.fusion.name=globalsoftmax"],
     "did you mean 'global_softmax'?"),
    (["--config=configs/xnli_paper.py:debug", "--config.encoder.checkpoint=/no/where"],
     "neither a directory nor a hub id"),
    (["--config=configs/xnli_paper.py:debug", "--config.train.batch_size=many"], "many"),
    (["--config=configs/xnli_paper.py:globl_softmax"], "did you mean 'global_softmax'?"),
    (["--config=configs/absent.py"], "absent.py"),
])
def test_train_refuses_in_one_line(words, message, cache_dir, tmp_path):
    said = run_script("train.py", *words, f"--workdir={tmp_path / 'run'}")
    assert said.startswith("error: ") and message in said and "\n" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [[], ["--config="], ["--config=:debug"]])
def test_without_a_config_all_are_listed(words, capsys):
    assert "--config is missing" in run_script("train.py", *words)
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()] == [
        file.stem for file in FILES]
    assert "XNLI run (arXiv:2508.09091)" in out


@pytest.mark.parametrize("script,words", [
    ("train.py", ["--config=configs/xnli_paper.py:debug", "--config.data.path=/none/here"]),
    ("eval.py", []), ("export.py", ["--out=/tmp/out"])])
def test_a_refused_command_says_one_line_and_no_more(script, words, cache_dir, tmp_path):
    done = subprocess.run([sys.executable, script, *words, f"--workdir={tmp_path / 'run'}"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_quickstart_finds_its_llm_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = ROOT / "configs" / "lens_quickstart.py"
    assert (Path(get_config(file).decoder.checkpoint) / "config.json").is_file()


@pytest.mark.parametrize("llm,name", [("llama3", "Llama-3-8B"), ("llama31", "Llama-3.1-8B"),
                                      ("phi35", "Phi-3.5"), ("qwen25", "Qwen2.5-7B")])
def test_published_lens_probes_other_prompts_than_it_trains_on(llm, name):
    config = get_config(ROOT / "configs" / "lens_paper.py", f"multilingual,{llm}")
    assert name in config.decoder.checkpoint and len(config.data.targets) == 6
    assert config.data.get("probe_path") not in (None, config.data.path)
    assert (config.data.probe_rows, config.data.rows) == (300, 200)
    assert "m_mmlu" in config.eval.tasks and "mmmlu" not in config.eval.tasks


def test_langbridge_has_its_authors_lengths_and_no_end_of_targets():
    file = ROOT / "configs" / "langbridge.py"
    config = get_config(file)
    assert (config.data.get("max_total_tokens"), config.data.get("target_eos")) == (1152, False)
    assert "eval.py --workdir runs/langbridge --tasks mgsm" in " ".join(file.read_text().split())


@pytest.mark.parametrize("tasks", [(), ("pocket_nli", "pocket_qa")])
def test_every_task_of_a_debug_run_has_its_own_rows(tasks, cache_dir):
    config = get_config(ROOT / "configs" / "lens_quickstart.py", "debug").unlock()
    config.eval.tasks = tasks
    place = make_inputs(from_config_dict(config)).data.task_path
    for name in tasks:
        rows = read_examples(name, TASKS[name], "test", "en", place)
        assert bool(TASKS[name].labels) == (rows[0].label >= 0)
