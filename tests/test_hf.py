"""Hugging Face directories: rows both ways, what is refused and how, conversion of pickles."""

import json
import shutil
import subprocess
import sys
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from jaxfusion.errors import InputError
from jaxfusion.hf import hub
from jaxfusion.hf.convert import convert
from jaxfusion.hf.decoders import decoder_config
from jaxfusion.hf.encoders import encoder_config
from jaxfusion.hf.load import INDEX, SINGLE, load_params, open_tensors, read_config, read_shape
from jaxfusion.hf.save import to_tensors, write_shards
from jaxfusion.hf.tables import tower_table
from jaxfusion.miniatures.checkpoints import random_params
from jaxfusion.runs.export.card import base_of
from jaxfusion.training.origin import digest


def config_of(path):
    read = {"encoder": encoder_config, "decoder": decoder_config}[path.name]
    return read(read_config(path), "config.json")


def load(path, dtype=jnp.float32):
    config = config_of(path)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = traverse_util.flatten_dict(jax.eval_shape(lambda: random_params(config, 0)), sep="/")
    wanted = {name: jax.ShapeDtypeStruct(x.shape, dtype, sharding=here)
              for name, x in shapes.items()}
    return traverse_util.unflatten_dict(load_params(path, tower_table(config), wanted), sep="/")


@pytest.fixture
def checkpoint(tiny, tmp_path):
    """A copy of the tiny checkpoint that a test may damage."""
    return shutil.copytree(tiny, tmp_path / "copy")


def edit(path, change):
    """Rewrites the tensors of a directory after `change(tensors)`."""
    tensors = load_file(path / SINGLE)
    change(tensors)
    save_file(tensors, path / SINGLE)


@pytest.mark.parametrize("role", ["encoder", "decoder"])
def test_load_then_export_gives_the_same_tensors(tiny, role, tmp_path):
    params = load(tiny / role)
    write_shards(tmp_path, to_tensors(tower_table(config_of(tiny / role)), params))
    before, after = load_file(tiny / role / SINGLE), load_file(tmp_path / SINGLE)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_shards_hold_what_one_file_holds(tiny, tmp_path):
    path = tiny / "decoder"
    write_shards(tmp_path, load_file(path / SINGLE).items(), shard_bytes=100_000)
    shutil.copy(path / "config.json", tmp_path / "config.json")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    sharded = tmp_path.rename(tmp_path.with_name("decoder"))
    leaves = [jax.tree.leaves(load(place)) for place in (sharded, path)]
    assert all(np.array_equal(ours, whole) for ours, whole in zip(*leaves, strict=True))


def test_bfloat16_is_read_and_made(tiny, checkpoint):
    edit(checkpoint / "encoder", lambda t: t.update(
        {name: x.astype(jnp.bfloat16) for name, x in t.items()}
    ))
    as_float = load(checkpoint / "encoder")["embed"]["embedding"]
    as_bf16 = load(tiny / "encoder", jnp.bfloat16)["embed"]["embedding"]
    assert as_float.dtype == np.float32 and as_bf16.dtype == jnp.bfloat16
    assert np.array_equal(as_float, as_bf16.astype(np.float32))


def test_either_name_of_the_embedding_serves(tiny, checkpoint):
    edit(checkpoint / "encoder", lambda t: t.update(
        {"encoder.embed_tokens.weight": t.pop("shared.weight")}
    ))
    one, other = load(tiny / "encoder"), load(checkpoint / "encoder")
    assert np.array_equal(one["embed"]["embedding"], other["embed"]["embedding"])


def test_every_wrong_tensor_is_named_at_once(checkpoint):
    def damage(tensors):
        tensors["model.extra.weight"] = tensors.pop("model.norm.weight")
        name = "model.layers.1.mlp.up_proj.weight"
        tensors[name] = tensors[name][:-1]

    edit(checkpoint / "decoder", damage)
    with pytest.raises(InputError) as error:
        load(checkpoint / "decoder")
    text = str(error.value)
    assert "missing: model.norm.weight" in text and "unused: model.extra.weight" in text
    assert "model.layers.1.mlp.up_proj.weight is [127, 64], expected [128, 64]" in text
    assert "\n" not in text


def test_half_directories_say_which_file(checkpoint, tmp_path):
    (checkpoint / "encoder" / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json is missing"):
        read_config(checkpoint / "encoder")
    with pytest.raises(InputError, match=r"model\.safetensors .* is missing"):
        open_tensors(tmp_path)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"model-00001-of-00002\.safetensors missing"):
        open_tensors(tmp_path)


