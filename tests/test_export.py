"""Exported bridges in plain PyTorch: same logits, same greedy tokens, whatever the padding."""

import json
import re
import shutil
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from helpers import (
    NEAR_TIE,
    TEXTS,
    after,
    extend,
    make_run,
    relative,
    theirs_of,
    write_encoder_family,
    write_family,
)
from safetensors import SafetensorError
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, M2M100Config, M2M100Model

from jaxfusion import config as configs
from jaxfusion.data.batching import TokenRow, find_shapes, in_order
from jaxfusion.errors import InputError
from jaxfusion.evaluation.generate import prefill
from jaxfusion.fields import AlignerConfig, DataConfig
from jaxfusion.hf import decoders, save
from jaxfusion.hf.load import SINGLE, read_shape
from jaxfusion.runs.adopt import adopt
from jaxfusion.runs.answer_file import answer_file
from jaxfusion.runs.ask import ask
from jaxfusion.runs.export.bridge import export
from jaxfusion.runs.export.langbridge import export_langbridge
from jaxfusion.runs.open_run import open_run
from jaxfusion.training.checkpoint import trained_part
from jaxfusion.training.state import merge


def check(model, out, length=16, language=None, sides=("right", "left")):
    """Logits after every prefix, padded on either side, and greedy answers."""
    theirs, tokenizer = theirs_of(out)
    tokenizer.src_lang = language
    queries = model.tokenizers.encode_queries(TEXTS, language and [language] * len(TEXTS))
    inputs = {side: tokenizer(TEXTS, padding=True, padding_side=side, return_tensors="pt")
              for side in sides}
    found = theirs.generate(**inputs[sides[-1]], max_new_tokens=length, eos_token_id=None).numpy()
    tokens = found[:, inputs[sides[-1]].input_ids.shape[1]:]
    assert tokens.shape == (len(TEXTS), length)
    ours = extend(model, queries, tokens)
    for side in inputs:
        with torch.no_grad():
            assert relative(ours[:, 0], theirs(**inputs[side]).logits[:, -1].numpy()) < 1e-5
    for row, logits in zip(tokens, ours, strict=True):
        best = np.sort(logits, axis=-1)
        near = np.flatnonzero(best[:, -1] - best[:, -2] < NEAR_TIE)
        upto = near[0] if len(near) else length
        assert upto > 8 and np.array_equal(np.argmax(logits, -1)[:upto], row[:upto])


SLOW = pytest.mark.slow  # another of a kind that is tested in every run


@pytest.mark.parametrize("fusion,projector,merged", [
    ("transformer_softmax", "ffn", True), ("last", "resampler", True),
    ("global_softmax", "linear", False), ("layer", "mapping", False),
    *(pytest.param(*x, merged, marks=SLOW) for merged in (False, True) for x in (
        ("last", "ffn"), ("layer", "linear"), ("global_softmax", "ffn"), ("last", "mapping"))),
])
def test_torch_gives_what_we_give(fusion, projector, merged, tiny, tmp_path):
    model = make_run(tmp_path / "run", tiny, fusion, projector)
    export(tmp_path / "run", tmp_path / "out", merge=merged)
    check(model, tmp_path / "out")


@pytest.mark.parametrize("case,kind,recipe", [
    ("gemma2", "linear", "default"), ("phi3", "mlp", "default"),
    ("llama31", "mlp", "paper_code"), *(pytest.param(*x, marks=SLOW) for x in (
        ("qwen3", "linear", "default"), ("qwen25_window", "mlp", "default"),
        ("gemma3", "linear", "default"))),
])
def test_an_aligner_goes_along_and_comes_in_again(case, kind, recipe, tiny, tmp_path):
    write_family(case, tiny, tmp_path / "decoder")
    aligner = AlignerConfig(kind, recipe)
    model = make_run(tmp_path / "run", tiny, "last", "mapping", tmp_path / "decoder",
                     aligner=aligner)
    export(tmp_path / "run", tmp_path / "out", merge=True)
    check(model, tmp_path / "out", sides=("right",))
    adopt(tmp_path / "out", tmp_path / "back")
    back = open_run(tmp_path / "back")
    assert back.config.aligner == aligner
    assert all(np.array_equal(back.model.trainable[path], x)
               for path, x in model.trainable.items())


