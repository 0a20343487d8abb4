"""GGUF files against what they are made of, transformers' reading of them, and SentencePiece."""

import io
import json
import math
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import torch
from flax import traverse_util
from gguf import GGMLQuantizationType as Kind
from helpers import NEAR_TIE, apply, plain, relative
from safetensors.numpy import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from jaxfusion.data.tokenizers import adds_bos, load_tokenizer, read_end_tokens
from jaxfusion.errors import InputError
from jaxfusion.hf.convert import convert, main
from jaxfusion.hf.gguf_config import Metadata, gguf_decoder
from jaxfusion.hf.gguf_tokenizer import CONTROL, USER_DEFINED
from jaxfusion.hf.hub import resolve
from jaxfusion.hf.load import INDEX, SINGLE, load_params, open_tensors, read_shape
from jaxfusion.hf.save import to_tensors
from jaxfusion.hf.tables import tower_table
from jaxfusion.miniatures.checkpoints import random_params
from jaxfusion.nn.decoder import DecoderConfig
from jaxfusion.nn.rope import LinearScaling, Llama3Scaling, LongScaling, Rope

SLOW = pytest.mark.slow
ROWS = 352  # of the table: a few more than tokens
CORPUS = ["the dog runs near the river and sings 1984 songs", "don't WE'LL see 12 of them?\n",
          "ein Hund läuft am Fluß entlang", "කුඩා බල්ලා ගඟ අසල දුවයි", "  two  spaces   here"] * 4
TEXTS = ["the dog sings", "WE'LL see 1984, 12 of 366.", "a  b   c\n\nd", "Fluß ගඟ 狗 🙂", "x\ty"]
BASE = DecoderConfig(ROWS, d_model=64, d_ff=96, num_layers=2, num_heads=4, num_kv_heads=2,
                     head_dim=16, norm_eps=1e-5, rope=Rope(777.0), max_length=64)
GEMMA = replace(BASE, activation="gelu_tanh", embed_scale=8.0, norm_offset=1.0, post_norms=True,
                tie_embeddings=True, attn_scale=0.25)
LONG = LongScaling((1.0, 1.1, 1.2, 1.5, 2.0, 2.5, 3.0, 3.5),
                   (1.0, 2.0, 4.0, 5.0, 7.0, 9.0, 9.5, 11.0), 24,
                   math.sqrt(1 + math.log(64 / 24) / math.log(24)))
ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}


@dataclass(frozen=True)
class Case:
    """A model, how its matrices are stored, its tokenizer, and whether transformers' own config of
    the file is right."""

    config: DecoderConfig
    kind: Kind
    tokenizer: str
    read_right: bool = True


CASES = {
    "llama3": Case(BASE, Kind.F32, "llama-bpe"),
    "llama31": Case(replace(BASE, rope=Rope(5e5, Llama3Scaling(8.0, 1.0, 4.0, 8192))), Kind.F16,
                    "llama-bpe", False),
    "llama2": Case(replace(BASE, num_kv_heads=4), Kind.Q8_0, "spm"),
    "codellama": Case(replace(BASE, rope=Rope(1e6, LinearScaling(4.0))), Kind.F32, "spm", False),
    "mistral": Case(replace(BASE, family="mistral", windows=(7, 7)), Kind.Q4_0, "spm", False),
    "nemo": Case(replace(BASE, head_dim=32), Kind.BF16, "tekken"),
    "smollm": Case(replace(BASE, tie_embeddings=True), Kind.Q4_0, "smollm"),
    "qwen2": Case(replace(BASE, family="qwen2", qkv_bias=True), Kind.F16, "qwen2"),
    "qwen3": Case(replace(BASE, family="qwen3", qk_norm=True, tie_embeddings=True, head_dim=128),
                  Kind.Q8_0, "qwen2"),
    "gemma2": Case(replace(GEMMA, family="gemma2", windows=(7, None), attn_cap=50.0,
                           logit_cap=30.0), Kind.F32, "gemma", False),
    "gemma3": Case(replace(GEMMA, family="gemma3_text", qk_norm=True, num_layers=7,
                           windows=(7,) * 5 + (None, 7), rope=Rope(1e6, LinearScaling(8.0)),
                           local_rope=Rope(10_000.0)), Kind.Q8_0, "gemma", False),
    "phi3": Case(replace(BASE, family="phi3", windows=(11, 11)), Kind.Q4_0, "spm", False),
    "phi35": Case(replace(BASE, family="phi3", rope=Rope(777.0, LONG)), Kind.F32, "spm", False),
    "phi4": Case(replace(BASE, family="phi3", rope=Rope(777.0, None, 0.5)), Kind.BF16, "gpt-4o",
                 False),
}
QUICK = ("llama3", "llama31", "llama2", "qwen2", "qwen3", "gemma3", "phi35")


