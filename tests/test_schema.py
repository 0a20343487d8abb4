"""Values of configs and flags: each is right, or refused in one line before anything starts."""

import dataclasses
import itertools
import json
import math
from types import SimpleNamespace

import pytest
from helpers import leaves, run_script
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxfusion.config import changed, check, default_config, from_config_dict, from_json, load
from jaxfusion.errors import InputError
from jaxfusion.fields import FUSIONS, JOBS

BAD = ("x", "", -1, -2.5, 0, 0.5, 10**20, 1e300, math.nan, math.inf, True, None, [], [0], [-5],
       [""], {}, {"x": 1}, "(", "\x00", "[/b]")


def with_value(job, path, value):
    """The default config of a job as JSON has it, with one field changed."""
    values = json.loads(json.dumps(dataclasses.asdict(JOBS[job]())))
    *outer, name = path
    place = values
    for part in outer:
        place = place[part]
    place[name] = value
    return values


CASES = [(job, path, value) for job, kind in JOBS.items()
         for path in leaves(json.loads(json.dumps(dataclasses.asdict(kind()))))
         for value in BAD]


def test_every_field_takes_a_value_or_says_in_one_line_why_not():
    """Wrong type, negative, zero, huge and no number, for every field of every
    job, from the schema itself."""
    assert len(CASES) >= 1000
    refused = 0
    for job, path, value in CASES:
        values, name = with_value(job, path, value), path[-1]
        try:
            config = from_json(values)
        except InputError as error:
            refused += 1
            said = str(error)
            assert "\n" not in said and (name in said or "unknown" in said), (path, value)
            continue
        again = json.loads(json.dumps(dataclasses.asdict(config)))
        assert again == json.loads(json.dumps(values)), (path, value)  # nothing was changed
    assert refused > len(CASES) / 2


@pytest.mark.parametrize("job, path, value, said", [
    ("bridge", "fusion.dropout", 2.0, "expected less than 1"),
    ("bridge", "encoder.dropout", -1.0, "expected 0 or more"),
    ("bridge", "fusion.noise", -1.0, "expected 0 or more"),
    ("bridge", "optimizer.clip_norm", 0.0, "expected more than 0"),
    ("bridge", "optimizer.b1", 2.0, "expected less than 1"),
    ("bridge", "optimizer.groups.bridge.learning_rate", -1.0, "expected 0 or more"),
    ("bridge", "optimizer.groups.bridge.patterns", ["("], "not a regular expression"),
    ("bridge", "data.buckets", [], "expected one entry or more"),
    ("bridge", "data.buckets", [0], "expected 1 or more"),
    ("bridge", "mesh.fsdp", -3, "expected 1 or more, or -1"),
    ("bridge", "train.seed", -1, "expected 0 or more"),
    ("bridge", "train.seed", 10**20, "expected"),
    ("bridge", "train.steps", 10**23, "expected"),
    ("bridge", "fusion.d_ff", 0, "expected 1 or more"),
    ("bridge", "projector.latents", 0, "expected 1 or more"),
    ("bridge", "seeds", [1, 1], "has a seed twice"),
    ("bridge", "tasks", {"mine": {"labels": [""]}}, "expected a text that is not empty"),
    ("bridge", "data.task", "", "expected a text that is not empty"),
    ("bridge", "data.language", "", "expected a text that is not empty"),
    ("bridge", "data.path", "", "expected a text that is not empty"),
    ("bridge", "data.revision", "", "expected a text that is not empty"),
    ("bridge", "encoder.revision", "", "expected a text that is not empty"),
    ("bridge", "train.init_from", "", "expected a text that is not empty"),
    ("bridge", "eval.tasks", [""], "expected a text that is not empty"),
    ("bridge", "tasks", {"mine": {"source": ""}}, "expected a text that is not empty"),
    ("bridge", "optimizer.groups", {}, "expected one entry or more"),
    ("compare", "groups", {"low": []}, "expected one entry or more"),
    ("pretrain", "data.path", "", "expected a text that is not empty"),
    ("lens", "data.probe_path", "", "expected a text that is not empty"),
    ("lens", "lens.align", -1.0, "expected 0 or more"),
    ("pretrain", "tower.num_heads", 0, "expected 1 or more"),
])
def test_values_that_no_run_can_have(job, path, value, said):
    with pytest.raises(InputError, match=said):
        from_json(with_value(job, path.split("."), value))


def test_one_axis_of_a_mesh_is_filled_in():
    values = with_value("bridge", ("mesh", "fsdp"), -1)
    with pytest.raises(InputError, match=r"mesh\.data and mesh\.fsdp are -1, expected one of them"):
        check(from_json(values))
    values["mesh"]["data"] = 1
    check(from_json(values))


