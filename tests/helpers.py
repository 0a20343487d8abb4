"""What several tests use: configs, runs of them, decoders of every family, exports."""

import importlib.util
import json
import math
import runpy
import shutil
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from absl import app
from absl.testing import flagsaver
from safetensors.numpy import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.common import finish
from jaxfusion import config as configs
from jaxfusion.bridge import job
from jaxfusion.commands.configs import with_paths
from jaxfusion.config import default_config, from_config_dict
from jaxfusion.data.batching import TokenRow, find_shapes, in_order
from jaxfusion.data.rows import hub as remote
from jaxfusion.evaluation.generate import prefill
from jaxfusion.fields import (
    AlignerConfig,
    Config,
    DataConfig,
    DecoderSettings,
    EncoderSettings,
    FusionConfig,
    GroupConfig,
    OptimizerConfig,
    ProjectorConfig,
)
from jaxfusion.files import write_checked
from jaxfusion.hf.save import write_tower
from jaxfusion.miniatures.checkpoints import random_params
from jaxfusion.miniatures.inputs import make_inputs
from jaxfusion.nn.decoder import Decoder, DecoderConfig
from jaxfusion.nn.encoder import EncoderConfig
from jaxfusion.nn.rope import LinearScaling, Llama3Scaling, LongScaling, Rope
from jaxfusion.sharding.mesh import make_mesh
from jaxfusion.training.checkpoint import Checkpoints
from jaxfusion.training.frozen import to_keep, write_frozen
from jaxfusion.training.load import load_model
from jaxfusion.training.logs import RunLog
from jaxfusion.training.origin import ORIGIN
from jaxfusion.training.state import State, merge

ROOT = Path(__file__).parent.parent
# configs/*.py, by what they run.
FILES = [file for file in sorted((ROOT / "configs").glob("*.py")) if file.stem != "common"]
PRETRAINING = [file for file in FILES if file.stem.endswith(("_encoder", "_decoder"))]
COMPARISONS = [file for file in FILES if file.stem == "quickstart"]
LENSES = [file for file in FILES if file.stem.startswith("lens_")]
BRIDGES = [file for file in FILES if file not in PRETRAINING + COMPARISONS + LENSES]
XNLI = next(file for file in FILES if file.stem == "xnli_paper")


def relative(ours, theirs) -> float:
    """Largest difference, relative to the largest entry of `theirs`."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))


def equal(a, b) -> bool:
    """Whether two trees hold the same numbers."""
    same = jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), a, b)
    return all(jax.tree.leaves(same))


# Configs and runs


def get_config(file, arg=None):
    """What a file of configs/ gives for `--config FILE:ARG`."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


def leaves(tree, path=()):
    """Every field of a config, by its path."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*path, name))
        else:
            yield (*path, name)


def make_config(cache_dir, arg="last,debug", **fields) -> Config:
    """A debug config of 12 steps; fields as `train__steps=4`."""
    config = finish(default_config(), arg).unlock()
    fields = {"train__steps": 12, "train__log_every": 2, "train__eval_every": 6,
              "train__checkpoint_every": 6, "data__dev_rows": 12, **fields}
    for name, value in fields.items():
        group, field = name.split("__")
        config[group][field] = value
    return make_inputs(from_config_dict(config))


def debug_config(**fields):
    """The quickstart's Lens at debug size: one method, nothing scored unless asked for."""
    config = make_inputs(from_config_dict(get_config(ROOT / "configs" / "lens_quickstart.py",
                                                     "debug")))
    config = replace(config, sweep=(), eval=replace(config.eval, tasks=()))
    for name, values in fields.items():
        part = getattr(config, name)
        config = replace(config, **{
            name: replace(part, **values) if isinstance(values, dict) else values})
    return config


def tiny_model(tiny, arg, **fields):
    """A bridge between the tiny towers as it starts; other towers as `encoder=PATH`."""
    config = finish(default_config(), f"{arg},debug").unlock()
    for role in ("encoder", "decoder"):
        config[role].checkpoint = str(fields.pop(role, tiny / role))
    config.projector.update(fields)
    return load_model(from_config_dict(config), make_mesh())


def run_script(*words) -> str:
    """The line that a script refuses with, run in this process; empty where it ends well."""
    with pytest.MonkeyPatch.context() as patch, own_flags(words[0]):
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", list(words))
        for name in ("set_up_logging", "end_on_sigterm"):  # pytest reads the log itself
            patch.setattr(command(words[0]), name, lambda: None, raising=False)
        patch.setattr(app, "run", lambda main, flags_parser: main(flags_parser(list(words))))
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            return str(end.code)
    return ""