# Files


@pytest.fixture(scope="module")
def spm():
    """A SentencePiece model like Llama's: BPE, bytes, runs of spaces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, model_type="bpe", vocab_size=330,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        hard_vocab_limit=False, user_defined_symbols=["▁▁", "▁▁▁", "<tool>"], minloglevel=2)
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture(scope="module")
def tokenizers_of_files(spm):
    """The `tokenizer.ggml` fields of a tokenizer, by its name in `CASES`."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=340, show_progress=False, special_tokens=["<|end|>", "<|begin|>", "<|eot|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
    model = json.loads(backend.to_str())["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].get), "<think>"]
    bpe = {"model": "gpt2", "tokens": tokens, "merges": [" ".join(x) for x in model["merges"]],
           "token_type": [CONTROL] * 3 + [1] * (len(tokens) - 4) + [USER_DEFINED],
           "eos_token_id": 0, "bos_token_id": 1, "eot_token_id": 2, "add_bos_token": False}

    def from_spm(prefix):
        types = [2 if spm.is_unknown(i) else CONTROL if spm.is_control(i) else 6 if spm.is_byte(i)
                 else USER_DEFINED if i in range(3, 6) else 1 for i in range(len(spm))]
        # As llama.cpp's converter writes a user's tokens.
        tokens = [spm.id_to_piece(i).replace("▁", " ") if types[i] == USER_DEFINED
                  else spm.id_to_piece(i) for i in range(len(spm))]
        scores = [-1000.0 if x in (CONTROL, USER_DEFINED) else spm.get_score(i)
                  for i, x in enumerate(types)]
        return {"model": "llama", "pre": "default", "tokens": tokens, "scores": scores,
                "token_type": types, "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0,
                "add_bos_token": True, "add_space_prefix": prefix}

    return {"spm": from_spm(True), "gemma": from_spm(False)} | {
        name: {**bpe, "pre": name, "add_bos_token": name in ("llama-bpe", "tekken")}
        for name in ("llama-bpe", "tekken", "smollm", "qwen2", "gpt-4o")}


def fields_of(config: DecoderConfig, kind: Kind) -> dict:
    """The metadata of a model, as llama.cpp's converter writes it."""
    scaling, rotated = config.rope.scaling, int(config.head_dim * config.rope.partial)
    fields = {
        "context_length": config.max_length, "embedding_length": config.d_model,
        "block_count": config.num_layers, "feed_forward_length": config.d_ff,
        "attention.head_count": config.num_heads, "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim, "attention.value_length": config.head_dim,
        "rope.dimension_count": rotated, "rope.freq_base": float(config.rope.theta),
        "attention.layer_norm_rms_epsilon": config.norm_eps, "vocab_size": config.vocab_size,
    }
    if window := next(filter(None, config.windows), None):
        fields["attention.sliding_window"] = window
    if isinstance(scaling, LinearScaling):
        fields |= {"rope.scaling.type": "linear", "rope.scaling.factor": scaling.factor}
    if isinstance(scaling, LongScaling):
        fields |= {"rope.scaling.original_context_length": scaling.original_length,
                   "rope.scaling.attn_factor": scaling.magnitude}
    if config.attn_cap:
        fields |= {"attn_logit_softcapping": config.attn_cap,
                   "final_logit_softcapping": config.logit_cap}
    family = ARCHITECTURES.get(config.family, config.family)
    return {"general.architecture": family, "general.name": "made up"} | {
        f"{family}.{key}": value for key, value in fields.items()}


def tensors_of(config: DecoderConfig, params) -> dict[str, np.ndarray]:
    """GGUF's tensors of a model, as llama.cpp's converter writes them."""
    family = ARCHITECTURES.get(config.family, config.family)
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    names, tensors = gguf.get_tensor_name_map(number, config.num_layers), {}
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    for name, x in to_tensors(tower_table(config), params):
        projection, x = name.split(".")[-2], np.asarray(x, order="C")
        if family == "llama" and projection in heads:
            n = heads[projection]
            x = x.reshape(n, 2, -1, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)
        if config.norm_offset and projection.endswith("norm"):
            x = x + 1
        tensors[names.get_name(name, (".weight", ".bias"))] = x
    scaling = config.rope.scaling
    if isinstance(scaling, Llama3Scaling):
        tensors["rope_freqs.weight"] = llama3_divisors(config)
    if isinstance(scaling, LongScaling):
        tensors["rope_factors_short.weight"] = np.array(scaling.short, np.float32)
        tensors["rope_factors_long.weight"] = np.array(scaling.long, np.float32)
    return tensors


def llama3_divisors(config: DecoderConfig) -> np.ndarray:
    """Written out by wavelength, as in the paper's code."""
    scaling, divisors = config.rope.scaling, []
    for i in range(0, config.head_dim, 2):
        length = 2 * math.pi * config.rope.theta ** (i / config.head_dim)
        low, high = (scaling.original_length / x
                     for x in (scaling.low_freq_factor, scaling.high_freq_factor))
        if length < high:
            divisors.append(1.0)
        elif length > low:
            divisors.append(scaling.factor)
        else:
            smooth = (scaling.original_length / length - 1.0) / 3.0
            divisors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return np.array(divisors, np.float32)


def write(path: Path, fields, tensors, tokenizer, kind: Kind, **writer) -> Path:
    """Writes a GGUF file; vectors stay float32."""
    out = gguf.GGUFWriter(path, fields["general.architecture"], **writer)
    rest = {**fields, **{f"tokenizer.ggml.{key}": x for key, x in tokenizer.items()}}
    for key, value in rest.items():
        if key != "general.architecture":
            sub = gguf.GGUFValueType.get_type(value[0]) if isinstance(value, list) else None
            out.add_key_value(key, value, gguf.GGUFValueType.get_type(value), sub)
    for name, x in tensors.items():
        if x.dtype == np.uint8:
            out.add_tensor(name, x, raw_dtype=Kind.Q8_K)
        elif x.ndim == 1:
            out.add_tensor(name, x.astype(np.float32))
        else:
            out.add_tensor(name, gguf.quantize(x, kind), raw_dtype=kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def make_params(config: DecoderConfig):
    """Random parameters whose norms differ, too; exact in bfloat16, as published ones are."""
    rng = np.random.default_rng(0)
    return jax.tree_util.tree_map_with_path(
        lambda keys, x: np.asarray(jnp.asarray(
            x + rng.normal(0, 0.3, x.shape) * (keys[-1].key in ("scale", "bias")),
            jnp.bfloat16), np.float32), random_params(config, 0))


@pytest.fixture(scope="module")
def base(tokenizers_of_files):
    """What a small Llama's file is made of: fields, tensors, tokenizer."""
    return (fields_of(BASE, Kind.F32), tensors_of(BASE, make_params(BASE)),
            tokenizers_of_files["llama-bpe"])


def load(path):
    """A directory's model, as jaxfusion loads it."""
    config = read_shape("decoder", path)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = traverse_util.flatten_dict(jax.eval_shape(lambda: random_params(config, 0)), sep="/")
    specs = {name: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=here)
             for name, x in shapes.items()}
    params = load_params(path, tower_table(config), specs)
    return config, {"params": traverse_util.unflatten_dict(params, sep="/")}


def theirs_of(file, **kwargs):
    """transformers' reading of a file."""
    return AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation="eager",
        **kwargs).eval()


