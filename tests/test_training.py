"""Training: a PyTorch twin, exact resume, what is frozen, what is refused."""

import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_reference as reference
from helpers import (
    ROOT,
    change_tower,
    equal,
    interrupt_at,
    losses,
    make_config,
    records,
    relative,
)

from jaxfusion import config as configs
from jaxfusion.bridge import job
from jaxfusion.bridge.job import prepare, train
from jaxfusion.config import default_config, from_config_dict
from jaxfusion.costs import chips
from jaxfusion.data.contamination import read_seen
from jaxfusion.data.pipeline import subset
from jaxfusion.data.rows.examples import read_examples
from jaxfusion.data.tasks.catalogue import TASKS
from jaxfusion.errors import InputError, Stopped
from jaxfusion.evaluation.scoring import Scorer, for_task
from jaxfusion.fields import (
    GroupConfig,
    OptimizerConfig,
)
from jaxfusion.files import write_checked
from jaxfusion.miniatures.checkpoints import write_checkpoints
from jaxfusion.runs.export.bridge import export
from jaxfusion.runs.open_run import open_run
from jaxfusion.runs.score import seen_by
from jaxfusion.sharding.mesh import make_mesh
from jaxfusion.training import loop
from jaxfusion.training.checkpoint import Checkpoints, trained_part
from jaxfusion.training.load import load_model
from jaxfusion.training.loop import fit
from jaxfusion.training.optimizer import group_of_each, make_optimizer, make_schedule
from jaxfusion.training.origin import ORIGIN
from jaxfusion.training.state import State, merge
from jaxfusion.training.step import gradient, make_train_step
from jaxfusion.training.trainer import Trainer, compiled_step, put_batch
from jaxfusion.training.workdir import begin


@pytest.fixture(scope="module")
def undisturbed(cache_dir, tmp_path_factory):
    """A whole run: its config, workdir and final state."""
    config = make_config(cache_dir, "transformer_softmax,debug")
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    return config, workdir, jax.device_get(train(config, workdir))


# The twin


@pytest.mark.parametrize("fusion", [
    pytest.param("last", marks=pytest.mark.slow), "global_softmax", "transformer_softmax"])
def test_twenty_steps_equal_a_pytorch_twin(cache_dir, fusion):
    """Same weights, same rows, AdamW with warm-up and cosine: losses within 1e-4."""
    config = make_config(cache_dir, f"{fusion},debug", train__steps=20, fusion__dropout=0.0)
    # Global Softmax's scale moves 1e5 times as fast as its parameter.
    rate = 1e-4 if fusion == "global_softmax" else 1e-2
    config = replace(config, optimizer=replace(config.optimizer, groups={
        "bridge": GroupConfig(("projector/.*",), 1e-2, 0.1),
        **({} if fusion == "last" else {"fusion": GroupConfig(("fusion/.*",), rate, 0.1)}),
    }))
    mesh = make_mesh()
    run = prepare(config, mesh)
    if fusion == "global_softmax":
        # Away from uniform weights, where the scale's gradient is rounding and Adam steps on it.
        run.trainable["fusion/w"] = jnp.linspace(-0.01, 0.01, 4)
    ours = _our_losses(run, config, mesh)
    theirs = _twin_losses(run, load_model(config, mesh))
    assert max(theirs) - min(theirs) > 0.5, "a run that does not move compares nothing"
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def _our_losses(run, config, mesh):
    optimizer = make_optimizer(config.optimizer, run.groups, 20)
    # Copies: the step donates its state, and the twin starts from the same parameters.
    start = jax.tree.map(jnp.copy, run.trainable)
    state = State(jnp.zeros((), jnp.int32), start, optimizer.init(start))
    step, losses = make_train_step(run.loss, optimizer, {}), []
    for i in range(20):
        batch = put_batch(run.batches[i], mesh)
        state, metrics = step(state, run.frozen, batch, jax.random.key(0))
        losses.append(float(metrics["loss"]))
    return losses


