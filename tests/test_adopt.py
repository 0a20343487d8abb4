"""Bridges of LangBridge, MindMerger and our own exports, taken in: same logits as in PyTorch."""

import json
import shutil
import string

import numpy as np
import pytest
import torch
from helpers import make_run, next_logits, relative, write_family
from safetensors.numpy import load_file
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, MT5EncoderModel

from jaxfusion.data.tokenizers import LANGBRIDGE_WHITESPACE
from jaxfusion.errors import InputError
from jaxfusion.fields import DataConfig
from jaxfusion.hf.convert import convert
from jaxfusion.runs.adopt import adopt
from jaxfusion.runs.export.bridge import export
from jaxfusion.runs.export.langbridge import export_langbridge
from jaxfusion.runs.open_run import open_run

QUERIES = [[5, 9, 11, 30, 1], [8, 4, 1], [7, 12, 40, 2, 9, 3, 1]]
BOS = 1


class Perceiver(nn.Module):
    """What LangBridge's `latent` computes, with its names, for one unpadded row."""

    def __init__(self, width, out, latents=6):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(latents, width))
        self.enc_eos = nn.Parameter(torch.randn(out))
        attn = nn.ModuleDict({
            "norm_media": nn.LayerNorm(width), "norm_latents": nn.LayerNorm(width),
            **{x: nn.Linear(width, 512, bias=False) for x in ("to_q", "to_k", "to_v")},
            "to_out": nn.Linear(512, width, bias=False),
        })
        ffn = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.layers = nn.ModuleList([nn.ModuleList([attn, ffn])])
        self.out_proj, self.norm = nn.Linear(width, out, bias=False), nn.LayerNorm(out)

    def forward(self, features):
        attn, ffn = self.layers[0]
        asking = attn["norm_latents"](self.latents)
        seen = torch.cat([attn["norm_media"](features), asking])
        q, k, v = (attn[name](x).reshape(len(x), 8, 64).transpose(0, 1)
                   for name, x in (("to_q", asking), ("to_k", seen), ("to_v", seen)))
        weights = torch.softmax(q @ k.transpose(1, 2) / 8.0, dim=-1)
        x = self.latents + attn["to_out"]((weights @ v).transpose(0, 1).reshape(-1, 512))
        x = self.out_proj(x + ffn(x))
        return self.norm(torch.cat([x, self.enc_eos[None]]))


class Aligned(nn.Module):
    """LangBridge's `linear` and `ffn`: the end vector follows the projected features."""

    def __init__(self, kind, width, out):
        super().__init__()
        if kind == "linear":
            self.linear = nn.Linear(width, out)
        else:
            self.ffn = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(),
                                     nn.Linear(2 * width, out))
        self.enc_eos = nn.Parameter(torch.randn(out))
        self.kind = kind

    def forward(self, features):
        return torch.cat([getattr(self, self.kind)(features), self.enc_eos[None]])


class Mapping(nn.Module):
    """MindMerger's mapping."""

    def __init__(self, width, out):
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.linear1, self.mlp.linear2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, out)
        self.end_boundary = nn.Parameter(torch.randn(1, 1, out))

    def forward(self, features):
        x = self.mlp.linear2(torch.relu(self.mlp.linear1(features)))
        return torch.cat([x, self.end_boundary[0]])


@pytest.fixture(scope="module")
def towers(tiny):
    return (MT5EncoderModel.from_pretrained(tiny / "encoder").eval(),
            AutoModelForCausalLM.from_pretrained(tiny / "decoder").eval())


@torch.no_grad()
def reference(towers, alignment):
    """Logits after each unpadded row `[BOS] + prefix + end`."""
    encoder, llm = towers
    found = []
    for query in QUERIES:
        features = encoder(torch.tensor([query])).last_hidden_state[0]
        bos = llm.get_input_embeddings()(torch.tensor([BOS]))
        rows = torch.cat([bos, alignment(features)])[None]
        found.append(llm(inputs_embeds=rows).logits[0, -1].numpy())
    return np.stack(found)