def test_an_empty_group_of_a_variant_is_refused():
    """It changed nothing, where one may have meant to train nothing."""
    config = default_config("compare")
    config.variants = ({"name": "one", "optimizer": {"groups": {}}},)
    with pytest.raises(InputError, match=r"variants\.one\.optimizer\.groups' is {}, expected the"):
        from_config_dict(config)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_layer_beyond_the_encoders_is_refused_under_every_fusion(fusion):
    from jaxfusion.miniatures.checkpoints import SIZES
    from jaxfusion.training.build import make_bridge

    config = from_json(with_value("bridge", ("fusion",), {"name": fusion, "layer": 10**6}))
    with pytest.raises(InputError, match=r"fusion\.layer is 1000000, the encoder has .* 1 to 4"):
        make_bridge(config, *SIZES["tiny"])


def test_a_target_must_have_room():
    values = with_value("bridge", ("data", "max_total_tokens"), 100)
    with pytest.raises(InputError, match=r"max_total_tokens is 100, expected more than .* 200"):
        check(from_json(values))


def test_a_run_made_before_a_field_goes_on_as_it_was(tmp_path):
    """BOS was before every row whose tokenizer names one, and an answer had 16 tokens."""
    old = json.loads(json.dumps(dataclasses.asdict(JOBS["bridge"]())))
    del old["data"]["bos"]
    old["eval"]["max_new_tokens"] = 16
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert load(tmp_path / "config.json").data.bos is True
    assert changed(load(tmp_path / "config.json"), JOBS["bridge"]()) == []


def test_a_workdir_named_like_a_pattern_is_refused(tmp_path):
    """Orbax took it for one, and no checkpoint could be read again."""
    from jaxfusion.training.workdir import check_workdir

    with pytest.raises(InputError, match="takes for a pattern; choose another --workdir"):
        check_workdir(JOBS["bridge"](), tmp_path / "a[b]")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner,
                                                                max_size=3), max_leaves=5)
PATHS = list(itertools.chain.from_iterable(
    [(job, path) for path in leaves(json.loads(json.dumps(dataclasses.asdict(kind()))))]
    for job, kind in JOBS.items()))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(PATHS), JSON)
def test_whatever_is_in_a_field_ends_in_one_line(where, value):
    try:
        check(from_json(with_value(*where, value)))
    except InputError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("words, said", [
    (("train.py", "--config=configs/xnli_paper.py:debug", "--config.nosuch=1"),
     "--config.nosuch: the config has no field 'nosuch'; its fields are in jaxfusion/fields.py"),
    (("train.py", "--config=configs/own_task.py", "--config.tasks.complaints.lables=('a',)"),
     "has no field 'lables' (did you mean 'labels'?); the command line sets only fields that the"),
    (("train.py", "--config=configs/xnli_paper.py", "--config.train.steps=1",
      "--config.data.steps=1"),
     "error: --config.data.steps: the config has no field 'steps'"),
    (("train.py", "--config=configs/xnli_paper.py", "--config.data.path=a.lange",
      "--config.data.lange=en"), "error: --config.data.lange: the config has no field 'lange'"),
    *((("train.py", f"--config=configs/{name}.py:debug", f"--config.{flag}"), f"error: {said}")
      for name, flag, said in (
        ("xnli_paper", "data.task.x=1",
         "--config.data.task.x: config.data.task is 'xnli', which has no field 'x'"),
        ("xnli_paper", "data.task[0]=1", "--config.data.task[0]: config.data.task is 'xnli', "),
        ("xnli_paper", "data.buckets[0]=1", "--config.data.buckets[0]: an entry is not set alone; "
         "set all entries together, as --config.data.buckets=…"),
        ("xnli_paper", "seeds[0]=1", "--config.seeds[0]: no such entry of config.seeds, which has "
         "0; set all together, as --config.seeds=…"),
        ("xnli_paper", "data.buckets.0=1", "--config.data.buckets.0: 'data.buckets.0' names no"),
        ("xnli_paper", "train={{}}", "--config.train: a group of fields, and those that are "
         "not given would lose what the config file says; set them one by one, as --config.train."),
        ("xnli_paper", "train.steps=1.5", "--config.train.steps=1.5: expected a whole number"),
        ("xnli_paper", "data.pack=maybe", "--config.data.pack=maybe: expected true or false"),
        ("xnli_paper", "optimizer.groups.brige.learning_rate=1.0", "--config.optimizer.groups.brige"
         ".learning_rate: the config has no field 'brige' (did you mean 'bridge'?); the command"),
        ("xnli_paper", "a.b", "--config.a.b: the config has no field 'a'; its fields are in"),
        ("quickstart", "variants[9].name=x", "--config.variants[9].name: no such entry of config."
         "variants, which has 4; expected one from config.variants[0] to config.variants[3]"),
        ("quickstart", "variants[0]=x", "--config.variants[0]: an entry is not set alone; set a "
         "field of it, as --config.variants[0].name=…"),
        ("xnli_paper", "eval.languages=en,sw", "--config.eval.languages=en,sw: would be one text "
         "with a comma in it; for several write --config.eval.languages=\"('en', 'sw')\""),
        ("lens_quickstart", "sweep[0].lens={{}}", "--config.sweep[0].lens: a group of fields, and "
         "those that are not given would lose what the config file says; set them one by one"))),
    (("export.py",), "error: missing: --workdir, --out; --help says what they are"),
    (("train.py", "--config={file}"), "invalid syntax"),
    (("train.py", "--config=configs/xnli_paper.py:debug", "--config.train.seed=-1"),
     "config field 'train.seed' is -1, expected 0 or more"),
    (("train.py", "--config=configs/xnli_paper.py:debug", "--config.data.path=/nonexistent"),
     "/nonexistent is missing: task 'xnli' reads its rows from it"),
])
def test_a_command_line_ends_in_one_line(words, said, tmp_path):
    (tmp_path / "broken.py").write_text("def get_config(:\n")
    more = [f"--workdir={tmp_path / 'run'}"] if len(words) > 1 else []
    found = run_script(*(word.format(file=tmp_path / "broken.py") for word in words), *more)
    assert found.startswith("error: ") and said in found and "\n" not in found
    assert not (tmp_path / "run").exists()