def _twin_losses(run, model):
    config, params = model.config, merge(run.trainable, run.frozen)
    layers, width = model.bridge.encoder.config.num_layers, model.bridge.encoder.config.d_model
    fusion = {
        "last": lambda: None,
        "global_softmax": lambda: reference.GlobalSoftmax(layers),
        "transformer_softmax": lambda: reference.TransformerSoftmax(
            layers, width, config.fusion.d_ff, dropout=0.0),
    }[config.fusion.name]()
    encoder = reference.MT5EncoderModel.from_pretrained(config.encoder.checkpoint).eval()
    llm = reference.LlamaForCausalLM.from_pretrained(config.decoder.checkpoint).eval()
    twin = reference.TorchBridge(encoder, llm, fusion)
    reference.copy_params(params, fusion=fusion, bridge=twin)
    trained = [p for p in twin.parameters() if p.requires_grad]
    parts = {"bridge": [*twin.projector.parameters(), twin.end],
             "fusion": [] if fusion is None else list(fusion.parameters())}
    o = config.optimizer
    adamw = torch.optim.AdamW([
        {"params": parts[name], "lr": group.learning_rate, "weight_decay": group.weight_decay}
        for name, group in o.groups.items()
    ], betas=(o.b1, o.b2), eps=o.eps)
    warmup = math.ceil(o.warmup_fraction * 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(adamw, lambda step: (
        step / warmup if step < warmup
        else 0.5 * (1 + np.cos(np.pi * (step - warmup) / (20 - warmup)))
    ))
    losses = []
    for i in range(20):
        epoch, number = divmod(i, run.batches.per_epoch)
        rows = [run.batches.rows[j] for j in run.batches.epoch(epoch)[1][number]]
        loss = twin([row.query for row in rows], [row.target for row in rows],
                    model.tokenizers.start[0])
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, o.clip_norm)
        adamw.step()
        schedule.step()
        losses.append(loss.item())
    return losses


# What a step touches


def test_frozen_weights_stay_and_buckets_compile_once(
        cache_dir, tmp_path, unscored, monkeypatch):
    config = make_config(cache_dir, data__buckets=(48, 60, 128), train__steps=15)
    mesh = make_mesh()
    run = prepare(config, mesh)
    compiled_step.cache_clear()
    with begin(config, tmp_path / "run") as start:
        trainers = []
        monkeypatch.setattr(loop, "Trainer", lambda *x: trainers.append(Trainer(*x)) or trainers[0])
        state = fit(run, start)
    # What was handed to the steps, against the files; and a checkpoint holds nothing else.
    assert equal(load_model(config, mesh).frozen, run.frozen)
    assert set(state.trainable) == {"projector/out/kernel", "projector/out/bias", "projector/end"}
    seen = {run.batches[i].enc_tokens.shape for i in range(15)}
    assert len(seen) >= 3 and trainers[0].step._cache_size() == len(seen)
    fresh = load_model(config, mesh).trainable
    assert all(not equal(fresh[path], state.trainable[path]) for path in fresh)


def test_patterns_choose_what_trains(cache_dir):
    paths = ["encoder/embed/embedding", "fusion/w", "projector/out/kernel"]
    groups = default_config().optimizer.groups
    groups.embeddings = {
        "patterns": ("encoder/embed/.*",), "learning_rate": 1e-3, "weight_decay": 0.1
    }
    config = default_config()
    config.optimizer.groups = groups
    optimizer = from_config_dict(config).optimizer
    assert group_of_each(paths, optimizer.groups) == {
        "encoder/embed/embedding": "embeddings", "fusion/w": "bridge",
        "projector/out/kernel": "bridge",
    }
    with pytest.raises(InputError, match=r"pattern 'encoder/embed/\.\*' matches no parameter"):
        group_of_each(paths[1:], optimizer.groups)
    groups.embeddings.patterns = ("projector/.*",)
    with pytest.raises(InputError, match="in two groups"):
        group_of_each(paths, from_config_dict(config).optimizer.groups)