def write_langbridge(out, towers, alignment, kind, tiny, pickled):
    """A directory as LangBridge's `save_pretrained` wrote them: aliases and all."""
    encoder, llm = towers
    state = {f"lb.enc.{name}": x for name, x in encoder.state_dict().items()}
    state |= {f"lb.lm.{name}": x for name, x in llm.model.state_dict().items()}
    state |= {"lb.lm_head.weight": llm.lm_head.weight,
              "lb.embeddings.weight": llm.model.embed_tokens.weight}
    state |= {f"lb.alignment.{name}": x for name, x in alignment.state_dict().items()}
    out.mkdir()
    config = {"architectures": ["LangBridgeModel"], "alignments": kind, "num_latents": 6,
              "enc": str(tiny / "encoder"), "lm": str(tiny / "decoder"), "dim_enc": 64,
              "dim_lm": 64}
    (out / "config.json").write_text(json.dumps(config))
    if pickled:
        torch.save({name: x.detach() for name, x in state.items()}, out / "pytorch_model.bin")
    else:
        save_file({name: x.detach().clone().contiguous() for name, x in state.items()},
                  out / "model.safetensors")


def logits_of(workdir):
    model = open_run(workdir).model
    return next_logits(model, QUERIES)


@pytest.mark.parametrize("kind,pickled", [("linear", True), ("ffn", False), ("latent", False)])
def test_langbridge_gives_its_logits(kind, pickled, towers, tiny, tmp_path, caplog):
    torch.manual_seed(0)
    width, out = towers[0].config.d_model, towers[1].config.hidden_size
    alignment = Perceiver(width, out) if kind == "latent" else Aligned(kind, width, out)
    source = tmp_path / "theirs"
    write_langbridge(source, towers, alignment, kind, tiny, pickled)
    if pickled:
        with pytest.raises(InputError, match="pickles are never loaded"):
            adopt(str(source), tmp_path / "run")
        convert(str(source), tmp_path / "converted")
        source = tmp_path / "converted"
    adopt(str(source), tmp_path / "run")
    assert relative(logits_of(tmp_path / "run"), reference(towers, alignment)) < 1e-5
    assert "not read" not in caplog.text


