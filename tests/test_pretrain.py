"""Pretraining: the induced lexicon, the objectives' batches, and what comes out."""

import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FILES, PRETRAINING, get_config
from huggingface_hub import metadata_load

from jaxfusion.config import from_config_dict
from jaxfusion.data.contamination import fingerprints
from jaxfusion.data.pocket.lexicon import concepts, words
from jaxfusion.data.pocket.world import pairs, texts
from jaxfusion.data.tokenizers import train_tokenizer
from jaxfusion.errors import InputError
from jaxfusion.fields import CorpusConfig, ObjectiveConfig
from jaxfusion.hf.load import SINGLE, read_config
from jaxfusion.miniatures.inputs import make_inputs
from jaxfusion.pretraining.corpus import Document, induce_lexicon, read_corpus
from jaxfusion.pretraining.job import _every_text, pretrain, read_texts
from jaxfusion.pretraining.objectives import TextBatches, causal_rows, denoising_rows
from jaxfusion.runs.export.tower import export_tower

CONFIGS = {file.stem: file for file in FILES}
LANGUAGE = "sinh"


@pytest.fixture(scope="module")
def world():
    """Documents and pairs of English and one language, and the encoder's tokenizer."""
    documents = [Document(name, text) for name, n in (("en", 300), (LANGUAGE, 100))
                 for text in texts(name, n)]
    rows = {LANGUAGE: list(pairs(LANGUAGE, 600))}
    return documents, rows, train_tokenizer("encoder", [d.text for d in documents], 1000)


def test_the_induced_lexicon_is_the_worlds_own(world):
    forward, backward = induce_lexicon(world[1][LANGUAGE])
    known = [name for name in concepts() if name in forward]
    true = words(LANGUAGE)
    right = [name for name in known if true[name] in forward[name]]
    assert len(known) > 140 and len(right) > 0.95 * len(known)
    assert {backward.get(forward["small"]), backward.get(forward["creek"])} == {"small", "creek"}


def test_what_is_switched_hidden_or_left_is_all_to_be_restored(world):
    documents, rows_of, tokenizer = world
    config = ObjectiveConfig(switched_texts=1.0, switched_words=0.5, masked=0.3)
    rows, cut = denoising_rows(documents, rows_of, tokenizer, config, "en", 200)
    assert cut == 0
    rng, kinds = np.random.default_rng(0), set()
    for i, document in enumerate(documents[:60]):
        read, wanted, weights = rows.row(i, rng)
        assert len(read) == len(wanted) == len(weights)
        assert read[-1] == wanted[-1] == tokenizer.eos_token_id
        original = set(tokenizer(document.text)["input_ids"])
        assert set(wanted) <= original
        for shown, true, weight in zip(read, wanted, weights, strict=True):
            if weight == config.unchanged_weight:
                assert shown == true
            else:
                kinds.add("hidden" if shown == tokenizer.mask_token_id else "switched")
    assert kinds == {"hidden", "switched"}
    masked = denoising_rows(documents, {}, tokenizer, replace(config, name="masked_lm"),
                            "en", 200)[0]
    shown = {x for i in range(40) for x in masked.row(i, rng)[0]}
    assert tokenizer.mask_token_id in shown and not masked.translations


def test_a_causal_row_foretells_the_next_token_and_weighs_its_answer():
    tokenizer = train_tokenizer("decoder", ["the dog runs Label: Entailment"] * 20, 300)
    rows, _ = causal_rows([Document("en", "the dog runs Label:", "Entailment"),
                           Document("en", "the dog runs")], tokenizer,
                          ObjectiveConfig("causal_lm", answer_weight=9.0), 40)
    read, wanted, weights = rows.row(0, None)
    assert read[1:] == wanted[:-1] and wanted[-1] == tokenizer.eos_token_id
    answer = [token for token, weight in zip(wanted, weights, strict=True) if weight == 9.0]
    assert tokenizer.decode(answer).strip() == "Entailment" and weights[-1] == 1.0
    assert set(rows.row(1, None)[2]) == {1.0}


def test_batches_depend_on_their_step_alone_and_fill_their_bucket(world):
    documents, rows_of, tokenizer = world
    rows, _ = denoising_rows(documents, rows_of, tokenizer, ObjectiveConfig(), "en", 48)
    drawn = np.arange(50, len(documents))
    make = lambda: TextBatches(rows, [d.language for d in documents], drawn,  # noqa: E731
                               CorpusConfig(max_tokens=48, buckets=(16, 32)), 8, 0, 20)
    a, b = make(), make()
    for step in (7, 0, 19):
        jax.tree.map(np.testing.assert_array_equal, a[step], b[step])
        assert a[step].tokens.shape in {(8, 16), (8, 32), (8, 48)}
        assert np.all((a[step].weights > 0) == (a[step].segments > 0))
    assert not set(range(50)) & {i for members in a.members for i in members}