# Models


@pytest.mark.parametrize("case", [x if x in QUICK else pytest.param(x, marks=SLOW) for x in CASES])
def test_a_file_is_what_transformers_reads(case, tokenizers_of_files, tmp_path):
    config, kind, words, read_right = (getattr(CASES[case], x) for x in CASES[case].__match_args__)
    params = make_params(config)
    file = write(tmp_path / "m.gguf", fields_of(config, kind), tensors_of(config, params),
                 tokenizers_of_files[words], kind)
    convert(str(file), tmp_path / "out")
    read, ours = load(tmp_path / "out")
    assert read == config
    if kind is Kind.F32 and not config.norm_offset:  # Gemma's norms lose bits in `+ 1`
        assert all(np.array_equal(x, y) for x, y in zip(
            jax.tree.leaves(ours["params"]), jax.tree.leaves(params), strict=True))
    # transformers knows no Mistral in GGUF: it has the same weights as a Llama.
    theirs = theirs_of(file, **({} if read_right or case == "mistral" else {
        "config": AutoConfig.from_pretrained(tmp_path / "out")}))
    tensors, wanted = load_file(tmp_path / "out" / SINGLE), theirs.state_dict()
    assert all(np.array_equal(x.astype(np.float32), wanted[name]) for name, x in tensors.items())
    assert wanted.keys() - tensors.keys() <= {"lm_head.weight"}
    tokens = np.random.default_rng(0).integers(0, 300, (2, 30))
    plainly = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        expected = plainly(torch.tensor(tokens)).logits.numpy()
        if case != "mistral":
            assert relative(theirs(torch.tensor(tokens)).logits.numpy(), expected) < 1e-5
    assert relative(apply(read, ours, tokens, *plain(tokens), method="score"), expected) < 1e-5