def test_mindmerger_gives_its_logits(towers, tiny, tmp_path, caplog):
    torch.manual_seed(0)
    mapping = Mapping(towers[0].config.d_model, towers[1].config.hidden_size)
    (tmp_path / "theirs").mkdir()
    save_file(mapping.state_dict(), tmp_path / "theirs" / "model.safetensors")
    with pytest.raises(InputError, match="give --encoder and --decoder"):
        adopt(str(tmp_path / "theirs"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    adopt(str(tmp_path / "theirs"), tmp_path / "run", str(tiny / "encoder"),
          str(tiny / "decoder"))
    assert relative(logits_of(tmp_path / "run"), reference(towers, mapping)) < 1e-5
    assert "not read" not in caplog.text
    save_file({**mapping.state_dict(), "more.weight": torch.zeros(2)},
              tmp_path / "theirs" / "model.safetensors")
    adopt(str(tmp_path / "theirs"), tmp_path / "more", str(tiny / "encoder"),
          str(tiny / "decoder"))
    assert "not read, as the bridge has no place for them: more.weight" in caplog.text


@pytest.mark.parametrize("fusion,projector", [
    ("transformer_softmax", "ffn"), ("global_softmax", "linear"), ("last", "resampler"),
])
def test_an_export_taken_in_again_is_the_same_bytes(fusion, projector, tiny, tmp_path):
    make_run(tmp_path / "run", tiny, fusion, projector)
    export(tmp_path / "run", tmp_path / "out", merge=True)
    adopt(str(tmp_path / "out"), tmp_path / "again")
    export(tmp_path / "again", tmp_path / "twice", merge=True)
    for file in ("model.safetensors", "encoder/model.safetensors", "decoder/model.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "twice" / file).read_bytes()


NAMES = {"enc": "google/mt5-large", "lm": "microsoft/Orca-2-7b"}


def read_as_langbridge(out):
    """The classes that LangBridge makes of a directory's names, by its rules: encoder and LLM."""
    config = json.loads((out / "config.json").read_text())
    enc = next((x for x in ("umt5", "mt5") if x in config["enc"].lower()), "auto")
    lms = {"facebook/opt": "opt", "EleutherAI/llemma": "llama", "codellama/CodeLlama": "llama",
           "microsoft/Orca-2": "llama", "meta-math/MetaMath": "llama",
           "meta-llama/Llama-2-7b-hf": "llama", "mistralai/Mistral-7B-v0.1": "mistral"}
    return enc, next(kind for start, kind in lms.items() if config["lm"].startswith(start))


def test_langbridge_knows_what_it_is_to_make(tiny, tmp_path, caplog):
    """A name that LangBridge does not take is refused, with the way out."""
    make_run(tmp_path / "run", tiny, data=DataConfig(text_prompt="so: "))
    with pytest.raises(InputError, match=r"'encoder' is a local directory; set --enc"):
        export_langbridge(tmp_path / "run", tmp_path / "out", lm=NAMES["lm"])
    with pytest.raises(InputError, match=r"'mt5' in this encoder's name, got a/b; set --enc"):
        export_langbridge(tmp_path / "run", tmp_path / "out", lm=NAMES["lm"], enc="a/b")
    with pytest.raises(InputError, match=r"microsoft/Orca-2, .*, got /.*decoder; set --lm"):
        export_langbridge(tmp_path / "run", tmp_path / "out", enc=NAMES["enc"])
    with pytest.raises(InputError, match=r"got mistralai/Mistral-7B-v0\.1; set --lm"):
        export_langbridge(tmp_path / "run", tmp_path / "out", enc=NAMES["enc"],
                          lm="mistralai/Mistral-7B-v0.1")
    assert not (tmp_path / "out").exists()
    export_langbridge(tmp_path / "run", tmp_path / "out", **NAMES)
    assert "no place for data.text_prompt: who asks the export has to give the LLM 'so: '" in (
        caplog.text)
    assert read_as_langbridge(tmp_path / "out") == ("mt5", "llama")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "LangBridgeModel.from_pretrained(DIR)" in card and str(tiny) not in card


@pytest.mark.parametrize("case,family", [("qwen3", "qwen3"), ("mistral_v01", "mistral")])
def test_langbridge_has_few_families(case, family, tiny, tmp_path):
    """An LLM that LangBridge has no class for is refused."""
    write_family(case, tiny, tmp_path / "llm")
    make_run(tmp_path / "run", tiny, decoder=tmp_path / "llm")
    if family == "mistral":
        names = {**NAMES, "lm": "mistralai/Mistral-7B-v0.1"}
        export_langbridge(tmp_path / "run", tmp_path / "out", **names)
        assert read_as_langbridge(tmp_path / "out") == ("mt5", "mistral")
        return
    with pytest.raises(InputError, match=r"llama and mistral, .* is a qwen3: use --format jax"):
        export_langbridge(tmp_path / "run", tmp_path / "out", **NAMES)


@pytest.mark.parametrize("projector", ["linear", "ffn", "resampler"])
def test_langbridges_layout_goes_out_and_in(projector, tiny, tmp_path):
    make_run(tmp_path / "run", tiny, "last", projector)
    export_langbridge(tmp_path / "run", tmp_path / "out", **NAMES)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {name.split(".")[1] for name in tensors} == {
        "enc", "lm", "lm_head", "embeddings", "alignment"}
    adopt(str(tmp_path / "out"), tmp_path / "again", str(tiny / "encoder"), str(tiny / "decoder"))
    assert np.array_equal(logits_of(tmp_path / "again"), logits_of(tmp_path / "run"))
    export_langbridge(tmp_path / "again", tmp_path / "twice", **NAMES)
    twice = (tmp_path / "twice" / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == twice


def test_whitespace_has_the_ids_of_langbridges_tokenizer():
    """`string.whitespace` without the space, then two, three and four (train_langbridge.py)."""
    assert list(LANGBRIDGE_WHITESPACE) == [*string.whitespace[1:], "  ", "   ", "    "]


def test_langbridge_has_no_fusion(tiny, tmp_path):
    make_run(tmp_path / "run", tiny, "global_softmax", "ffn")
    with pytest.raises(InputError, match="supports fusion 'last' with linear, ffn, resam"):
        export_langbridge(tmp_path / "run", tmp_path / "out")


def test_what_is_no_bridge_is_named(tiny, tmp_path):
    with pytest.raises(InputError, match="is not a bridge: expected tensors"):
        adopt(str(tiny / "decoder"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    make_run(tmp_path / "mine", tiny)
    export(tmp_path / "mine", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors.pop("projector.out.bias")
    shutil.copytree(tmp_path / "out", tmp_path / "less")
    save_file({name: torch.from_numpy(x) for name, x in tensors.items()},
              tmp_path / "less" / "model.safetensors")
    with pytest.raises(InputError, match=r"lacks projector\.out\.bias"):
        adopt(str(tmp_path / "less"), tmp_path / "run")


@pytest.mark.parametrize("field,value", [
    ("fusion", None), ("fusion", "last"), ("reader", {}), ("projector", []), ("added_tokens", 3)])
def test_an_export_that_was_changed_is_one_line(field, value, tiny, tmp_path):
    make_run(tmp_path / "run", tiny)
    export(tmp_path / "run", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    if value is None:
        del config[field]
    else:
        config[field] = value
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"config\.json: a field is missing or has the wrong type"):
        adopt(str(tmp_path / "out"), tmp_path / "again")
    assert not (tmp_path / "again").exists()