def test_encoder_embeddings_train_in_float32_in_a_bfloat16_tower(cache_dir, tmp_path, unscored):
    """LangBridge's recipe: the embeddings train too, whatever the frozen dtype."""
    config = make_config(cache_dir, encoder__dtype="bfloat16", train__steps=3)
    groups = {**config.optimizer.groups,
              "embeddings": GroupConfig(("encoder/embed/.*",), 1e-2, 0.0)}
    config = replace(config, optimizer=replace(config.optimizer, groups=groups))
    state = train(config, tmp_path / "run")
    path = "encoder/embed/embedding"
    fresh = load_model(config, make_mesh())
    assert state.trainable[path].dtype == jnp.float32
    assert fresh.frozen["encoder/blocks/attn/q/kernel"].dtype == jnp.bfloat16
    assert not equal(fresh.trainable[path], state.trainable[path])
    # Tokens that never occur get no gradient, and without weight decay stay as they were.
    moved = np.any(np.asarray(fresh.trainable[path]) != np.asarray(state.trainable[path]), axis=1)
    assert 0 < moved.sum() < len(moved)
    with pytest.raises(InputError, match=r"use fusion\.backward='stack'"):
        load_model(replace(config, fusion=replace(config.fusion, backward="second_pass")),
                   make_mesh())


# Resume


def test_a_stopped_run_ends_bit_identical(undisturbed, tmp_path, monkeypatch):
    config, whole, expected = undisturbed
    with monkeypatch.context() as patch:
        interrupt_at(patch, 10)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "run")
    assert Checkpoints(tmp_path / "run").steps == [6]
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')  # killed while writing
    assert equal(jax.device_get(train(config, tmp_path / "run")), expected)
    assert records(tmp_path / "run") == records(whole)
    # Once more changes nothing.
    assert equal(jax.device_get(train(config, tmp_path / "run")), expected)


