"""Lens against what its authors define, written out in NumPy and PyTorch in full vectors."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import traverse_util
from helpers import DECODERS, ROOT, get_config, relative
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from jaxfusion.config import from_config_dict
from jaxfusion.data.batching import TokenRow
from jaxfusion.data.tokenizers import Tokenizers, load_tokenizer
from jaxfusion.fields import GroupConfig, LensConfig
from jaxfusion.hf.load import open_tensors
from jaxfusion.hf.save import to_tensors, write_tower
from jaxfusion.hf.tables import tower_table
from jaxfusion.lens import job
from jaxfusion.lens.activations import cache_activations, slice_blocks, split
from jaxfusion.lens.objective import Manipulation, aims, make_goals
from jaxfusion.lens.probe import Probe, probe
from jaxfusion.lens.subspace import displacements, factorise
from jaxfusion.miniatures.checkpoints import random_params
from jaxfusion.miniatures.inputs import make_inputs
from jaxfusion.nn.bridge import Bridge
from jaxfusion.nn.decoder import Decoder, DecoderConfig
from jaxfusion.runs.export.tower import export_lens
from jaxfusion.training.checkpoint import trained_part

LANGUAGES = {"en": (3, 36), "sw": (30, 68), "ta": (60, 100)}  # each has tokens of its own
WEIGHTS = {"sw": 0.6, "ta": 1.7}
ALIGN, SEPARATE, RETAIN = 0.7, 1.3, 2.2
PROMPTS, BLOCKS = 6, 2


# The subspaces


def means_of(seed: int, languages: int, width: int, offset: float, spread: float):
    rng = np.random.default_rng(seed)
    return offset * rng.normal(size=width) + spread * rng.normal(size=(languages, width))


# What languages share, and how far they lie apart; nothing is lost to float64 but their ratio.
MEANS = st.tuples(st.integers(0, 10**6), st.integers(2, 9), st.integers(16, 96),
                  st.sampled_from([0.0, 1.0, 10.0]), st.sampled_from([1.0, 0.01, 30.0]))


@settings(max_examples=150, deadline=None)
@given(MEANS, st.data())
def test_of_any_rank_the_subspaces_are_orthogonal(shape, data):
    means = means_of(*shape)
    rank = data.draw(st.integers(1, len(means) - 1))
    spaces = factorise(means, rank)
    specific = spaces.specific
    assert specific.shape == (means.shape[1], rank)
    assert np.abs(specific.T @ specific - np.eye(rank)).max() < 1e-12
    assert np.abs(spaces.agnostic @ specific).max() < 1e-8 * np.linalg.norm(spaces.agnostic)
    assert relative(spaces.direction * np.linalg.norm(spaces.agnostic), spaces.agnostic) < 1e-12


@settings(max_examples=150, deadline=None)
@given(MEANS)
def test_at_full_rank_nothing_of_the_means_is_lost(shape):
    means = means_of(*shape)
    spaces = factorise(means)
    assert spaces.specific.shape == (means.shape[1], len(means) - 1)
    for central in {0, len(means) - 1}:
        assert relative(displacements(spaces, means, central), means - means[central]) < 1e-8
    shared = spaces.onto_agnostic(means)
    assert np.ptp(shared, axis=0).max() < 1e-8 * np.abs(means).max()
    assert relative(shared, np.broadcast_to(spaces.agnostic, means.shape)) < 1e-8
    assert relative(spaces.agnostic + spaces.onto_specific(means), means) < 1e-8


def test_one_large_dimension_of_a_wide_llm_leaves_them_orthogonal():
    """At a rank below K − 1 the means cut to it are singular, and must be inverted as such."""
    worst = 0.0
    for seed in range(24):
        rng = np.random.default_rng(seed)
        means = rng.normal(size=(6, (2048, 4096)[seed % 2]))
        means[:, 3] += 300
        spaces = factorise(means, int(rng.integers(1, 5)))
        worst = max(worst, np.abs(spaces.direction @ spaces.specific).max())
    assert worst < 1e-8


# The references


def subspaces(means, rank):
    """Projections P_a and P_s [E E], and `m_a`, of means [K E]."""
    columns = np.asarray(means, np.float64).T
    ones = np.ones((columns.shape[1], 1))
    centre = columns.mean(axis=1, keepdims=True)
    u, s, vt = np.linalg.svd(columns - centre @ ones.T)
    low = centre @ ones.T + u[:, :rank] @ np.diag(s[:rank]) @ vt[:rank]
    agnostic = np.linalg.pinv(low).T @ ones
    agnostic /= np.linalg.norm(agnostic) ** 2
    specific = np.linalg.svd(low - agnostic @ ones.T)[0][:, :rank]
    onto_agnostic = agnostic @ agnostic.T / (agnostic.T @ agnostic)
    return onto_agnostic, specific @ specific.T, agnostic[:, 0]


def torch_states(model, ids):
    """`hidden_states` of one prompt without the embeddings, [L T E]."""
    out = model.model(input_ids=torch.tensor([ids]), output_hidden_states=True)
    return torch.stack(out.hidden_states[1:])[:, 0]


@dataclass(frozen=True)
class Setup:
    """A tiny LLM and one whose top blocks have moved, ours and transformers'."""

    config: DecoderConfig
    frozen: dict[str, Any]
    live: dict[str, Any]
    torch_frozen: torch.nn.Module
    torch_live: torch.nn.Module
    rows: dict[str, list[TokenRow]]
    tokenizers: Tokenizers
    found: Probe
    reference: np.ndarray  # [K R L E], transformers' states at each prompt's last token

    @property
    def first(self) -> int:
        return self.config.num_layers - BLOCKS

    def ids(self, name: str, number: int) -> list[int]:
        return [*self.tokenizers.start, *self.rows[name][number].text]

    def top(self, params):
        return slice_blocks(params, self.first, None)