def test_a_file_cut_short_is_named(checkpoint):
    file = checkpoint / "decoder" / SINGLE
    whole = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-100])
    sizes = rf"damaged or truncated \({whole - 100:,} bytes, expected {whole:,}\)"
    with pytest.raises(InputError, match=sizes):
        load(checkpoint / "decoder")


def test_nan_is_named(checkpoint):
    name = "model.layers.1.mlp.up_proj.weight"

    def damage(tensors):
        tensors[name] = tensors[name].copy()
        tensors[name][3, 5] = np.nan

    edit(checkpoint / "decoder", damage)
    with pytest.raises(InputError, match=f"{name} has NaN or infinity; the checkpoint"):
        load(checkpoint / "decoder")


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_an_index_stays_in_its_directory(checkpoint, file):
    index = {"weight_map": {"model.norm.weight": file}}
    (checkpoint / "decoder" / INDEX).write_text(json.dumps(index))
    (checkpoint / "decoder" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=f"points to '{file}', expected names of files"):
        load(checkpoint / "decoder")


def test_unsupported_configs_are_refused_by_name():
    with pytest.raises(InputError, match="'mamba' is not supported as decoder; known: llama"):
        decoder_config({"model_type": "mamba"}, "config.json")
    with pytest.raises(InputError, match="feed_forward_proj is 'relu'"):
        encoder_config({"model_type": "t5", "feed_forward_proj": "relu"}, "config.json")
    with pytest.raises(InputError, match="rope_type 'yarn' is not supported"):
        decoder_config({
            "model_type": "llama", "num_attention_heads": 2, "hidden_size": 8,
            "num_hidden_layers": 1, "rope_scaling": {"rope_type": "yarn", "factor": 2.0},
        }, "config.json")


# Pickles


def to_pickle(path, *, shards=1, legacy=False):
    """Replaces a directory's safetensors by what `torch.save` writes."""
    names = list(load_file(path / SINGLE).items())
    tensors = {name: torch.from_numpy(x) for name, x in names}
    (path / SINGLE).unlink()
    if shards == 1:
        torch.save(tensors, path / "pytorch_model.bin",
                   _use_new_zipfile_serialization=not legacy)
        return
    weight_map = {}
    for i in range(shards):
        part = dict(list(tensors.items())[i::shards])
        file = f"pytorch_model-{i + 1:05d}-of-{shards:05d}.bin"
        torch.save(part, path / file)
        weight_map |= dict.fromkeys(part, file)
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_pickle_is_refused_with_the_command_that_mends_it(checkpoint, tmp_path):
    path = checkpoint / "encoder"
    to_pickle(path)
    with pytest.raises(InputError) as error:
        open_tensors(path)
    command = f"python -m jaxfusion.hf.convert {path} checkpoints/encoder"
    assert str(error.value).endswith(command)
    # The command does what it says (from another place, so that OUT is ours).
    words = [sys.executable, *command.split()[1:-1], str(tmp_path / "out" / "encoder")]
    subprocess.run(words, check=True, capture_output=True)
    assert open_tensors(tmp_path / "out" / "encoder").files


@pytest.mark.parametrize("shards,legacy", [(1, False), (1, True), (3, False)])
def test_converted_is_what_was_pickled(tiny, checkpoint, shards, legacy, tmp_path):
    to_pickle(checkpoint / "decoder", shards=shards, legacy=legacy)
    out = tmp_path / "out" / "decoder"
    out.parent.mkdir()
    convert(str(checkpoint / "decoder"), out)
    for ours, whole in zip(jax.tree.leaves(load(out)), jax.tree.leaves(load(tiny / "decoder")),
                           strict=True):
        assert np.array_equal(ours, whole)
    assert (out / "tokenizer.json").is_file()


def test_aliases_are_converted_once(checkpoint, tmp_path):
    path = checkpoint / "encoder"
    tensors = {name: torch.from_numpy(x) for name, x in load_file(path / SINGLE).items()}
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
    (path / SINGLE).unlink()
    torch.save(tensors, path / "pytorch_model.bin")
    convert(str(path), tmp_path / "encoder")
    assert "encoder.embed_tokens.weight" not in open_tensors(tmp_path / "encoder").files
    load(tmp_path / "encoder")