def test_an_aligner_that_would_be_left_out_is_said(tiny, tmp_path):
    make_run(tmp_path / "run", tiny, "last", "mapping", aligner=AlignerConfig("linear"))
    export(tmp_path / "run", tmp_path / "out")
    theirs, tokenizer = theirs_of(tmp_path / "out")
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt")
    theirs.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        theirs(**inputs)
    theirs.gradient_checkpointing_disable()
    theirs(**inputs)
    theirs.decoder.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="leaves the aligner out"):
        theirs(**inputs)
    with pytest.raises(ValueError, match="'sdpa' or 'eager'"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True,
                                             attn_implementation="flex_attention")


@pytest.mark.parametrize("family,merged", [
    ("bert", True), ("xlm-roberta", False), ("m2m_100", True), ("modernbert", True),
    *(pytest.param(*x, marks=SLOW) for x in (
        ("bert", False), ("xlm-roberta", True), ("m2m_100", False), ("modernbert", False),
        ("umt5", True)))])
def test_every_encoder_is_read_alike(family, merged, tiny, tmp_path):
    path = tmp_path / "encoder"
    config = write_encoder_family(family, tiny, path)
    told = "sin_Sinh" if family == "m2m_100" else None
    model = make_run(tmp_path / "run", tiny, "global_softmax", encoder=path, prefix="query: ")
    export(tmp_path / "run", tmp_path / "out", merge=merged)
    check(model, tmp_path / "out", language=told)
    if merged:
        assert read_shape("encoder", tmp_path / "out" / "encoder") == config
    if not told:
        return
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    with pytest.raises(ValueError, match=r"src_lang is \[None\], expected .* en, sin_Sinh, si"):
        tokenizer("a b")
    told = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True, src_lang=told)
    assert told("a b").input_ids == tokenizer("a b", src_lang="sin_Sinh").input_ids
    assert told("a b").input_ids != tokenizer("a b", src_lang="eng_Latn").input_ids


def test_an_encoder_inside_an_encoder_decoder(tiny, tmp_path):
    """NLLB's checkpoints have the decoder, too."""
    path = tmp_path / "encoder"
    config = write_encoder_family("m2m_100", tiny, path)
    whole = M2M100Model(M2M100Config(
        vocab_size=config.vocab_size, d_model=36, encoder_layers=4, encoder_ffn_dim=72,
        encoder_attention_heads=3, decoder_layers=1, decoder_ffn_dim=20,
        decoder_attention_heads=2, pad_token_id=0)).eval()
    whole.encoder.load_state_dict(
        {name: torch.tensor(x) for name, x in load_file(path / SINGLE).items()})
    whole.save_pretrained(path)
    model = make_run(tmp_path / "run", tiny, "global_softmax", encoder=path)
    for merged in (False, True):
        export(tmp_path / "run", tmp_path / f"out{merged}", merge=merged)
        check(model, tmp_path / f"out{merged}", language="eng_Latn")


FAMILIES = ("llama31", "mistral_v01", "qwen25_window", "qwen3", "phi3", "phi35_longrope", "gemma",
            "gemma2", "gemma3")


@pytest.mark.parametrize("case", [
    x if x in ("gemma2", "qwen25_window", "phi3") else pytest.param(x, marks=SLOW)
    for x in FAMILIES])
def test_every_family_is_answered_alike(case, tiny, tmp_path):
    path = tmp_path / "decoder"
    config = write_family(case, tiny, path)
    model = make_run(tmp_path / "run", tiny, "global_softmax", decoder=path)
    export(tmp_path / "run", tmp_path / "out", merge=True)
    check(model, tmp_path / "out", length=32)  # longer than any window
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "decoder")
    assert type(alone).__name__ == decoders.ARCHITECTURES[config.family]


def test_the_llm_alone_answers_a_bridges_embeddings(tiny, tmp_path):
    """The recipe for vLLM in docs/serving.md, with transformers in vLLM's place: rows one by one,
    without padding, and no position ids."""
    make_run(tmp_path / "run", tiny, "global_softmax")
    export(tmp_path / "run", tmp_path / "out", merge=True)
    bridge, tokenizer = theirs_of(tmp_path / "out")
    llm = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "decoder")
    asked = tokenizer(["one", "a text of several words"], return_tensors="pt", padding=True)
    settings = {"max_new_tokens": 12, "do_sample": False}
    wanted = bridge.generate(**asked, **settings)[:, asked["input_ids"].shape[1]:]
    with torch.no_grad():
        embeds, real, _, _ = bridge.splice(**asked)
    for row, is_real, answer in zip(embeds, real, wanted, strict=True):
        found = llm.generate(inputs_embeds=row[is_real.bool()][None], **settings)[0]
        assert found.tolist() == answer[: len(found)].tolist()