def moved(params, scale: float, seed: int, chosen=lambda path: True):
    rng = np.random.default_rng(seed)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x + rng.normal(0, scale, x.shape).astype(x.dtype) if chosen(path) else x,
        params)


def bare(config: DecoderConfig) -> Bridge:
    return Bridge(None, Decoder(config), None, "last")


@pytest.fixture(scope="module", params=["llama3", "qwen2"])
def setup(request, tiny, tmp_path_factory):
    config = DECODERS[request.param]
    first = config.num_layers - BLOCKS
    # Norms start at ones, which would hide a mixed-up one.
    frozen = moved(random_params(config, 0), 0.3, 0, lambda path: path[-1].key == "scale")
    top = moved(slice_blocks(frozen, first, None)["blocks"], 0.05, 1)
    live = {**frozen, "blocks": jax.tree.map(
        lambda a, b: np.concatenate([a[:first], b]), frozen["blocks"], top)}
    models = []
    for params in (frozen, live):
        path = tmp_path_factory.mktemp("theirs")
        write_tower(path, config, params)
        model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
        models.append(model.eval())
    rng = np.random.default_rng(2)
    rows = {name: [TokenRow([], rng.integers(*ids, rng.integers(3, 14)).tolist(), [])
                   for _ in range(PROMPTS)] for name, ids in LANGUAGES.items()}
    tokenizers = Tokenizers(None, load_tokenizer(tiny / "decoder", 512, "decoder"))
    found = probe(bare(config), {"decoder": frozen}, rows, tokenizers, (8, 16), 4)
    with torch.no_grad():
        reference = np.array([[torch_states(models[0], [*tokenizers.start, *row.text])[:, -1]
                               for row in texts] for texts in rows.values()], np.float64)
    return Setup(config, frozen, live, *models, rows, tokenizers, found, reference)


# The probe


@pytest.mark.parametrize("rank", [2, 1])
def test_a_probe_is_the_paper_s_on_transformers_states(setup, rank):
    found, states = setup.found, setup.reference
    assert found.languages == tuple(LANGUAGES) and found.rows == PROMPTS
    assert found.means.shape == (setup.config.num_layers, 3, setup.config.d_model)
    for layer in range(1, setup.config.num_layers + 1):
        at = states[:, :, layer - 1]
        means = at.mean(axis=1)
        assert relative(found.means[layer - 1], means) < 1e-5
        variances = ((at - means[:, None]) ** 2).mean(axis=1)
        assert relative(found.variances[layer - 1], variances) < 1e-5
        onto_agnostic, onto_specific, agnostic = subspaces(means, rank)
        ours = found.subspaces(layer, rank)
        assert relative(ours.agnostic, agnostic) < 1e-5
        assert relative(np.outer(ours.direction, ours.direction), onto_agnostic) < 1e-5
        assert relative(ours.specific @ ours.specific.T, onto_specific) < 1e-5
        inside = at @ onto_specific
        expression = inside.mean(axis=1) - inside[0].mean(axis=0)
        assert relative(found.displacements(layer, rank), expression) < 1e-5