@pytest.mark.parametrize("kind,dtype,stored", [
    (Kind.F32, None, "float32"), (Kind.F16, None, "float16"), (Kind.BF16, None, "bfloat16"),
    (Kind.Q4_0, None, "float32"), (Kind.Q8_0, "bfloat16", "bfloat16")])
def test_nothing_is_lost_unless_asked_for(kind, dtype, stored, base, tmp_path, capsys):
    file = write(tmp_path / "m.gguf", *base, kind)
    convert(str(file), tmp_path / "out", dtype=dtype)
    said = capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == stored
    tensors = load_file(tmp_path / "out" / SINGLE)
    assert tensors["lm_head.weight"].dtype == stored
    wanted = gguf.dequantize(gguf.quantize(base[1]["output.weight"], kind), kind)
    assert np.array_equal(tensors["lm_head.weight"], wanted.astype(stored))
    assert ("16 of 21 tensors were quantised" in said) == kind.name.startswith("Q")
    assert ("21 bfloat16; 16 were rounded" in said) == (dtype is not None)
    assert ("every value is kept" in said) == (dtype is None)
    assert ("16 float16, 5 float32" in said) == (kind is Kind.F16)


def test_large_models_become_shards(base, tmp_path, monkeypatch):
    from jaxfusion.hf import convert as command
    from jaxfusion.hf.gguf import convert_gguf

    monkeypatch.setattr(command, "convert_gguf",
                        lambda file, out, dtype: convert_gguf(file, out, dtype, 100_000))
    convert(str(write(tmp_path / "m.gguf", *base, Kind.F32)), tmp_path / "out")
    assert (tmp_path / "out" / INDEX).is_file() and not (tmp_path / "out" / SINGLE).exists()
    assert len(set(open_tensors(tmp_path / "out").files.values())) > 2
    load(tmp_path / "out")


# Tokenizers