def test_the_llms_own_generation_settings_change_nothing(tiny, tmp_path):
    path = shutil.copytree(tiny / "decoder", tmp_path / "decoder")
    (path / "generation_config.json").write_text(json.dumps(
        {"repetition_penalty": 5.0, "do_sample": True, "temperature": 3.0, "min_new_tokens": 9}))
    model = make_run(tmp_path / "run", tiny, decoder=path)
    export(tmp_path / "run", tmp_path / "out", merge=True)
    check(model, tmp_path / "out")


def test_shards_of_the_trained_part_are_put_together(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(save.write_shards, "__defaults__", (4096,))
    model = make_run(tmp_path / "run", tiny, "transformer_softmax", "ffn")
    export(tmp_path / "run", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    monkeypatch.undo()
    check(model, tmp_path / "out")


def test_nothing_that_is_read_is_written_over(tiny, tmp_path):
    """No `--out` inside a workdir or round one, whatever --overwrite says."""
    make_run(tmp_path / "run", tiny)
    make_run(tmp_path / "runs" / "other", tiny)
    inside = [tmp_path / "run" / x for x in ("checkpoints", "exported", "eval/x")]
    others = [tmp_path / "runs", tmp_path / "runs" / "other", tmp_path / "runs" / "other" / "new"]
    for out in (tmp_path / "run", tmp_path, *inside, *others):
        for overwrite in (True, False):
            for write in (export, export_langbridge):
                with pytest.raises(InputError, match=r"an input; give a|the workdir"):
                    write(tmp_path / "run", out, overwrite=overwrite)
    assert (tmp_path / "run" / "config.json").is_file()
    assert trained_part(tmp_path / "runs" / "other")[0] == 3


@pytest.mark.parametrize("merged", [False, pytest.param(True, marks=SLOW)])
def test_what_was_trained_in_a_tower_goes_along(merged, tiny, tmp_path):
    model = make_run(tmp_path / "run", tiny, trained=("encoder/embed/.*", "decoder/.*/mlp/.*"))
    export(tmp_path / "run", tmp_path / "out", merge=merged)
    check(model, tmp_path / "out")


@pytest.mark.parametrize("case", ["phi3", pytest.param("qwen25_window", marks=SLOW),
                                  pytest.param("gemma3", marks=SLOW)])
def test_trained_parts_of_a_tower_come_in_again(case, tiny, tmp_path):
    """Without `--merge`, whose files name the backbones and hold what was trained in them."""
    write_family(case, tiny, tmp_path / "llm")
    make_run(tmp_path / "run", tiny, decoder=tmp_path / "llm",
             trained=("encoder/embed/.*", "decoder/blocks/.*"))
    export(tmp_path / "run", tmp_path / "out")
    adopt(str(tmp_path / "out"), tmp_path / "again")
    export(tmp_path / "again", tmp_path / "twice")
    assert (tmp_path / "out" / SINGLE).read_bytes() == (tmp_path / "twice" / SINGLE).read_bytes()


CHAT = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}lala {{ m.content }} bako :"
        "{% else %} {{ m.content }} ;{% endif %}{% endfor %}")


@pytest.mark.parametrize("prompt", [pytest.param("", marks=SLOW),
                                    pytest.param("answer :", marks=SLOW), "{query}"])