def flags_error(words) -> str:
    """What is wrong with a script's flags, its config's fields among them; empty if nothing."""
    with pytest.MonkeyPatch.context() as patch, own_flags(words[0]) as own:
        patch.chdir(ROOT)
        try:
            patch.setattr(sys, "argv", with_paths(list(words)))
            own([word for word in sys.argv if word != "--help"])
            if "config" in own:
                getattr(own.config, "job", None)  # fails where the file is missing
        except Exception as error:  # a config's own code runs meanwhile
            return f"{type(error).__name__}: {error}"
    return ""


def command(script):
    """The module behind a script."""
    return import_module(f"jaxfusion.commands.{Path(script).stem}")


@contextmanager
def own_flags(script):
    """The flags of a script as they are at its start, and again afterwards."""
    own = command(script).FLAGS
    saved = flagsaver.save_flag_values(own)
    try:
        yield own
    finally:
        flagsaver.restore_flag_values(saved, own)
        own.unparse_flags()


def leave_unscored(patch):
    """Runs do not score development rows, which takes as long to compile as their step."""
    patch.setattr(job, "make_score",
                  lambda model, dev, task, mesh: lambda _: {task.development: 0.0})


def interrupt_at(monkeypatch, step):
    """Stops the next run when it logs this step."""
    original = RunLog.train

    def stop(self, at, *args):
        original(self, at, *args)
        if at == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunLog, "train", stop)


def records(workdir):
    """Metrics by step and name, without speeds."""
    lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if k != "real_tokens" and not k.endswith("_second")}
            for x in lines]


def losses(workdir):
    """The loss of every step that was logged."""
    return {x["step"]: x["loss"] for x in records(workdir) if "loss" in x}


class Hub:
    """In the hub's place: what was asked for, and rows to give."""

    hash = "c" * 40

    def __init__(self, monkeypatch, rows, features=None):
        self.data = datasets.Dataset.from_list(rows, features=features)
        self.asked = []
        monkeypatch.setattr(datasets, "load_dataset_builder", self.open)
        monkeypatch.setattr(remote, "hub_in_reach", lambda: True)
        remote._builder.cache_clear()

    def open(self, name, config, revision):
        self.asked.append((name, config, revision))
        return self

    def download_and_prepare(self):
        self.asked.append("downloaded")

    def as_dataset(self, split):
        self.asked.append(split)
        return self.data

    def as_streaming_dataset(self, split):
        return self.data.to_iterable_dataset()


# Towers of every family

# Unlike the defaults in everything: heads × head_dim is not d_model.
UNUSUAL = EncoderConfig(
    vocab_size=97, d_model=40, d_ff=72, num_layers=5, num_heads=3, head_dim=12,
    num_buckets=18, max_distance=23, norm_eps=3e-4,
)
BERT = EncoderConfig(
    vocab_size=97, d_model=36, d_ff=72, num_layers=5, num_heads=3, head_dim=12, norm_eps=3e-4,
    family="bert", positions="learned", max_length=70, counts_padding=True, token_types=3,
    norm="layer", bias=True, post_norm=True, embed_norm=True, final_norm=False,
    activation="gelu", gated=False, attn_scale=None,
)
ENCODERS = {
    "mt5": UNUSUAL, "umt5": replace(UNUSUAL, family="umt5", bias_per_layer=True),
    "bert": replace(BERT, activation="gelu_tanh"),
    "xlm-roberta": replace(BERT, family="xlm-roberta", counts_padding=False, first_position=6,
                           token_types=1),
    "m2m_100": EncoderConfig(
        vocab_size=97, d_model=36, d_ff=72, num_layers=4, num_heads=3, head_dim=12, norm_eps=1e-5,
        family="m2m_100", positions="sinusoidal", first_position=2, norm="layer", bias=True,
        activation="relu", gated=False, attn_scale=None, embed_scale=6.0),
    "modernbert": EncoderConfig(
        vocab_size=97, d_model=36, d_ff=52, num_layers=6, num_heads=3, head_dim=12, norm_eps=3e-4,
        family="modernbert", positions="rotary", rope=Rope(777.0), local_rope=Rope(55.0),
        windows=(None, 6, None, 6, None, 6), norm="layer", embed_norm=True, first_norm=False,
        activation="gelu", attn_scale=None),
}


