"""What else is served: exports of bridges, runs of Lens, and LLMs in Hugging Face format."""

import json
import re
import shutil
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from helpers import change_tower, equal, make_run, run_script
from safetensors.numpy import save_file
from starlette.testclient import TestClient

from jaxfusion import config as configs
from jaxfusion.data.tokenizers import load_tokenizer
from jaxfusion.errors import InputError
from jaxfusion.fields import DecoderSettings, LensConfig, LensRunConfig, ParallelConfig, TaskConfig
from jaxfusion.files import write_checked
from jaxfusion.runs.adopt import adopt
from jaxfusion.runs.export.bridge import export
from jaxfusion.runs.export.tower import export_lens
from jaxfusion.runs.exported import open_export
from jaxfusion.runs.open_llm import open_checkpoint, open_lens
from jaxfusion.runs.open_run import open_run
from jaxfusion.serving.app import make_app
from jaxfusion.serving.batcher import Batcher
from jaxfusion.serving.served import open_models
from jaxfusion.training.checkpoint import Checkpoints
from jaxfusion.training.origin import ORIGIN, check_origin, origin_of
from jaxfusion.training.state import State

TEXT = "la ru so. bako dimofu"


@contextmanager
def serving(place):
    """A client of what is served of a directory, and the names of its models."""
    opened, models = open_models(place)
    with TestClient(make_app(models, Batcher(opened.on_mesh))) as client:
        yield client, list(models)


def answer(client, model):
    """A model's choices for one message."""
    return client.post("/v1/chat/completions", json={
        "model": model, "max_tokens": 6, "messages": [{"role": "user", "content": TEXT}],
    }).json()["choices"]


def explained(client, model):
    """What the page shows below an answer."""
    return client.post("/api/explain", json={"model": model, "text": TEXT}).json()


def test_an_export_is_served_as_its_run_is(tiny, tmp_path):
    """Its task comes from the export; its backbones are inside or elsewhere."""
    run, inside, elsewhere = (tmp_path / x / "mine" for x in ("run", "inside", "elsewhere"))
    make_run(run, tiny, "global_softmax")
    export(run, inside, merge=True)
    export(run, elsewhere)
    found = []
    for place in (run, inside):
        with serving(place) as (client, names):
            found.append([client.get("/api/about").json(), answer(client, "mine"), names,
                          explained(client, "mine")])
    assert found[0] == found[1] and found[0][0]["task"] == "xnli"
    assert equal(open_export(elsewhere).params, open_models(run)[1]["mine"].params)
    described = json.loads((elsewhere / "config.json").read_text())
    del described["trained_on"]  # as in earlier exports
    (elsewhere / "config.json").write_text(json.dumps(described))
    task = open_export(elsewhere).task
    assert task.prompt == "{text}" and not task.labels


def test_an_export_keeps_task_limits_and_dtypes(tiny, tmp_path):
    make_run(tmp_path / "run", tiny)
    file = tmp_path / "run" / "config.json"
    config = configs.load(file)
    config = replace(
        config, data=replace(config.data, task="mine", language="de", bos=False,
                             target_eos=False),
        tasks={"mine": TaskConfig("{a} or {b}?", ("this", "that"), ("de",),
                                 columns={"label": "which"}, spellings=("x", "y"))},
        eval=replace(config.eval, max_new_tokens=7, max_encoder_tokens=60,
                     max_decoder_tokens=70, stop=("\n",), temperature=0.5),
        decoder=replace(config.decoder, dtype="bfloat16"))
    configs.save(config, file)
    export(tmp_path / "run", tmp_path / "out")
    back = open_export(tmp_path / "out").config
    assert back.eval == replace(config.eval, batch_size=back.eval.batch_size)
    assert (back.data.bos, back.data.target_eos, back.data.language) == (False, False, "de")
    assert back.tasks == config.tasks
    assert (back.encoder.dtype, back.decoder.dtype) == ("float32", "bfloat16")


def test_a_run_that_was_scored_without_answers_still_gives_some(tiny, tmp_path):
    make_run(tmp_path / "run", tiny)
    file = tmp_path / "run" / "config.json"
    config = configs.load(file)
    configs.save(replace(config, eval=replace(config.eval, max_new_tokens=0)), file)
    export(tmp_path / "run", tmp_path / "out")
    for place in (tmp_path / "run", tmp_path / "out"):
        assert open_models(place)[1][place.name].scorer.config.max_new_tokens == 16


@pytest.fixture(scope="module")
def lensed(tiny, tmp_path_factory):
    """A run of Lens whose top block is another one."""
    workdir = tmp_path_factory.mktemp("lens") / "moved"
    workdir.mkdir()
    config = LensRunConfig(
        decoder=DecoderSettings(str(tiny / "decoder")),
        data=ParallelConfig(path="rows.jsonl", targets=("si",), chat_template=False),
        lens=LensConfig(blocks=1))
    configs.save(config, workdir / "config.json")
    blocks = traverse_util.flatten_dict(open_checkpoint(tiny / "decoder").params, sep="/")
    rng = np.random.default_rng(0)
    part = {path: jnp.asarray(rng.normal(0, 0.5, x[-1:].shape), jnp.float32)
            for path, x in blocks.items() if path.startswith("decoder/blocks/")}
    save_step(workdir, 3, part)
    return workdir


def save_step(workdir, step, part):
    """A checkpoint of a step."""
    checkpoints = Checkpoints(workdir)
    checkpoints.save(State(jnp.array(step), part, ()), {}, None)
    checkpoints.close()