@pytest.mark.slow
def test_a_killed_process_resumes(undisturbed, tmp_path, caplog):
    """SIGKILL in the middle; started again, it ends as an undisturbed run does."""
    _, whole, _ = undisturbed
    command = [sys.executable, "train.py", "--config=configs/xnli_paper.py:debug",
               f"--workdir={tmp_path / 'run'}", "--config.train.steps=12",
               "--config.train.log_every=2", "--config.train.eval_every=6",
               "--config.train.checkpoint_every=2", "--config.data.dev_rows=12"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    while not (tmp_path / "run" / "checkpoints" / "2").is_dir() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    with caplog.at_level(logging.INFO):
        train(configs.load(tmp_path / "run" / "config.json"), tmp_path / "run")
    assert "resuming" in caplog.text
    assert records(tmp_path / "run") == records(whole)


def test_sigterm_saves_and_the_run_goes_on(undisturbed, tmp_path):
    _, whole, _ = undisturbed
    command = [sys.executable, "train.py", "--config=configs/xnli_paper.py:debug",
               f"--workdir={tmp_path / 'run'}", "--config.train.steps=12",
               "--config.train.log_every=2", "--config.train.eval_every=6",
               "--config.train.checkpoint_every=12", "--config.data.dev_rows=12"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while "step 2/" not in (line := process.stderr.readline()) and line:
        pass
    process.send_signal(signal.SIGTERM)
    said = process.stderr.read()
    assert process.wait() == Stopped.EXIT_CODE == 75
    assert "stopped by SIGTERM after step" in said and "goes on from there" in said
    steps = Checkpoints(tmp_path / "run").steps
    assert steps and steps[-1] < 12
    train(configs.load(tmp_path / "run" / "config.json"), tmp_path / "run")
    kept = {x["step"]: x["loss"] for x in records(tmp_path / "run") if "loss" in x}
    wanted = {x["step"]: x["loss"] for x in records(whole) if "loss" in x}
    assert {step: kept[step] for step in wanted} == wanted


def test_parts_of_a_batch_are_its_whole(cache_dir):
    """Gradients added up over parts are those of the batch, whatever targets lie in which part."""
    config = make_config(cache_dir, "global_softmax,debug")
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        run = prepare(config, mesh)
        batch = run.batches[0]
        batch.target_mask[::3] = False  # parts with more and with fewer targets
        # As the layers' weights are equal at first, the gradient of `t` would be rounding alone.
        weights = run.trainable["fusion/w"]
        trainable = {**run.trainable, "fusion/w": weights * jnp.linspace(-2, 2, len(weights))}
        grads = {}
        for parts in (1, 2, 8):
            # A function of its own: the number of parts is no argument of a jitted one.
            grads[parts] = jax.jit(lambda *x, parts=parts: gradient(run.loss, *x, parts))(
                trainable, run.frozen, put_batch(batch, mesh), jax.random.key(0))
    loss, count, whole = jax.device_get(grads[1])
    for parts in (2, 8):
        value, n, parted = jax.device_get(grads[parts])
        assert n == count and relative(value, loss) < 1e-5
        for name in whole:
            bound = 1e-4 if name == "fusion/t" else 1e-5  # of `t` a sum that cancels
            assert relative(parted[name], whole[name]) < bound


def test_a_trace_and_speeds_are_written(cache_dir, tmp_path, unscored, monkeypatch):
    monkeypatch.setitem(chips.CHIPS, "cpu", chips.Chip(1e12, 1e12, 1e12, 1e12))
    train(make_config(cache_dir, train__steps=6), tmp_path / "run", profile=(3, 4))
    traces = list((tmp_path / "run" / "profile").rglob("perfetto_trace.json.gz"))
    assert len(traces) == 1 and list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for line in (x for x in lines if "loss" in x):
        assert line["tokens_per_second"] > line["examples_per_second"] > 0
        assert 0.1 < line["real_tokens"] <= 1 and 0 < line["model_flops_utilisation"] < 1


def test_a_damaged_newest_checkpoint_is_passed_over(undisturbed, tmp_path, caplog):
    config, whole, expected = undisturbed
    workdir = shutil.copytree(whole, tmp_path / "run")
    for file in (workdir / "checkpoints" / "12" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with caplog.at_level(logging.WARNING):
        state = train(config, workdir)
    assert "checkpoints/12 is damaged and set aside as 12.damaged; the one before" in caplog.text
    assert equal(jax.device_get(state), expected)
    assert (workdir / "checkpoints" / "12.damaged").is_dir()


def test_another_config_s_workdir_is_refused(undisturbed):
    config, workdir, _ = undisturbed
    other = replace(config, train=replace(config.train, seed=7, log_every=3),
                    encoder=replace(config.encoder, dtype="bfloat16"))
    with pytest.raises(InputError, match=r"undo: train\.seed: 0 -> 7$"):
        train(other, workdir)
    with pytest.raises(InputError, match=r"train\.steps: 12 -> 6"):
        train(replace(config, train=replace(config.train, steps=6)), workdir)


def test_a_larger_step_count_and_log_interval_may_change(undisturbed, tmp_path):
    config, whole, _ = undisturbed
    workdir = shutil.copytree(whole, tmp_path / "run")
    longer = replace(config, train=replace(config.train, steps=14, log_every=1))
    assert int(train(longer, workdir).step) == 14
    assert records(workdir)[: len(records(whole))] == records(whole)


def test_a_foreign_directory_is_left_alone(cache_dir, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="is not empty and no run's workdir"):
        train(make_config(cache_dir), tmp_path)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_second_stage_starts_from_the_first(undisturbed, cache_dir, tmp_path, unscored):
    """MindMerger's two stages: the trained part goes on with the query as text behind it."""
    _, first, expected = undisturbed
    config = make_config(cache_dir, "transformer_softmax,debug", train__init_from=str(first),
                         train__steps=1, data__text_prompt="{query}")
    still = {"bridge": replace(config.optimizer.groups["bridge"], learning_rate=0.0)}
    config = replace(config, optimizer=replace(config.optimizer, groups=still))
    # Killed within its first save, and started again: still from the first stage.
    (tmp_path / "second" / "checkpoints" / "1.orbax-checkpoint-tmp").mkdir(parents=True)
    configs.save(config, tmp_path / "second" / "config.json")
    state = train(config, tmp_path / "second")
    assert equal(jax.device_get(state.trainable), expected.trainable)
    other = replace(config, fusion=replace(config.fusion, name="global_softmax"))
    with pytest.raises(InputError, match=r"'fusion/.*' is .* there, no such parameter here"):
        train(other, tmp_path / "third")
    assert not (tmp_path / "third").exists()


def test_other_towers_than_the_first_stage_had_are_told(undisturbed, cache_dir, tmp_path, caplog):
    """The same shapes load; whether they are the same weights the run's record tells."""
    _, first, _ = undisturbed
    another, shown = tmp_path / "another_llm", tmp_path / "first"
    shutil.copytree(make_config(cache_dir).decoder.checkpoint, another)
    shutil.copytree(first, shown)
    config = make_config(cache_dir, "transformer_softmax,debug", train__init_from=str(shown),
                         train__steps=1)
    config = replace(config, decoder=replace(config.decoder, checkpoint=str(another)))
    prepare(config, make_mesh())
    assert "learned with" not in caplog.text  # the same by another name
    change_tower(another)
    prepare(config, make_mesh())
    assert f"{shown} learned with another LLM than this run has: what it learned" in caplog.text
    assert "another encoder" not in caplog.text
    (shown / ORIGIN).unlink()
    prepare(config, make_mesh())
    assert f"{shown} has no record of its towers" in caplog.text


def test_a_run_belongs_to_its_towers_and_rows(cache_dir, tmp_path, unscored, caplog):
    """A name or a path may have other weights, another tokenizer or other labels one day."""
    data, llm, run = tmp_path / "rows", tmp_path / "llm", tmp_path / "run"
    data.mkdir()
    rows = [{"premise": f"la {i}", "hypothesis": "ru", "label": i % 3} for i in range(8)]
    for split in ("train", "dev"):
        (data / f"{split}-en.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = make_config(cache_dir, "last,debug", train__steps=2, train__checkpoint_every=1,
                         data__task="xnli", data__language="en", data__path=str(data),
                         data__text_prompt="The label is")
    shutil.copytree(config.decoder.checkpoint, llm)
    config = replace(config, decoder=replace(config.decoder, checkpoint=str(llm)))
    train(config, run)
    open_run(run).model  # noqa: B018
    assert "no record" not in caplog.text
    assert "the LLM reads an answer glued to its prompt: 'isEntailment'" in caplog.text
    kept = (llm / "model.safetensors").read_bytes()
    change_tower(llm)
    refused = rf"{run} was made from \S+ and {llm} \(LLM \w{{8}}\), and now there is .* put the "
    with pytest.raises(InputError, match=refused):
        open_run(run).model  # noqa: B018
    with pytest.raises(InputError, match=refused):
        train(config, run)
    with pytest.raises(InputError, match=refused):
        export(run, tmp_path / "exported")
    with pytest.raises(InputError, match=refused):
        open_run(run, llm_only=True).model  # noqa: B018
    (llm / "model.safetensors").write_bytes(kept)
    template = llm / "chat_template.jinja"
    template.write_text("{{ messages[0].content }}")
    with pytest.raises(InputError, match=r"\(tokenizer of the LLM \w{8}\)"):
        open_run(run).model  # noqa: B018
    template.unlink()
    rows[5]["label"] = 1
    (data / "train-en.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError, match="trained on other rows than its files have now, or in"):
        train(config, run)
    (run / ORIGIN).rename(tmp_path / ORIGIN)  # as the line says
    caplog.clear()
    train(config, run)
    assert f"{run} has no record of what it was made from" in caplog.text
    caplog.clear()
    train(config, run)
    assert "no record" not in caplog.text
    write_checked(run / ORIGIN, json.dumps({"decoder": "0"}))
    with pytest.raises(InputError, match=rf"{run} was made from another LLM \(LLM 0\), and now"):
        train(config, run)


def test_two_stages_are_one_command(cache_dir, tmp_path, unscored, monkeypatch):
    """The first is trained once, whatever happens to the second, and its rows count as seen."""
    still = {"bridge": {"patterns": ("projector/.*",), "learning_rate": 0.0, "weight_decay": 0.0}}
    config = replace(
        make_config(cache_dir, "last,debug", train__steps=2, data__text_prompt="{query}",
                    optimizer__groups=still),
        first={"data": {"text_prompt": "", "train_rows": 8}, "train": {"steps": 3},
               "optimizer": {"groups": {"bridge": {"learning_rate": 1e-2}}}})
    run, trained = tmp_path / "run", []

    def fit_once(*args):
        if trained:
            raise KeyboardInterrupt
        trained.append(fit(*args))

    monkeypatch.setattr(job, "fit", fit_once)
    with pytest.raises(KeyboardInterrupt):
        train(config, run)
    monkeypatch.setattr(job, "fit", fit)
    step, learned = trained_part(run / "first")
    assert step == 3 and configs.load(run / "first" / "config.json").first == {}
    state = train(config, run)
    assert int(state.step) == 2 and len(trained) == 1
    assert equal({path: np.asarray(x) for path, x in state.trainable.items()}, learned)
    assert 0 < len(read_seen(run / "first")) < len(seen_by(config, run))


@pytest.mark.parametrize(("first", "init_from", "why"), [
    ({"train": {"stepz": 1}}, None, "first.train.stepz"),
    ({"first": {"train": {"steps": 1}}}, None, "leave first, seeds and train.init_from out"),
    ({"train": {"steps": 1}}, "x", "set one of them"),
])
def test_a_first_stage_that_cannot_be_is_refused(cache_dir, first, init_from, why):
    config = make_config(cache_dir, "last,debug", train__init_from=init_from)
    with pytest.raises(InputError, match=why):
        configs.check(replace(config, first=first))


@pytest.mark.parametrize("steps,warmup", [(20, 1), (25, 2), (1000, 50), (1001, 51)])
def test_a_part_of_a_step_of_warm_up_is_a_step(steps, warmup):
    """As in transformers."""
    schedule = make_schedule(OptimizerConfig(warmup_fraction=0.05), 1.0, steps)
    assert schedule(warmup) == 1 and schedule(warmup - 1) == pytest.approx(1 - 1 / warmup)


# It learns


@pytest.mark.parametrize("fusion,steps", [
    pytest.param("transformer_softmax", 130, marks=pytest.mark.slow),
    pytest.param("last", 400, marks=pytest.mark.slow),
    pytest.param("global_softmax", 400, marks=pytest.mark.slow),
])
def test_thirty_two_real_rows_are_learned(real_data, cache_dir, tmp_path, fusion, steps):
    """SIB-200 through real SentencePiece tokenizers: above 90% exact match on its own rows."""
    spm = real_data / "tokenizers"
    write_checkpoints(
        tmp_path / "tiny", "tiny",
        encoder_tokenizer=spm / "sentencepiece_cc_all.32000.100extra-sentencepiece.model",
        decoder_tokenizer=spm / "tokenizer.mistral-v1",
    )
    config = make_config(
        cache_dir, f"{fusion},debug", data__task="sib200", data__language="eng_Latn",
        data__path=str(real_data / "sib200"), data__train_rows=32, data__dev_rows=8,
        data__max_encoder_tokens=128, train__batch_size=16, train__steps=steps, fusion__dropout=0.0,
        train__log_every=50, train__eval_every=steps, train__checkpoint_every=steps,
        encoder__checkpoint=str(tmp_path / "tiny" / "encoder"),
        decoder__checkpoint=str(tmp_path / "tiny" / "decoder"),
    )
    groups = {"bridge": replace(config.optimizer.groups["bridge"], learning_rate=1e-2)}
    config = replace(config, optimizer=replace(config.optimizer, groups=groups, b1=0.9))
    state = train(config, tmp_path / "run")
    model = load_model(config, make_mesh())
    task = TASKS["sib200"]
    rows = read_examples("sib200", task, "train", "eng_Latn", str(real_data / "sib200"))
    rows = subset(rows, 32, balanced=False, seed=config.train.seed)
    scorer = Scorer(model.bridge, model.tokenizers, for_task(config.eval, task))
    scored = scorer(merge(state.trainable, model.frozen), rows, task)
    assert np.mean(scored.correct["exact_match"]) > 0.9


def test_a_loss_that_is_no_number_ends_the_run(cache_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(configs, "check", lambda config: None)  # it allows no such rate
    config = make_config(cache_dir, train__log_every=1)
    groups = {"bridge": replace(config.optimizer.groups["bridge"], learning_rate=1e30)}
    config = replace(config, optimizer=replace(config.optimizer, groups=groups))
    with pytest.raises(InputError, match=r"the loss is .* lower the learning rate"):
        train(config, tmp_path / "run")
    assert 0 < len(losses(tmp_path / "run")) < 12