def test_conversion_leaves_nothing_half_written(checkpoint, tmp_path):
    path = checkpoint / "decoder"
    to_pickle(path, shards=2)
    shard = path / "pytorch_model-00002-of-00002.bin"
    shard.write_bytes(b"no pickle")
    with pytest.raises(InputError, match="cannot be read"):
        convert(str(path), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("precious")
    with pytest.raises(InputError, match="is not empty"):
        convert(str(path), tmp_path / "full")
    assert (tmp_path / "full" / "mine").read_text() == "precious"


def test_code_in_a_pickle_is_not_run(checkpoint, tmp_path):
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    path = checkpoint / "decoder"
    (path / SINGLE).unlink()
    torch.save({"model.norm.weight": Bomb()}, path / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be read"):
        convert(str(path), tmp_path / "out")
    assert not (tmp_path / "ran").exists()


# Names


def test_local_paths_win_and_absent_ones_are_said(tiny):
    assert hub.resolve(str(tiny)) == (tiny, None)
    with pytest.raises(InputError, match="neither a directory nor a hub id"):
        hub.resolve("/no/such/directory")


@pytest.mark.parametrize("kind,expected", [
    ("GatedRepoError", "accept its licence at https://huggingface.co/a/b, then log in with"),
    ("RepositoryNotFoundError", "a/b is not on the hub"),
    ("RevisionNotFoundError", "has no revision 'abc'"),
])
def test_each_failure_of_the_hub_is_one_line(monkeypatch, kind, expected):
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise getattr(huggingface_hub.errors, kind)("long\nstory", response=Mock())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(InputError) as error:
        hub.resolve("a/b", "abc")
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_a_hub_out_of_reach_is_one_line():
    with pytest.raises(InputError, match="the hub cannot be reached: download it elsewhere"):
        hub.resolve("google/mt5-large")


def test_a_hub_id_is_pinned_to_the_commit_it_resolved_to(monkeypatch, tiny, tmp_path):
    import huggingface_hub

    snapshot = shutil.copytree(tiny / "encoder", tmp_path / "snapshots" / "c0ffee")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: str(snapshot))
    assert hub.resolve("a/b") == (snapshot, "c0ffee")
    (snapshot / SINGLE).unlink()
    with pytest.raises(InputError, match=r"jaxfusion\.hf\.convert a/b checkpoints/b"):
        hub.resolve("a/b")


def test_random_weights_spread_over_several_units(tiny):
    from jaxfusion.nn.decoder import Decoder

    config = config_of(tiny / "decoder")
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 20))
    positions = np.broadcast_to(np.arange(20), (2, 20))
    logits = Decoder(config).apply(
        {"params": load(tiny / "decoder")}, tokens, positions, np.ones_like(positions),
        method="score",
    )
    assert 1.5 < float(jnp.std(logits)) < 6


def test_an_infinite_weight_is_named(checkpoint):
    def damage(tensors):
        tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], np.inf)

    edit(checkpoint / "decoder", damage)
    with pytest.raises(InputError, match=r"model\.norm\.weight has NaN or infinity"):
        load(checkpoint / "decoder")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantized_weights_are_refused(checkpoint, dtype):
    """Int8 was read as numbers up to 127, FP8 ended in a traceback."""
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    file = checkpoint / "decoder" / SINGLE
    tensors, name = load_torch(file), "model.layers.0.mlp.up_proj.weight"
    save_torch(tensors | {name: tensors[name].to(dtype), "empty": torch.ones(0, 2)}, file)
    digest(checkpoint / "decoder")  # comes first, and leaves the refusal to what loads them
    save_torch(tensors | {name: tensors[name].to(dtype)}, file)
    with pytest.raises(InputError, match=f"{name} has type .*quantized checkpoints are not"):
        load(checkpoint / "decoder")


def test_a_config_of_a_quantized_checkpoint_is_refused(checkpoint):
    json_of = read_config(checkpoint / "decoder")
    quantized = {**json_of, "quantization_config": {"quant_method": "fp8"}}
    with pytest.raises(InputError, match=r"is quantized \('fp8'\)"):
        decoder_config(quantized, "config.json")