# Losses and gradients


def authors_loss(setup: Setup, layers, rank):
    """The losses as the authors write them, a prompt at a time, each language's alone."""
    mse = torch.nn.functional.mse_loss
    goals = {}
    for layer in layers:
        means = setup.reference[:, :, layer - 1].mean(axis=1)
        onto_agnostic, onto_specific, _ = subspaces(means, rank)
        goals[layer] = [torch.tensor(x, dtype=torch.float32) for x in (
            onto_agnostic, onto_specific, (means - means[0]) @ onto_specific)]
    total = 0.0
    for number in range(PROMPTS):
        live, frozen = {}, {}
        for name in setup.rows:
            live[name] = torch_states(setup.torch_live, setup.ids(name, number))
            with torch.no_grad():
                frozen[name] = torch_states(setup.torch_frozen, setup.ids(name, number))
        loss = 0.0
        for layer, (onto_agnostic, onto_specific, expression) in goals.items():
            h = {name: x[layer - 1, -1] for name, x in live.items()}
            before = {name: x[layer - 1, -1] for name, x in frozen.items()}
            retain = mse(live["en"][layer - 1].mean(dim=0), frozen["en"][layer - 1].mean(dim=0))
            loss = loss + RETAIN * retain
            for k, name in enumerate(setup.rows):
                if name == "en":
                    continue
                align = mse(onto_agnostic @ h["en"], onto_agnostic @ h[name])
                separate = mse(onto_specific @ (h[name] - before[name]),
                               WEIGHTS[name] * expression[k])
                loss = loss + ALIGN * align + SEPARATE * separate
        total = total + loss / PROMPTS
    return total


def manipulation(setup: Setup, layers, rank):
    """The loss as the project trains on it, as a function of the top blocks; and what is kept."""
    kept = cache_activations(bare(setup.config), {"decoder": setup.frozen}, setup.rows,
                             setup.tokenizers, BLOCKS, 5)
    goals = make_goals(setup.found, BLOCKS, layers, rank, WEIGHTS)
    weights = LensConfig(align=ALIGN, separate=SEPARATE, retain=RETAIN)
    rest = traverse_util.unflatten_dict(aims(goals, weights), sep="/")
    loss = Manipulation(Decoder(split(setup.config, BLOCKS)[1]), tuple(goals)).loss
    return lambda blocks: loss({"decoder": {**setup.frozen, "blocks": blocks}, **rest}, kept), kept


@pytest.mark.parametrize("layers,rank", [
    ("last", 2), pytest.param("two", 1, marks=pytest.mark.slow)])
def test_loss_and_gradients_are_the_authors(setup, layers, rank):
    number = setup.config.num_layers
    layers = (number,) if layers == "last" else (number - 1, number)
    loss, _ = manipulation(setup, () if len(layers) == 1 else layers, rank)
    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, _), grads = run(setup.top(setup.live)["blocks"])
    setup.torch_live.zero_grad()
    wanted = authors_loss(setup, layers, rank)
    wanted.backward()
    wanted = float(wanted.detach())
    assert wanted > 0.01 and abs(float(value) - wanted) < 1e-5 * wanted
    theirs, compared = dict(setup.torch_live.named_parameters()), 0
    shape = split(setup.config, BLOCKS)[1]
    for name, ours in to_tensors(tower_table(shape), {**setup.frozen, "blocks": grads}):
        if not name.startswith("model.layers."):
            continue  # frozen: the embeddings, the head and the final norm
        head, i, tail = name.removeprefix("model.").split(".", 2)
        name = f"model.{head}.{int(i) + setup.first}.{tail}"
        reference = theirs[name].grad.numpy()
        assert np.abs(reference).max() > 1e-6, f"{name}: a gradient of 0 says little"
        assert relative(ours, reference) < 1e-5, name
        compared += 1
    of_top = [f"model.layers.{i}." for i in range(setup.first, number)]
    assert compared == sum(name.startswith(tuple(of_top)) for name in theirs)