def torch_encoder(family):
    """transformers' class of an encoder of this family, alone."""
    from transformers.models.m2m_100.modeling_m2m_100 import M2M100Encoder

    return {"mt5": transformers.MT5EncoderModel, "umt5": transformers.UMT5EncoderModel,
            "bert": transformers.BertModel, "xlm-roberta": transformers.XLMRobertaModel,
            "m2m_100": M2M100Encoder, "modernbert": transformers.ModernBertModel}[family]


BASE = DecoderConfig(
    vocab_size=101, d_model=48, d_ff=80, num_layers=3, num_heads=6, num_kv_heads=2, head_dim=12,
    norm_eps=2e-4, rope=Rope(777.0), max_length=64,
)
GEMMA = replace(BASE, activation="gelu_tanh", embed_scale=48**0.5, norm_offset=1.0,
                tie_embeddings=True)
LONG = LongScaling((1.0, 1.1, 1.2, 1.5, 2.0, 2.5), (1.0, 2.0, 4.0, 5.0, 7.0, 9.0), 24,
                   math.sqrt(1 + math.log(64 / 24) / math.log(24)))
# Every family of LLMs, and what its members differ in. Windows are shorter than the texts.
DECODERS = {
    "llama2": replace(BASE, num_kv_heads=6),
    "llama3": BASE,
    "llama31": replace(BASE, rope=Rope(777.0, Llama3Scaling(8.0, 1.0, 4.0, 24))),
    "llama32_tied": replace(
        BASE, rope=Rope(777.0, Llama3Scaling(32.0, 1.5, 5.0, 16)), tie_embeddings=True
    ),
    "codellama": replace(BASE, rope=Rope(1e6, LinearScaling(3.0))),
    "mistral_v01": replace(BASE, family="mistral", windows=(7,) * 3),
    "mistral_v03": replace(BASE, family="mistral"),
    "qwen2": replace(BASE, family="qwen2", qkv_bias=True),
    "qwen25_window": replace(BASE, family="qwen2", qkv_bias=True, windows=(None, 7, 7)),
    "qwen3": replace(BASE, family="qwen3", qk_norm=True, tie_embeddings=True),
    "phi3": replace(BASE, family="phi3", windows=(11,) * 3),
    "phi35_longrope": replace(BASE, family="phi3", num_heads=4, rope=Rope(777.0, LONG)),
    "phi4_partial": replace(BASE, family="phi3", rope=Rope(777.0, None, 0.5)),
    "gemma": replace(GEMMA, family="gemma"),
    "gemma2": replace(GEMMA, family="gemma2", post_norms=True, windows=(7, None, 7),
                      attn_scale=20**-0.5, attn_cap=3.0, logit_cap=4.0),
    "gemma3": replace(GEMMA, family="gemma3_text", post_norms=True, qk_norm=True,
                      num_layers=7, windows=(7,) * 5 + (None, 7), attn_scale=20**-0.5,
                      rope=Rope(1e6, LinearScaling(8.0)), local_rope=Rope(10_000.0)),
}


def apply(config, params, *args, method="__call__", remat="none"):
    """The decoder, compiled as a whole."""
    return jax.jit(partial(Decoder(config, remat=remat).apply, method=method))(params, *args)


def plain(tokens):
    """Positions and segments of rows without padding."""
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    return positions, np.ones_like(positions)


# Bridges and their exports

TEXTS = ["Premise: a b c Hypothesis: d", "e f", "the dog runs near the river and sings"]
NEAR_TIE = 1e-4


NO_ALIGNER = AlignerConfig()


def make_run(workdir, tiny, fusion="last", projector="linear", decoder=None, trained=(),
             data=None, encoder=None, prefix="", aligner=NO_ALIGNER):
    """A workdir with a checkpoint of random parameters, and its model."""
    own = ["projector/.*"] + ["fusion/.*"] * (fusion not in ("last", "layer"))
    own += ["aligner/.*"] * (aligner.name != "none")
    groups = {"bridge": GroupConfig((*own, *trained))}
    config = Config(
        encoder=EncoderSettings(str(encoder or tiny / "encoder"), prefix=prefix),
        decoder=DecoderSettings(str(decoder or tiny / "decoder")),
        fusion=FusionConfig(fusion, layer=2, d_ff=48), projector=ProjectorConfig(projector),
        aligner=aligner, data=data or DataConfig(), optimizer=OptimizerConfig(groups=groups),
    )
    model = load_model(config, make_mesh())
    rng = np.random.default_rng(0)
    trainable = {path: x + jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype)
                 for path, x in model.trainable.items()}
    if "fusion/w" in trainable:  # its scale is 100
        trainable |= {"fusion/w": 0.01 * trainable["fusion/w"],
                      "fusion/t": 1e-5 * trainable["fusion/t"]}
    workdir.mkdir(parents=True)
    configs.save(config, workdir / "config.json")
    checkpoints = Checkpoints(workdir)
    checkpoints.save(State(jnp.array(3), trainable, ()), {}, None)
    checkpoints.close()
    write_frozen(workdir, to_keep(model, ()))
    write_checked(workdir / ORIGIN, json.dumps(model.origin))
    return replace(model, trainable=trainable)