def test_a_chats_headers_and_prompt_go_along(prompt, tiny, tmp_path):
    llm = shutil.copytree(tiny / "decoder", tmp_path / "llm")
    (llm / "chat_template.jinja").write_text(CHAT)
    data = DataConfig(chat_template=True, text_prompt=prompt)
    model = make_run(tmp_path / "run", tiny, decoder=llm, data=data)
    assert len(model.tokenizers.start) > 1 and len(after(model)) > 0
    export(tmp_path / "run", tmp_path / "out")
    adopt(str(tmp_path / "out"), tmp_path / "again")
    assert configs.load(tmp_path / "again" / "config.json").data == data
    if prompt != "{query}":
        check(model, tmp_path / "out")
        return
    theirs, tokenizer = theirs_of(tmp_path / "out")
    texts = [*TEXTS, "e f Label: "]
    start = theirs.config.prompt_offset
    found = [[i - start for i in ids if i >= start] for ids in tokenizer(texts).input_ids]
    assert model.tokenizers.encode_prompts(texts) == found
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    prompts = model.tokenizers.encode_prompts(texts)
    rows = [TokenRow(query, prompt, []) for query, prompt in zip(
        model.tokenizers.encode_queries(texts), prompts, strict=True)]
    params = merge(model.trainable, model.frozen)
    (numbers, batch), = in_order(rows, find_shapes(rows, (64,)), model.tokenizers, len(rows))
    ours = prefill(model.bridge, params, batch, 1, False)[1]
    with torch.no_grad():
        assert relative(ours, theirs(**inputs).logits[:, -1].numpy()[numbers]) < 1e-5
        bare = tokenizer.queries(texts, padding=True, return_tensors="pt").input_ids
        with pytest.raises(ValueError, match="has no query"):
            theirs(bare)
        bare += theirs.config.query_offset
        with pytest.raises(ValueError, match="no prompt after its query"):
            theirs(bare)
    # What the model card says to run is an answer.
    card = (tmp_path / "out" / "README.md").read_text()
    code = card.split("```python")[1].split("```")[0]
    code = re.sub(r"texts = .*", f"texts = {texts!r}", code)
    exec(code, {"DIR": tmp_path / "out"})


def test_a_merged_tower_is_what_it_was_byte_for_byte(tiny, tmp_path):
    make_run(tmp_path / "run", tiny)
    export(tmp_path / "run", tmp_path / "out", merge=True)
    for role in ("encoder", "decoder"):
        before, after = (load_file(folder / role / SINGLE) for folder in (tiny, tmp_path / "out"))
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[name], after[name]) for name in before)
    export(tmp_path / "run", tmp_path / "half", merge=True, dtype="bfloat16")
    half = load_file(tmp_path / "half" / "decoder" / SINGLE)
    assert {str(x.dtype) for x in half.values()} == {"bfloat16"}
    assert json.loads((tmp_path / "half" / "decoder" / "config.json").read_text())[
        "torch_dtype"] == "bfloat16"


def test_nothing_half_written_and_nothing_lost(tiny, tmp_path, monkeypatch):
    make_run(tmp_path / "run", tiny)
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("precious")
    with pytest.raises(InputError, match="is not empty"):
        export(tmp_path / "run", out)
    with monkeypatch.context() as patched:
        full = Mock(side_effect=SafetensorError("No space left on device (os error 28)"))
        patched.setattr(save, "save_file", full)
        with pytest.raises(InputError, match="cannot be written: No space left"):
            export(tmp_path / "run", out, overwrite=True)
    assert [file.name for file in out.iterdir()] == ["mine"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "run"]
    export(tmp_path / "run", out, overwrite=True)
    assert (out / "config.json").is_file() and not (out / "mine").exists()
    with pytest.raises(InputError, match="which only --merge writes"):
        export(tmp_path / "run", tmp_path / "other", dtype="bfloat16")


def test_an_encoder_that_is_told_languages_is_asked_with_one(tiny, tmp_path):
    """`--ask`, `--input` and lm-eval give it a language, or are refused."""
    write_encoder_family("m2m_100", tiny, tmp_path / "encoder")
    told, other = tmp_path / "told", tmp_path / "other"
    make_run(told, tiny, "global_softmax", encoder=tmp_path / "encoder")
    make_run(other, tiny)
    short = {"max_new_tokens": 1}
    assert ask(told, "ba du | fe", language="sin_Sinh", decoding=short) is not None
    source, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows = [{"premise": "ba", "hypothesis": "du", "language": code} for code in ("si", "eng_Latn")]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    assert answer_file(told, source, out, decoding=short) == 2
    tokens = open_run(told).layers_of("ba du", "si")["tokens"]
    assert tokens[0] == "sin_Sinh" and tokens[-1] == "</s>"
    with pytest.raises(InputError, match=r"give one of eng_Latn, sin_Sinh"):
        ask(told, "ba du | fe", decoding=short)
    with pytest.raises(InputError, match="no token for language 'xx'"):
        ask(told, "ba du | fe", language="xx", decoding=short)
    source.write_text(json.dumps({"premise": "ba", "hypothesis": "du", "language": "xx"}), "utf-8")
    with pytest.raises(InputError, match=r"rows\.jsonl:1: the encoder has no token for language"):
        answer_file(told, source, tmp_path / "new.jsonl", decoding=short)
    with pytest.raises(InputError, match="--language is for encoders that are told it"):
        ask(other, "ba du | fe", language="sin_Sinh", decoding=short)