def test_a_config_file_runs_once(tmp_path):
    """It ran twice where the command line sets fields, and one that makes a directory failed."""
    (tmp_path / "own.py").write_text(
        "from pathlib import Path\n\nfrom jaxfusion.config import default_config\n\n\n"
        "def get_config():\n    Path(__file__).with_name('made').mkdir()\n"
        "    return default_config()\n")
    assert run_script("train.py", f"--config={tmp_path / 'own.py'}", "--config.train.seed=-1") == (
        "error: config field 'train.seed' is -1, expected 0 or more")


def test_a_step_of_several_seeds_is_compiled_like_any(cache_dir, capsys):
    assert run_script("train.py", "--config=configs/xnli_paper.py:debug", "--config.seeds=(0,1)",
                      "--compile_only") == ""
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["peak"] > 0


def test_a_path_that_is_missing_is_called_missing(tmp_path):
    """It was said to name no {split}."""
    from jaxfusion.data.rows.examples import read_examples
    from jaxfusion.data.tasks.catalogue import TASKS

    with pytest.raises(InputError, match=r"nonexistent is missing: task 'xnli' reads its rows"):
        read_examples("xnli", TASKS["xnli"], "train", "en", str(tmp_path / "nonexistent"))


def test_names_are_text_wherever_they_are_shown(tmp_path, capsys):
    """Names like markup, formulas and tags."""
    from jaxfusion.reports.comparison import Comparison, markdown
    from jaxfusion.reports.pictures import draw_accuracy
    from jaxfusion.reports.terminal import print_comparison

    names = ["[/b]", "$\\foo$", "<script>", "a|b"]
    c = Comparison("t", "likelihood", {name: {"[/b]": [1, 0], "x": [0, 1]} for name in names},
                   {}, names[0], {}, {})
    print_comparison(c)
    assert "[/b]" in capsys.readouterr().out
    draw_accuracy(c, tmp_path / "a.png")
    page = markdown(c)
    assert "<script>" not in page and "&lt;script&gt;" in page and "a\\|b" in page


def test_a_layer_that_there_is_not_is_refused_by_the_bridge():
    """Layer 0 of a bridge built by hand is not the last one."""
    import jax
    import jax.numpy as jnp
    from flax import linen as nn

    from jaxfusion.miniatures.checkpoints import SIZES
    from jaxfusion.nn.bridge import Bridge
    from jaxfusion.nn.decoder import Decoder
    from jaxfusion.nn.encoder import Encoder
    from jaxfusion.nn.projector import Projector

    encoder, decoder = (dataclasses.replace(x, vocab_size=8) for x in SIZES["tiny"])
    projector = Projector("linear", decoder.d_model, 0.0)
    bridge = Bridge(Encoder(encoder), Decoder(decoder), projector, "layer", 0)
    ones = jnp.ones((1, 4), jnp.int32)
    params = nn.unbox(jax.eval_shape(lambda: bridge.init(jax.random.key(0), ("encoder",))))
    batch = SimpleNamespace(enc_tokens=ones, enc_states=None, enc_segments=ones)
    with pytest.raises(ValueError, match="fusion_layer is 0, expected 1 to"):
        jax.eval_shape(lambda params: bridge.fuse(params, batch)[0], params)


def test_presets_of_a_comparison_and_a_sweep_are_checked_too():
    config = default_config("compare")
    config.variants = ({"name": "one", "fusion": {"dropout": 2.0}},)
    with pytest.raises(InputError, match=r"variants\.one\.fusion\.dropout"):
        from_config_dict(config)


@pytest.mark.parametrize("error, said", [
    ("KeyError", "KeyError:"), ("KeyError('my rows')", "KeyError: 'my rows'")])
def test_a_key_that_a_config_file_looks_for_is_no_field(error, said, tmp_path):
    (tmp_path / "lookup.py").write_text(f"def get_config(arg=None):\n    raise {error}\n")
    found = run_script("train.py", f"--config={tmp_path / 'lookup.py'}")
    assert found == f"error: the file of --config fails with {said}"