def test_kept_activations_give_the_whole_models_loss(setup):
    """Both whole models, on prompts padded on the left, against the top blocks alone."""
    number = setup.config.num_layers
    loss, kept = manipulation(setup, (number - 1, number), None)
    value, count = jax.jit(loss)(setup.top(setup.live)["blocks"])
    assert int(count) == PROMPTS
    every = [setup.ids(name, i) for i in range(PROMPTS) for name in setup.rows]
    longest = max(map(len, every))
    tokens, positions, segments = np.zeros((3, len(every), longest), np.int32)
    for row, ids in enumerate(every):
        tokens[row, -len(ids):] = ids
        positions[row, -len(ids):], segments[row, -len(ids):] = np.arange(len(ids)), 1
    decoder = Decoder(setup.config)

    @jax.jit
    def whole(params):
        embedded = decoder.apply({"params": params}, tokens, method="embed")
        read = np.stack([np.eye(longest)[np.full(len(every), longest - 1)],
                         segments / segments.sum(axis=1, keepdims=True)], axis=1)
        states, _ = decoder.apply({"params": params}, embedded, positions, segments,
                                  jnp.asarray(read, jnp.float32), method="states")
        states = states.reshape(number, PROMPTS, len(LANGUAGES), 2, -1)
        return states[:, :, :, 0], states[:, :, 0, 1]

    (h, mean), (before, mean_before) = (
        [np.asarray(x, np.float64) for x in whole(params)] for params in (setup.live, setup.frozen))
    mse = lambda a, b: ((a - b) ** 2).mean(axis=-1)  # noqa: E731
    total = 0.0
    for layer in (number - 1, number):
        spaces, delta = setup.found.subspaces(layer), setup.found.displacements(layer)
        weights = np.array([WEIGHTS[name] for name in list(LANGUAGES)[1:]])[:, None]
        total += RETAIN * mse(mean[layer - 1], mean_before[layer - 1])
        shared = spaces.onto_agnostic(h[layer - 1])
        total += ALIGN * mse(shared[:, :1], shared[:, 1:]).sum(axis=1)
        went = spaces.onto_specific(h[layer - 1] - before[layer - 1])[:, 1:]
        total += SEPARATE * mse(went, weights * delta[1:]).sum(axis=1)
    assert relative(value, total.mean()) < 1e-6
    for layer in (number - 1, number):
        at = layer - setup.first - 1
        assert relative(kept.before[:, :, at], before[layer - 1]) < 1e-5
        assert relative(kept.mean[:, at], mean_before[layer - 1]) < 1e-5


# A whole run


def test_a_run_changes_the_chosen_blocks_alone(cache_dir, tmp_path):
    """Every tensor of the export: below, embeddings, norm and head to the bit as they were."""
    config = get_config(ROOT / "configs" / "lens_quickstart.py", "debug").unlock()
    config.decoder.checkpoint, config.lens.blocks = "made:pocket", 2
    config.train.steps = config.train.eval_every = config.train.checkpoint_every = 3
    config.sweep = ()
    config = make_inputs(from_config_dict(config))
    config = replace(config, eval=replace(config.eval, tasks=()))
    groups = {"chosen": GroupConfig(("decoder/blocks/(attn|mlp)/.*",), 1e-3, 0.1)}
    config = replace(config, lens=replace(config.lens, method="lens"),
                     optimizer=replace(config.optimizer, groups=groups))
    job.lens(config, tmp_path / "run")
    (workdir,) = (file.parent for file in (tmp_path / "run").glob("*/checkpoints"))
    step, trained = trained_part(workdir)
    assert step == 3 and all(len(x) == 2 for x in trained.values())
    export_lens(workdir, tmp_path / "out")
    source = config.decoder.checkpoint
    before, after = (open_tensors(path) for path in (Path(source), tmp_path / "out"))
    assert set(before.files) == set(after.files)
    changed = {name for name in before.files
               if before.read(name).tobytes() != after.read(name).tobytes()}
    top = ("model.layers.2.", "model.layers.3.")
    chosen = {name for name in before.files
              if name.startswith(top) and name.endswith("_proj.weight")}
    assert len(chosen) == 14 and changed == chosen