def change_tower(directory):
    """Gives a checkpoint other weights of the same shapes."""
    tensors = load_file(directory / "model.safetensors")
    save_file({name: -x for name, x in tensors.items()}, directory / "model.safetensors")


def theirs_of(out):
    """An export's model and tokenizer, as transformers loads them."""
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    return model, tokenizer


def next_logits(model, queries):
    """Our logits after each text's prefix, and what stands behind it."""
    params = merge(model.trainable, model.frozen)
    rows = [TokenRow(query, after(model), [], model.bridge.latents) for query in queries]
    (numbers, batch), = in_order(rows, find_shapes(rows, (64,)), model.tokenizers, len(rows))
    logits = jax.jit(partial(prefill, model.bridge), static_argnums=(2, 3))(
        params, batch, 1, False)[1]
    return np.asarray(logits)[np.argsort(numbers)]


def after(model):
    """What follows every prefix."""
    return model.tokenizers.encode_prompts([model.config.data.text_prompt])[0]


def extend(model, queries, answers):
    """Our logits at every slot of the answers, which are as long as each other."""
    params = merge(model.trainable, model.frozen)
    rows = [TokenRow(query, after(model), list(answer), model.bridge.latents)
            for query, answer in zip(queries, answers, strict=True)]
    (numbers, batch), = in_order(rows, find_shapes(rows, (64,)), model.tokenizers, len(rows))
    logits = jax.jit(model.bridge.target_logits)(params, batch)
    return np.asarray(logits)[np.argsort(numbers), :len(answers[0])]


def decoder_of(case, rows):
    """A family's decoder for prompts and answers of 64 tokens."""
    config = replace(DECODERS[case], vocab_size=rows, max_length=512)
    if config.logit_cap:  # a low one makes near-ties of all large logits
        config = replace(config, logit_cap=30.0)
    if isinstance(config.rope.scaling, LongScaling):  # all within the short factors
        magnitude = math.sqrt(1 + math.log(512 / 256) / math.log(256))
        scaling = replace(config.rope.scaling, original_length=256, magnitude=magnitude)
        config = replace(config, rope=replace(config.rope, scaling=scaling))
    return config


def write_family(case, tiny, path):
    """A family's checkpoint with the tiny tokenizer; returns its config."""
    shutil.copytree(tiny / "decoder", path)
    config = decoder_of(case, json.loads((path / "config.json").read_text())["vocab_size"])
    write_tower(path, config, random_params(config, 0))
    return config


# What each family writes around a text, in the names of its tokens.
FRAMES = {"bert": "[CLS] $A [SEP]", "xlm-roberta": "<s> $A </s>", "modernbert": "<bos> $A <eos>",
          "m2m_100": "eng_Latn $A </s>"}


def write_encoder_family(family, tiny, path):
    """An encoder's checkpoint of a family, with the tiny tokenizer and the family's own frame."""
    shutil.copytree(tiny / "encoder", path)
    if family in FRAMES:
        tokenizer = AutoTokenizer.from_pretrained(path)
        start, _, end = FRAMES[family].split()
        extra = [start, end, "sin_Sinh"] if family == "m2m_100" else [start, end]
        tokenizer.add_special_tokens({"additional_special_tokens": extra})
        tokenizer._tokenizer.post_processor = TemplateProcessing(
            single=FRAMES[family],
            special_tokens=[(x, tokenizer.convert_tokens_to_ids(x)) for x in (start, end)])
        tokenizer.eos_token = None if family == "bert" else end
        tokenizer.sep_token = end
        tokenizer.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    first = ENCODERS[family].first_position and 1  # the id of padding is 0
    config = replace(ENCODERS[family], vocab_size=config["vocab_size"], first_position=first)
    if config.max_length:
        config = replace(config, max_length=512)
    write_tower(path, config, random_params(config, 0))
    return config