def test_a_head_of_its_own_is_used_whatever_the_config_says(checkpoint, caplog):
    """Transformers 5 does not tie a head that the file has and that differs."""
    path = checkpoint / "decoder"
    file = path / "config.json"
    file.write_text(json.dumps({**read_config(path), "tie_word_embeddings": True}))
    edit(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    assert not read_shape("decoder", path).tie_embeddings
    assert "ties the head" in caplog.text
    edit(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    assert read_shape("decoder", path).tie_embeddings


def test_a_file_beside_an_old_index_is_read(checkpoint, caplog):
    """As transformers does."""
    path = checkpoint / "decoder"
    write_shards(path, load_file(path / SINGLE).items(), shard_bytes=100_000)
    edit(path, lambda t: t.update({"model.norm.weight": t["model.norm.weight"] + 1}))
    new = load_file(path / SINGLE)["model.norm.weight"]
    assert np.array_equal(open_tensors(path).read("model.norm.weight"), new)
    assert "reading the first" in caplog.text


def test_madlads_name_of_the_embedding_serves(tiny, checkpoint):
    edit(checkpoint / "encoder", lambda t: t.update(
        {"decoder.embed_tokens.weight": t.pop("shared.weight")}))
    one, other = load(tiny / "encoder"), load(checkpoint / "encoder")
    assert np.array_equal(one["embed"]["embedding"], other["embed"]["embedding"])


def test_an_mt5_is_gated_unless_it_says_otherwise(checkpoint):
    json_of = read_config(checkpoint / "encoder")
    json_of.pop("feed_forward_proj")
    assert encoder_config(json_of, "config.json") == config_of(checkpoint / "encoder")
    with pytest.raises(InputError, match="feed_forward_proj is 'relu'"):
        encoder_config({**json_of, "model_type": "t5"}, "config.json")


def test_gelu_of_gemma_1_is_its_tanh_form(checkpoint):
    """As transformers makes it, whatever the file says."""
    gemma = {**read_config(checkpoint / "decoder"), "model_type": "gemma", "hidden_act": "gelu"}
    assert decoder_config(gemma, "config.json").activation == "gelu_tanh"


@pytest.mark.parametrize("change, message", [
    ({"num_key_value_heads": 3}, "4 attention heads are not divisible by 3"),
    ({"num_key_value_heads": -2}, "num_key_value_heads is -2, expected an integer"),
    ({"num_attention_heads": -4}, "num_attention_heads is -4, expected"),
    ({"num_attention_heads": 0}, "num_attention_heads is 0, expected"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, expected"),
    ({"num_hidden_layers": 10**6}, "1,000,000 layers, expected at most"),
    ({"rope_scaling": [1]}, r"rope_scaling is \[1\], expected a JSON object"),
    ({"rope_scaling": ""}, "rope_scaling is '', expected a JSON object"),
    ({"rope_scaling": {"factor": 8.0}}, "rope_type None is not supported"),
    ({"rope_scaling": {"type": "x\ny"}}, r"rope_type 'x\\ny' is not supported"),
    ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0],
                       "original_max_position_embeddings": 8}}, "1 numbers, expected 8: one for"),
    ({"rope_theta": 0}, "rope_theta is 0, expected a number above 0"),
    ({"hidden_act": ""}, "hidden_act is '', expected silu"),
    ({"hidden_act": ["silu"]}, r"hidden_act is \['silu'\], expected silu"),
    ({"head_dim": None, "num_attention_heads": 100}, "head_dim is 0, expected an even number"),
    ({"partial_rotary_factor": 0.1}, "0.1 rotates 1 of head_dim 16, expected an even number"),
    ({"head_dim": 7}, "head_dim is 7, expected an even number"),
    ({"vocab_size": "many"}, "vocab_size is 'many', expected"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small', expected"),
    ({"rope_theta": -1.0}, "rope_theta is -1.0, expected a number above 0"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', expected true or false"),
    ({"partial_rotary_factor": 7.0}, "partial_rotary_factor is 7.0, expected at most 1"),
    ({"model_type": "mistral", "sliding_window": -5}, "sliding_window is -5, expected an int"),
    ({"model_type": "gemma2", "hidden_activation": "gelu_pytorch_tanh",
      "query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0, expected an integer"),
    ({"model_type": "gemma2", "layer_types": []}, r"layer_types is \[\], expected a list of 2"),
    ({"model_type": "gemma2", "hidden_activation": "gelu_pytorch_tanh",
      "attn_logit_softcapping": "x"}, "attn_logit_softcapping is 'x', expected"),
])
def test_a_config_that_no_model_has_is_one_line(checkpoint, change, message):
    json_of = read_config(checkpoint / "decoder")
    json_of.pop("rope_parameters", None)
    with pytest.raises(InputError, match=message) as error:
        decoder_config({**json_of, **change}, "config.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[]", "{\"weight_map\": []}", "{\"weight_map\": {\"a\": 1}}",
                                  "{\"weight_map\": {}}",
                                  "[" * 100_000, "{"])
def test_a_damaged_index_is_one_line(checkpoint, text):
    (checkpoint / "decoder" / SINGLE).unlink()
    (checkpoint / "decoder" / INDEX).write_text(text)
    with pytest.raises(InputError, match=r"index\.json is (not|damaged)"):
        open_tensors(checkpoint / "decoder")


def test_an_index_names_what_its_shards_hold(checkpoint):
    """A tensor that is missing from its shard was a traceback."""
    path = checkpoint / "decoder"
    names = [*load_file(path / SINGLE), "model.none.weight"]
    (path / SINGLE).rename(path / "model-00001-of-00001.safetensors")
    (path / INDEX).write_text(json.dumps(
        {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}))
    with pytest.raises(InputError, match=r"model\.none\.weight is missing from model-00001"):
        open_tensors(path)


def test_what_training_saved_is_converted(tiny, tmp_path):
    """MindMerger's own file holds its state dict inside of another dictionary."""
    tensors = {name: torch.tensor(x) for name, x in load_file(tiny / "decoder" / SINGLE).items()}
    (tmp_path / "in").mkdir()
    torch.save({"model_state_dict": tensors, "epoch": 3}, tmp_path / "in" / "pytorch_model.bin")
    convert(str(tmp_path / "in"), tmp_path / "out")
    assert load_file(tmp_path / "out" / SINGLE).keys() == tensors.keys()


@pytest.mark.parametrize("value, message", [
    ([1, 2], "has a list without named tensors"), ({"a": {"b": {"c": 1}}}, "has a dict without"),
    (Mock, "cannot be read: it is damaged, or has more than tensors")])
def test_other_pickles_are_one_line(tmp_path, value, message):
    (tmp_path / "in").mkdir()
    torch.save(value, tmp_path / "in" / "pytorch_model.bin")
    with pytest.raises(InputError, match=message) as error:
        convert(str(tmp_path / "in"), tmp_path / "out")
    assert "likely succeed" not in str(error.value) and "\n" not in str(error.value)


def test_convert_stays_in_its_directory(tmp_path):
    (tmp_path / "in").mkdir()
    torch.save({"a": torch.ones(2)}, tmp_path / "secret.bin")
    index = {"weight_map": {"a": "../secret.bin"}}
    (tmp_path / "in" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"points to '\.\./secret\.bin', expected names"):
        convert(str(tmp_path / "in"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_convert_takes_the_chat_template_along(checkpoint, tmp_path):
    to_pickle(checkpoint / "decoder")
    (checkpoint / "decoder" / "chat_template.jinja").write_text("{{ messages }}")
    convert(str(checkpoint / "decoder"), tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_the_hubs_patterns_take_what_is_read(tmp_path):
    """The chat template, and no weights twice."""
    from huggingface_hub.utils import filter_repo_objects

    wanted = ["config.json", "chat_template.jinja", "model.safetensors", "tokenizer.model",
              "model-00001-of-00002.safetensors", "generation_config.json"]
    others = ["consolidated.safetensors", "onnx/model.safetensors", "original/tokenizer.model",
              "checkpoint-500/model.safetensors", "consolidated.00.pth"]
    found = filter_repo_objects([*wanted, *others], allow_patterns=hub.MODEL_FILES,
                                ignore_patterns=hub.EXCLUDED_FILES)
    assert set(found) == set(wanted)


def test_weights_that_are_whole_numbers_are_refused(checkpoint):
    edit(checkpoint / "decoder", lambda t: t.update(
        {"model.norm.weight": t["model.norm.weight"].astype(np.int32)}))
    with pytest.raises(InputError, match=r"model\.norm\.weight has type I32"):
        load(checkpoint / "decoder")


@pytest.mark.parametrize("buckets", [-1, 0, 3, "many"])
def test_buckets_that_no_encoder_has_are_one_line(checkpoint, buckets):
    json_of = {**read_config(checkpoint / "encoder"), "relative_attention_num_buckets": buckets}
    with pytest.raises(InputError, match=f"relative_attention_num_buckets is '?{buckets}"):
        encoder_config(json_of, "config.json")


@pytest.mark.parametrize("name", ["a/..", "a/."])
def test_a_name_that_leads_elsewhere_is_no_hub_id(name):
    with pytest.raises(InputError, match="neither a directory nor a hub id"):
        hub.resolve(name)


def test_a_licence_is_read_of_a_card_in_any_encoding(tmp_path):
    (tmp_path / "README.md").write_bytes(b"---\nlicense: mit\n---\nd\xe9j\xe0 vu")
    assert base_of("LLM", str(tmp_path), tmp_path).licence == {"license": "mit"}