def test_an_llm_is_served_and_one_of_lens_beside_the_one_before(tiny, lensed, tmp_path):
    export_lens(lensed, tmp_path / "moved")
    answers = {}
    for place in (lensed, tmp_path / "moved", tiny / "decoder"):
        with serving(place) as (client, names):
            about = client.get("/api/about").json()
            assert (about["llm"], about["task"]) == ("llm" if place == lensed else None, None)
            assert about["columns"] == ["text"] and len(about["examples"]) == 10
            answers |= {(place, name): answer(client, name) for name in names}
            assert explained(client, place.name) == {
                "labels": [], "fusion": None, "tokens": None, "weights": None}
    moved, before = answers[lensed, "moved"], answers[lensed, "llm"]
    assert moved == answers[tmp_path / "moved", "moved"] != before
    assert before == answers[tiny / "decoder", "decoder"]
    for kind, line in ((tiny / "encoder", "mt5"), (lensed.parent, "is not a workdir of a run")):
        assert line in run_script("serve.py", f"--workdir={kind}", "--port=0")


def test_a_run_of_lens_behind_a_bridge_is_the_bridge_with_its_llm(tiny, lensed, tmp_path):
    """As a bridge that gets the exported LLM is (docs/lens.md)."""
    run, place = tmp_path / "bridge", tmp_path / "mine"
    model = make_run(run, tiny, "global_softmax")
    shutil.copytree(lensed, place)
    config = configs.load(place / "config.json")
    configs.save(replace(config, bridge=str(run)), place / "config.json")
    export_lens(place, tmp_path / "lensed")
    export(run, tmp_path / "exported")
    adopt(str(tmp_path / "exported"), tmp_path / "together", decoder=str(tmp_path / "lensed"))
    (_, served), (_, wanted), (_, before) = map(open_models, (place, tmp_path / "together", run))
    assert list(served) == ["mine", "llm"] and not served["mine"].bare
    assert equal(served["mine"].params, wanted["together"].params)
    assert equal(served["llm"].params["decoder"], wanted["llm"].params["decoder"])
    assert not equal(served["llm"].params["decoder"], before["llm"].params["decoder"])
    write_checked(place / ORIGIN, json.dumps(open_run(run).origin))
    open_lens(place)
    # The bridge is trained further. An export has the LLM alone, which is the same.
    save_step(run, 4, {path: 1.5 * x for path, x in model.trainable.items()})
    with pytest.raises(InputError, match=(
            rf"mine was made from step 3 of {run} \(bridge \w{{8}}\), and now there is step 4 of "
            rf"{run} \(bridge \w{{8}}\): put the earlier one back, .* away {place}/model.json")):
        open_models(place)
    export_lens(place, tmp_path / "lensed", overwrite=True)
    shutil.rmtree(run)
    with pytest.raises(InputError, match=r"bridge that cannot be opened: .*put the exported LLM"):
        open_models(place)


def test_a_run_of_lens_is_that_of_the_llm_it_was_trained_on(tiny, lensed, tmp_path, caplog):
    """Its record tells; of an earlier version's run the probe beside it; of others nothing does."""
    llm, sweep, place = tmp_path / "llm", tmp_path / "run", tmp_path / "run" / "Lens"
    shutil.copytree(tiny / "decoder", llm)
    shutil.copytree(lensed, place)
    config = configs.load(place / "config.json")
    configs.save(replace(config, decoder=DecoderSettings(str(llm))), place / "config.json")
    export_lens(place, tmp_path / "out")
    assert f"{llm} is not compared with it" in caplog.text
    caplog.clear()

    def now():
        return origin_of({"decoder": (llm, load_tokenizer(llm, 512, "decoder"))}, str(llm))

    before = now()
    change_tower(llm)
    save_file({}, sweep / "probe.safetensors", {"identity": json.dumps(
        {**before, "source": "an LLM"})})
    with pytest.raises(InputError, match=r"from an LLM .* away .*run/probe\.safetensors$"):
        open_lens(place)
    write_checked(place / ORIGIN, json.dumps({**before, "rows": "a"}))
    with pytest.raises(InputError, match=rf"made from {llm} \(LLM .* away {place}/model\.json "
                       r"and .*safetensors$") as said:
        export_lens(place, tmp_path / "changed")
    files = re.search(r"move away (.*) and (.*)", str(said.value)).groups()
    for file in files:  # what the line advises is enough
        Path(file).rename(f"{file}.away")
    check_origin(place, now())
    assert f"{llm} is not compared with it" in caplog.text
    caplog.clear()
    for file in files:
        Path(f"{file}.away").rename(file)
    with pytest.raises(InputError, match=r"\(LLM \w{8}\)"):
        check_origin(place, {**now(), "source": "an LLM"})
    with pytest.raises(InputError, match="trained on other rows than its files have now"):
        check_origin(place, {**before, "rows": "b"})
    write_checked(place / ORIGIN, json.dumps(now()))
    export_lens(place, tmp_path / "changed")
    assert not caplog.text


def test_a_checkpoint_has_its_own_template_and_dtype(lensed, tmp_path):
    export_lens(lensed, tmp_path / "half", dtype="bfloat16")
    assert not open_checkpoint(tmp_path / "half").config.data.chat_template
    (tmp_path / "half" / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}lala {{ m.content }} bako :{% endfor %}")
    opened, models = open_models(tmp_path / "half")
    model = models["half"]
    assert {str(x.dtype) for x in jax.tree.leaves(model.params)} == {"bfloat16"}
    assert opened.config.data.chat_template
    read = model.tokenizers.decoder.decode(model.prompt("so ru").text)
    assert "lala so ru bako" in read and "lala" not in model.tokenizers.decoder.decode(
        model.literal("so ru").text)
