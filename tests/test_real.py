"""Real pretrained checkpoints against transformers; `JAXFUSION_REAL` names their directory.

Its subdirectories are looked at one by one: an encoder's states, an LLM's logits and greedy tokens.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import NEAR_TIE, debug_config, relative, torch_encoder
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from jaxfusion.data.tokenizers import load_tokenizer
from jaxfusion.fields import ParallelConfig
from jaxfusion.hf.convert import convert
from jaxfusion.hf.json_fields import FAMILIES
from jaxfusion.hf.load import load_params, read_config, read_shape
from jaxfusion.hf.tables import tower_table
from jaxfusion.lens import job
from jaxfusion.miniatures.checkpoints import random_params
from jaxfusion.nn.decoder import Decoder
from jaxfusion.nn.encoder import Encoder
from jaxfusion.runs.export.tower import export_lens
from jaxfusion.training.state import merge

REAL = Path(os.environ.get("JAXFUSION_REAL", "/nowhere"))
TEXTS = ["query: The river rises in spring.", "query: ගඟ වසන්තයේ දී ඉහළ යයි.",
         "query: Mto hupanda wakati wa masika, na watu huvuka kwa mashua.", "query: 川"]
PROMPTS = ["The capital of France is", "Once upon a time, in a village by the sea,", "2, 4, 6, 8,"]
CHECKPOINTS = sorted(x for x in REAL.glob("*") if (x / "config.json").is_file())
pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    not CHECKPOINTS, reason="JAXFUSION_REAL does not name a directory of checkpoints")]


def of_role(role):
    return [pytest.param(x, id=x.name) for x in CHECKPOINTS
            if read_config(x)["model_type"] in FAMILIES[role]]


def loaded(path, config):
    """A checkpoint's parameters, float32."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(lambda: random_params(config, 0))
    specs = {"/".join(key.key for key in keys): jax.ShapeDtypeStruct(
        x.shape, jnp.float32, sharding=device)
        for keys, x in jax.tree_util.tree_leaves_with_path(shapes)}
    return {"params": merge(load_params(path, tower_table(config), specs), {})}


@pytest.mark.parametrize("path", of_role("encoder"))
@pytest.mark.parametrize("side", ["right", "left"])
def test_an_encoders_states(path, side):
    config = read_shape("encoder", path)
    tokenizer = load_tokenizer(path, config.vocab_size, "encoder")
    batch = tokenizer(TEXTS, padding=True, padding_side=side, return_tensors="pt")
    theirs = torch_encoder(config.family).from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        out = theirs(batch["input_ids"], batch["attention_mask"], output_hidden_states=True)
    tokens, mask = batch["input_ids"].numpy(), batch["attention_mask"].numpy() != 0
    states = jax.jit(lambda p, *x: Encoder(config).apply(p, *x, states=True))(
        loaded(path, config), tokens, mask)
    for ours, reference in zip(states, out.hidden_states[1:], strict=True):
        assert relative(ours[mask], reference.numpy()[mask]) < 1e-5


@pytest.mark.parametrize("path", of_role("decoder"))
def test_an_llms_logits_and_greedy_tokens(path):
    config = read_shape("decoder", path)
    tokenizer = load_tokenizer(path, config.vocab_size, "decoder")
    theirs = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager").eval()
    theirs.generation_config.eos_token_id = None
    params = loaded(path, config)
    score = jax.jit(lambda *x: Decoder(config).apply(params, *x, method="score"))
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        answer = theirs.generate(ids, max_new_tokens=64, do_sample=False)
        tokens = answer.numpy()
        positions = np.arange(tokens.shape[1])[None]
        with torch.no_grad():
            reference = theirs(answer).logits.numpy()
        ours = np.asarray(score(tokens, positions, np.ones_like(positions)))
        assert relative(ours, reference) < 1e-5
        best = np.sort(ours[0], axis=-1)
        clear = (best[:, -1] - best[:, -2] > NEAR_TIE)[ids.shape[1] - 1 : -1]
        greedy = np.argmax(ours[0], axis=-1)[ids.shape[1] - 1 : -1]
        assert clear.sum() > 50
        assert np.array_equal(greedy[clear], tokens[0, ids.shape[1]:][clear])


@pytest.mark.parametrize("path", of_role("decoder"))
def test_an_llm_that_lens_moved_goes_to_gguf_and_back(path, real_data, tmp_path):
    """llama.cpp's own converter reads the export, and its file has the values that were trained.

    `JAXFUSION_LLAMA_CPP` names its convert_hf_to_gguf.py.
    """
    if not (script := os.environ.get("JAXFUSION_LLAMA_CPP")):
        pytest.skip("JAXFUSION_LLAMA_CPP is not set: it names llama.cpp's convert_hf_to_gguf.py")
    prompts = str(real_data / "ntrex" / "NTREX-128" / "newstest2019-{language}.txt")
    config = debug_config(data=ParallelConfig(
        path=prompts, central="en", targets=("sw", "si"), probe_rows=12, rows=8,
        columns={"en": "src.eng", "sw": "ref.swa", "si": "ref.sin"}))
    config = replace(config, decoder=replace(config.decoder, checkpoint=str(path)))
    job.lens(config, tmp_path / "run")
    export_lens(tmp_path / "run" / "lens", tmp_path / "out")
    subprocess.run([sys.executable, script, "--outtype", "f32", "--outfile", tmp_path / "a.gguf",
                    tmp_path / "out"], check=True)
    convert(str(tmp_path / "a.gguf"), tmp_path / "back")
    sent, back = (load_file(tmp_path / x / "model.safetensors") for x in ("out", "back"))
    before = load_file(path / "model.safetensors")
    assert sent.keys() == back.keys()
    assert all(torch.equal(sent[name].float(), back[name]) for name in sent)
    assert any(not torch.equal(sent[name], before[name]) for name in sent)