def converted(base, tokenizer, tmp_path, family="llama", **fields):
    """The tokenizers of ours, transformers' of our files, and transformers' of the GGUF file."""
    mine = {key.replace("llama.", f"{family}."): x for key, x in base[0].items()}
    config, tensors = BASE, base[1]
    if family != "llama":
        config = CASES[family].config
        mine, tensors = fields_of(config, Kind.F32), tensors_of(config, make_params(config))
    file = write(tmp_path / "m.gguf", {**mine, **fields}, tensors, tokenizer, Kind.F32)
    convert(str(file), tmp_path / "out")
    return (load_tokenizer(tmp_path / "out", ROWS, "decoder"),
            AutoTokenizer.from_pretrained(tmp_path / "out"),
            AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf"))


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", ["llama-bpe", "tekken", "qwen2", "smollm", "spm"])
def test_ids_are_those_of_transformers(name, base, tokenizers_of_files, tmp_path):
    fields = tokenizers_of_files[name]
    ours, plainly, theirs = converted(base, fields, tmp_path)
    texts = TEXTS if name == "spm" else [*TEXTS, "<think>x<|eot|>y<|begin|>"]
    wanted = theirs(texts)["input_ids"]
    assert ours(texts)["input_ids"] == plainly(texts)["input_ids"] == wanted
    assert [ours.decode(x) for x in wanted] == [plainly.decode(x) for x in wanted]
    assert ours.bos_token_id == plainly.bos_token_id == theirs.bos_token_id == 1
    assert ours.eos_token_id == plainly.eos_token_id == theirs.eos_token_id
    # transformers' own reading of byte-level ones adds GPT-2's end token behind the model's table.
    assert len(ours) == len(plainly) == len(fields["tokens"])
    assert ours.convert_ids_to_tokens(range(6, len(ours))) == fields["tokens"][6:]


def test_gemma_ids_are_those_of_transformers(base, tokenizers_of_files, spm, tmp_path):
    ours, plainly, theirs = converted(base, tokenizers_of_files["gemma"], tmp_path, "gemma2")
    for text in [*TEXTS, " one", "   x    y", "<tool>a  b", "\n\n  x"]:
        assert ids(ours, text) == ids(plainly, text) == ids(theirs, text)
        assert adds_bos(ours) and ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert len(ours) == len(plainly) == len(spm)  # theirs adds tokens behind the model's table
    pieces = list(range(len(spm)))
    assert ours.convert_ids_to_tokens(pieces) == spm.id_to_piece(pieces)


def test_a_space_before_a_text_is_sentencepieces(base, tokenizers_of_files, spm, tmp_path):
    """transformers leaves it out where the text begins with one, as no Llama 2 does."""
    ours, plainly, theirs = converted(base, tokenizers_of_files["spm"], tmp_path)
    for text in [*TEXTS, " one", "  two  ", "\n x"]:
        assert ids(ours, text) == ids(plainly, text) == spm.encode(text)
    assert ids(theirs, "  two") != spm.encode("  two")
    assert ids(ours, "a</s>b") == [*ids(ours, "a"), 2, *ids(ours, "b")]  # as in Llama 2's own file


def test_phi3_drops_white_space_behind_a_turn(base, tokenizers_of_files, tmp_path):
    """Its own tokenizer.json and llama.cpp do; no field of GGUF says so."""
    fields = tokenizers_of_files["spm"]
    ours, plainly, _ = converted(base, fields, tmp_path, "phi3")
    for tokenizer in (ours, plainly):
        assert ids(tokenizer, "</s>\n  the dog") == ids(tokenizer, "</s>the dog")
        assert ids(tokenizer, "<s>\nthe") != ids(tokenizer, "<s>the")


def test_what_the_name_of_the_rules_implies(base, tokenizers_of_files, tmp_path):
    """transformers' reading leaves it out: digits, whole words, composed characters."""
    fields = {**tokenizers_of_files["smollm"]}
    fields["tokens"] = [*fields["tokens"], "12", "Ġzebra"]
    fields["token_type"] = [*fields["token_type"], 1, 1]
    fields["merges"] = [*fields["merges"], "1 2"]
    spelled = {name: converted(base, {**fields, "pre": name}, (tmp_path / name).mkdir() or
                               tmp_path / name) for name in ("smollm", "llama-bpe", "qwen2")}
    number, word = (fields["tokens"].index(x) for x in ("12", "Ġzebra"))
    ours, plainly, theirs = spelled["smollm"]
    assert number not in ids(ours, "12") and ids(plainly, "12") == ids(ours, "12")
    assert ids(theirs, "12") == [number]
    ours, plainly, theirs = spelled["llama-bpe"]
    assert ids(ours, " zebra") == ids(plainly, " zebra") == [word] != ids(theirs, " zebra")
    ours, plainly, theirs = spelled["qwen2"]
    assert ids(ours, "e\u0301") == ids(plainly, "e\u0301") == ids(ours, "é")
    assert ids(theirs, "e\u0301") != ids(theirs, "é")


@pytest.mark.parametrize("name,said,begins", [
    ("llama-bpe", None, True), ("qwen2", None, False), ("spm", None, True), ("spm", False, False),
    ("llama-bpe", False, False), ("qwen2", True, True)])
def test_texts_begin_with_bos_as_in_llamacpp(name, said, begins, base, tokenizers_of_files,
                                             tmp_path, capsys):
    fields = {key: x for key, x in tokenizers_of_files[name].items() if key != "add_bos_token"}
    fields |= {} if said is None else {"add_bos_token": said}
    ours, plainly, _ = converted(base, fields, tmp_path)
    assert adds_bos(ours) == adds_bos(plainly) == begins
    said_so = "does not say whether texts begin with BOS" in capsys.readouterr().out
    assert said_so == (said is None)


def test_chats_end_where_the_file_says(base, tmp_path):
    template = "{% for m in messages %}<|begin|>{{ m['content'] }}<|eot|>{% endfor %}"
    ours, plainly, _ = converted(base, {**base[2], "add_eos_token": True}, tmp_path,
                                 **{"tokenizer.chat_template": template})
    assert ours.chat_template == plainly.chat_template == template
    assert read_end_tokens(tmp_path / "out", ROWS) == (0, 2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.eos_token_id == [0, 2]
    assert ids(ours, "a") and ours("a")["input_ids"][-1] == 0


# Refusals and remarks


def no_tokenizer(fields, tensors, tokenizer):
    tokenizer.clear()


def change(key, value):
    """Sets a field of the metadata or of the tokenizer, or removes it."""
    def apply_to(fields, tensors, tokenizer):
        group = tokenizer if key in tokenizer or "." not in key else fields
        group.pop(key, None)
        if value is not None:
            group[key] = value
    return apply_to


def renamed(family):
    def apply_to(fields, tensors, tokenizer):
        for key in [x for x in fields if x.startswith("llama.")]:
            fields[key.replace("llama", family, 1)] = fields.pop(key)
        fields["general.architecture"] = family
    return apply_to


def tensor(name, value):
    def apply_to(fields, tensors, tokenizer):
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    return apply_to


REFUSED = {
    "family": (renamed("falcon"), "architecture 'falcon' is not supported; known: llama, qwen2"),
    "gemma1": (renamed("gemma"), "architecture 'gemma' is not supported; known: llama, qwen2"),
    "encoder": (renamed("t5encoder"), r"is an encoder \(t5encoder\); only decoders"),
    "adapter": (change("general.type", "adapter"), "holds no model but a part of one: 'adapter'"),
    "split": (change("split.count", 3), "is one of 3 parts; merge them with .*llama-gguf-split"),
    "no tokenizer": (no_tokenizer, "has no tokenizer"),
    "unigram": (change("model", "t5"), "tokenizer of kind 't5' is not supported"),
    "rules": (change("pre", "refact"), "cuts words \\('refact'\\) is not known"),
    "no rules": (change("pre", None), "cuts words \\('default'\\) is not known"),
    "no end": (change("eos_token_id", None), "eos_token_id is missing"),
    "end beyond": (change("eos_token_id", 999), "special token 999 is not one of"),
    "types": (change("token_type", [1, 2]), "token_type has 2 values, expected 341 of type int"),
    "no type": (change("token_type", [9] * 341), "a token of type 9, expected 1 to 6"),
    "merges": (change("merges", ["x yy"]), "merges is damaged"),
    "scale": (change("llama.attention.scale", 0.5), "llama.attention.scale is 0.5, expected 0.25"),
    "mask": (change("llama.attention.causal", False), "not causal: it is an encoder"),
    "yarn": (change("llama.rope.scaling.type", "yarn"), "RoPE scaling 'yarn' is not supported"),
    "no width": (change("llama.embedding_length", None), "llama.embedding_length is missing"),
    "text": (change("llama.embedding_length", "64"), "embedding_length is '64', expected int"),
    "no heads": (change("llama.attention.head_count", 0), "with 0 heads, expected 1 or more"),
    "kv heads": (change("llama.attention.head_count_kv", 3), "not divisible by 3"),
    "rotated": (change("llama.rope.dimension_count", 8), "8 of 16 dimensions of a head"),
    "experts": (tensor("blk.0.ffn_gate_exps.weight", np.ones((2, 4, 4), np.float32)),
                "unused: blk.0.ffn_gate_exps.weight"),
    "missing": (tensor("blk.1.attn_q.weight", None), "missing: blk.1.attn_q.weight"),
    "shape": (tensor("blk.1.attn_q.weight", np.ones((32, 64), np.float32)),
              r"attn_q.weight is \[32, 64\], expected \[64, 64\]"),
    "other frequencies": (tensor("rope_freqs.weight", np.arange(1, 9, dtype=np.float32)),
                          "does not have the frequencies of Llama 3"),
    "type": (tensor("blk.1.ffn_down.weight", np.zeros((64, 292 * 96 // 96), np.uint8)),
             "has type Q8_K, which cannot be read"),
    "nan": (tensor("output.weight", np.full((ROWS, 64), np.nan, np.float32)), "NaN or infinity"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(what, base, tmp_path):
    parts, (spoil, message) = [dict(x) for x in base], REFUSED[what]
    spoil(*parts)
    if what == "type":  # its blocks have 256 numbers
        parts[0]["llama.feed_forward_length"] = 256
        for i in range(2):
            for name in ("gate", "up"):
                parts[1][f"blk.{i}.ffn_{name}.weight"] = np.ones((256, 64), np.float32)
        parts[1]["blk.0.ffn_down.weight"] = np.ones((64, 256), np.float32)
    file = write(tmp_path / "m.gguf", *parts, Kind.F32)
    with pytest.raises(InputError, match=message) as error:
        convert(str(file), tmp_path / "out")
    assert str(file) in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == [file]


def test_damaged_files_are_refused(base, tmp_path):
    whole = write(tmp_path / "m.gguf", *base, Kind.F32).read_bytes()
    number = whole.index(b"output_norm.weight") + 18 + 4 + 8  # of its type
    cases = {
        "is not a GGUF file: it begins with": b"no model" * 100,
        r"truncated \(30 bytes\)": whole[:30], "cannot be read": whole[:5000],
        "damaged": whole[:-4096], "not a valid GGMLQuantizationType":
            whole[:number] + (99).to_bytes(4, "little") + whole[number + 4:],
        "version 9": whole[:4] + (9).to_bytes(4, "little") + whole[8:], "begins with b''": b"",
    }
    for message, content in cases.items():
        (tmp_path / "m.gguf").write_bytes(content)
        with pytest.raises(InputError, match=message):
            convert(str(tmp_path / "m.gguf"), tmp_path / "out")
    (tmp_path / "m.gguf").unlink()
    write(tmp_path / "m.gguf", *base, Kind.F32, endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(InputError, match="is a big-endian GGUF file"):
        convert(str(tmp_path / "m.gguf"), tmp_path / "out")
    with pytest.raises(InputError, match="is not a file"):
        convert(str(tmp_path / "absent.gguf"), tmp_path / "out")
    with pytest.raises(InputError, match=r"but GGUF files: give one of them, such as .*m\.gguf"):
        convert(str(tmp_path), tmp_path / "out")
    with pytest.raises(InputError, match=r"is a GGUF file; .* jaxfusion\.hf\.convert .*m\.gguf"):
        resolve(str(tmp_path / "m.gguf"))
    assert [x.name for x in tmp_path.iterdir()] == ["m.gguf"]


def test_what_the_file_leaves_open_is_said(base, tokenizers_of_files, tmp_path, capsys):
    fields = {**base[0], "llama.pooling_type": 3, "tokenizer.chat_template.tools": "x"}
    convert(str(write(tmp_path / "a.gguf", fields, *base[1:], Kind.F32)), tmp_path / "a")
    said = capsys.readouterr().out
    assert "not used: llama.pooling_type" in said
    assert "other chat templates are left out: tokenizer.chat_template.tools" in said
    config = CASES["gemma2"].config
    convert(str(write(tmp_path / "b.gguf", fields_of(config, Kind.F32),
                      tensors_of(config, make_params(config)), tokenizers_of_files["gemma"],
                      Kind.F32)), tmp_path / "b")
    assert "no published Gemma has 2 layers: taking head_dim, 16" in capsys.readouterr().out
    fields = {**base[0], "general.name": "Mistral 7B Instruct v0.1"}
    convert(str(write(tmp_path / "c.gguf", fields, *base[1:], Kind.F32)), tmp_path / "c")
    assert "whether a Mistral has a window" in capsys.readouterr().out


def test_the_largest_gemmas_scale_scores_by_another_width():
    """27B of generations 2 and 3: d_model / heads. transformers takes 256 for all."""
    for family, layers, width, heads, head_dim, scaled_by in (
            ("gemma2", 46, 4608, 32, 128, 144), ("gemma3", 62, 5376, 32, 128, 168),
            ("gemma2", 42, 3584, 16, 256, 256), ("gemma3", 18, 640, 4, 256, 256)):
        config = replace(CASES[family].config, d_model=width, num_heads=heads, head_dim=head_dim,
                         num_kv_heads=heads, num_layers=layers)
        fields = fields_of(config, Kind.F32)
        read, remarks = gguf_decoder(Metadata(Path("m.gguf"), fields),
                                     {"token_embd.weight": (ROWS, width)}, None)
        assert round(read.attn_scale**-2) == scaled_by and not remarks


def test_the_command(base, tmp_path, monkeypatch, capsys):
    file = write(tmp_path / "m", *base, Kind.Q8_0)  # known by its first bytes
    command = ["convert", str(file), str(tmp_path / "out"), "--dtype", "bfloat16"]
    monkeypatch.setattr(sys, "argv", command)
    main()
    assert "16 were rounded" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"^error: .* is not empty"):
        main()
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(sys, "argv", [*command[:2], str(tmp_path / "other")])
    with pytest.raises(SystemExit, match=r"gguf is not installed: pip install .*\[convert\]"):
        main()
    with pytest.raises(InputError, match="--dtype is for GGUF files"):
        convert("google/mt5-small", tmp_path / "other", dtype="float32")


# Published files


@SLOW
def test_a_published_file(tmp_path):
    """Its weights, ids, logits and greedy tokens are those of transformers' reading of it."""
    if not (name := os.environ.get("JAXFUSION_REAL_GGUF")):
        pytest.skip("JAXFUSION_REAL_GGUF is not set: it names a GGUF file")
    file = Path(name)
    convert(str(file), tmp_path / "out")
    theirs, words = theirs_of(file), AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tensors, wanted = load_file(tmp_path / "out" / SINGLE), theirs.state_dict()
    assert all(np.array_equal(x.astype(np.float32), wanted[name]) for name, x in tensors.items())
    config, params = load(tmp_path / "out")
    ours = load_tokenizer(tmp_path / "out", config.vocab_size, "decoder")
    prompts = ["The capital of France is", "def add(a, b):\n    return", "In 1984, Winston"]
    for text in [*TEXTS, *prompts, " one", "   x    y", "සිංහල naïve 中文", "\n\n\tx"]:
        assert ours(text)["input_ids"] == words(text)["input_ids"]
    for prompt in prompts:
        asked = ours(prompt, return_tensors="pt")
        found = theirs.generate(**asked, max_new_tokens=64, do_sample=False, eos_token_id=None)
        with torch.no_grad():
            expected = theirs(found).logits[0].numpy()
        logits = np.asarray(apply(config, params, found.numpy(), *plain(found.numpy()),
                                  method="score"))[0]
        start = asked.input_ids.shape[1] - 1
        best = np.sort(expected[start:-1], axis=-1)
        near = np.flatnonzero(best[:, -1] - best[:, -2] < NEAR_TIE)
        upto = near[0] if len(near) else 64
        same = np.argmax(logits[start:-1], -1) == found[0, start + 1:].numpy()
        print(f"{prompt!r}: logits differ by {relative(logits, expected):.1e} of the largest; "
              f"{upto} tokens compared, all {'equal' if same[:upto].all() else 'NOT equal'}")
        assert relative(logits, expected) < 1e-4 and upto > 8 and same[:upto].all()