@pytest.mark.parametrize("name", [file.stem for file in PRETRAINING])
def test_a_pretrained_tower_opens_in_transformers(name, cache_dir, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer, MT5EncoderModel

    config = make_inputs(from_config_dict(get_config(CONFIGS[name], "debug")))
    state = pretrain(config, tmp_path / "run")
    out = tmp_path / "run" / "hf"
    role = config.tower.role
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.eos_token_id == (1 if role == "encoder" else 2)
    model = (MT5EncoderModel if role == "encoder" else AutoModelForCausalLM).from_pretrained(out)
    table = model.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(table, state.trainable[f"{role}/embed/embedding"])
    assert len(table) == read_config(out)["vocab_size"] >= len(tokenizer)
    export_tower(tmp_path / "run", tmp_path / "given")
    assert (tmp_path / "given" / SINGLE).read_bytes() == (out / SINGLE).read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "given").get_vocab() == tokenizer.get_vocab()
    for path in (str(tmp_path).encode(), str(cache_dir).encode()):
        assert not any(path in x.read_bytes() for x in (tmp_path / "given").iterdir())
    data = metadata_load(tmp_path / "given" / "README.md")
    assert data["language"] == ["en"]  # the others are made up
    with pytest.raises(InputError, match="an input; give a directory outside"):
        export_tower(tmp_path / "run", out, overwrite=True)
    export_tower(tmp_path / "run", tmp_path / "half", dtype="bfloat16")
    half = type(model).from_pretrained(tmp_path / "half")
    assert str(half.dtype) == "torch.bfloat16"
    about = json.loads((out / "pretraining.json").read_text())
    assert about["world"]["version"] == 1 and 0 <= about["dev"]["accuracy"] < 1
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    # On the texts held out, which are the same every time; batches of eight differ too much.
    losses = [json.loads(line)["dev/loss"] for line in lines if "dev/loss" in line]
    assert losses[-1] < losses[0]


def test_a_stopped_pretraining_goes_on_bit_for_bit(cache_dir, tmp_path, monkeypatch):
    config = make_inputs(from_config_dict(get_config(CONFIGS["pocket_encoder"], "debug")))
    own = shutil.copytree(config.data.path, tmp_path / "text")
    config = replace(config, data=replace(config.data, path=str(own)))
    whole = pretrain(config, tmp_path / "whole")
    # The schedule is that of all steps, so a run is stopped, not shortened.
    from jaxfusion.training import logs
    class Stop(Exception):
        pass

    def stop(*args):
        raise Stop

    said = logs.RunLog.say
    with monkeypatch.context() as patched, pytest.raises(Stop):
        patched.setattr(logs.RunLog, "say", lambda self, line: (
            stop() if line.startswith("step 20") else said(self, line)))
        pretrain(config, tmp_path / "halves")
    assert not (tmp_path / "halves" / "hf").exists()
    again = pretrain(config, tmp_path / "halves")
    for path, x in whole.trainable.items():
        assert jnp.array_equal(x, again.trainable[path]), path
    with (own / "text-en.txt").open("a") as file:  # its tokenizer would be another one
        file.write("a line that was not there\n")
    with pytest.raises(InputError, match=r"halves began with other training rows: .* 1 are new"):
        pretrain(config, tmp_path / "halves")


@pytest.mark.parametrize("name, other", [("pocket_encoder", True), ("pocket_decoder", False)])
def test_texts_that_a_run_does_not_learn_from_may_change(name, other, tmp_path):
    """Pairs of sentences are for code_switch alone."""
    config = from_config_dict(get_config(CONFIGS[name], "debug"))
    config = replace(config, data=CorpusConfig(str(tmp_path), translations=False, pivot="en"))
    for language in ("en", "xx"):
        (tmp_path / f"text-{language}.txt").write_text("one line\n")

    def seen(pairs):
        (tmp_path / "pairs-xx.tsv").write_text(pairs)
        return sorted(fingerprints(_every_text(*read_texts(config))))

    assert (seen("a\tb\n") != seen("a\tc\n")) == other


@pytest.mark.parametrize("fields,message", [
    ({"objective": ObjectiveConfig("causal_lm")}, "use causal_lm for a decoder"),
    ({"objective": ObjectiveConfig("code_swich")}, "did you mean 'code_switch'"),
    ({"data": CorpusConfig("/no/where")}, "has no text-LANGUAGE.txt"),
])
def test_what_cannot_be_pretrained_is_refused(fields, message, cache_dir, tmp_path):
    config = make_inputs(from_config_dict(get_config(CONFIGS["pocket_encoder"], "debug")))
    with pytest.raises(InputError, match=message):
        pretrain(replace(config, **fields), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_files_without_a_language_or_with_odd_lines_are_named(tmp_path):
    (tmp_path / "text-en.txt").write_text("a b\n")
    (tmp_path / "pairs-en.tsv").write_text("a\tb\na b c\n")
    with pytest.raises(InputError, match=r"no text in 'si'; it has en"):
        read_corpus(tmp_path, ("si",))
    with pytest.raises(InputError, match=r"pairs-en\.tsv:2: 1 tab-separated fields, expected 2"):
        read_corpus(tmp_path)
