"""Exports in the hands of their clients: what a user writes by habit works or is refused in a line.

The same under transformers 4 and 5, in environments that hold nothing of this project:
`benchmarks/exports.py`.
"""

import json
from pathlib import Path

import check_clients as clients
import numpy as np
import pytest
import torch
from exports import client_reference
from helpers import make_run, next_logits, write_family
from transformers import AutoModelForCausalLM

from jaxfusion.runs.export.bridge import export

SLOW = (clients.lm_eval_generation, clients.lm_eval_likelihood, clients.trainer, clients.peft_lora)
REFUSED = {
    "tokenizer_without_trust": "contains custom code which must be executed",
    "foreign_ids": "row 0 of input_ids has no query: make it with AutoTokenizer",
    "lm_eval_likelihood": "use `python -m jaxfusion.runs.lm_harness`",
    "unknown_arguments": "a bridge's forward takes no inputs_embeds",
}


@pytest.fixture(scope="module")
def reference(tiny, tmp_path_factory):
    """The exports of one bridge, and what this project computes with it."""
    file = client_reference(tiny, tmp_path_factory.mktemp("clients"))
    return json.loads(file.read_text())


@pytest.mark.parametrize("client", [
    pytest.param(x, id=x.__name__, marks=[pytest.mark.slow] if x in SLOW else [])
    for x in clients.CLIENTS])
def test_a_habit_works_or_is_refused_in_a_line(client, reference):
    if client in (clients.trainer, clients.peft_lora):
        pytest.importorskip("accelerate")
        pytest.importorskip("peft")
    found = clients.outcome(client, reference)
    if client.__name__ in REFUSED:
        assert found.startswith("refused: ") and REFUSED[client.__name__] in found
    else:
        assert found == "works"


def test_no_tokenizer_lies_where_another_would_find_it(reference):
    """At the top, `tokenizer.json` would be read by whoever trusts no code."""
    for name in ("out", "merged"):
        files = {file.name for file in Path(reference[name]).iterdir()}
        assert not files & {"tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json"}


def test_a_query_may_be_cut_and_keeps_its_end(reference):
    tokenizer = clients.load_tokenizer(reference["out"])
    whole = tokenizer(reference["texts"]).input_ids
    cut = tokenizer(reference["texts"], truncation=True, max_length=4).input_ids
    assert [row[:3] + row[-1:] for row in whole] == cut
    padded = tokenizer(reference["texts"], padding="max_length", max_length=64,
                       text_target=["a", "b", "c"])
    assert {len(row) for name in padded for row in padded[name]} == {64}


def test_ids_out_of_order_are_refused(reference):
    """A row is a query and then its answer."""
    case = clients.Case(reference)
    query = case.tokenizer("e f", return_tensors="pt").input_ids
    with pytest.raises(ValueError, match="not a query, its prompt and an answer in this order"):
        case.model(torch.cat([torch.tensor([[5]]), query], dim=1))
    with pytest.raises(ValueError, match="does not end in the encoder's end token"):
        case.model(query[:, :-1])


def test_losses_are_those_of_training(reference):
    """The loss of `labels` is the mean negative log-likelihood of the answers, EOS included."""
    case = clients.Case(reference)
    rows = case.tokenizer(case.texts, text_target=reference["answers"], padding=True,
                          return_tensors="pt")
    found = case.model(**rows)
    told = found.logits[:, :-1].log_softmax(-1)
    labels = rows.labels[:, 1:]
    chosen = labels >= 0
    wanted = -told[chosen].gather(1, labels[chosen][:, None]).mean()
    assert torch.allclose(found.loss, wanted)
    half = case.model(**rows, num_items_in_batch=2 * int(chosen.sum())).loss
    assert torch.allclose(2 * half, found.loss)


def test_what_trains_in_a_backbone_stays_what_trains(tiny, tmp_path):
    """What jaxfusion trained in a backbone trains on, all else is frozen."""
    make_run(tmp_path / "run", tiny, trained=("decoder/.*/mlp/up/.*",))
    export(tmp_path / "run", tmp_path / "out")
    model = clients.load(tmp_path / "out")
    model.save_pretrained(tmp_path / "again")
    for out in (model, clients.load(tmp_path / "again")):
        unfrozen = {name for name, x in out.named_parameters() if x.requires_grad}
        assert {name.split(".")[0] for name in unfrozen} == {"decoder", "projector"}
        assert all("mlp.up_proj" in name for name in unfrozen if name.startswith("decoder"))


def test_a_cap_of_the_scores_is_not_lost(tiny, tmp_path):
    """`sdpa` would leave out Gemma 2's cap."""
    write_family("gemma2", tiny, tmp_path / "llm")
    make_run(tmp_path / "run", tiny, decoder=tmp_path / "llm")
    export(tmp_path / "run", tmp_path / "out")
    with pytest.raises(ValueError, match="ignores the cap"):
        clients.load(tmp_path / "out", attn_implementation="sdpa")
    assert clients.load(tmp_path / "out").decoder.config._attn_implementation == "eager"


def test_the_ends_that_the_llm_names_end_an_answer(tiny, tmp_path):
    """`generation_config.json` goes along with all its end tokens."""
    make_run(tmp_path / "first", tiny)
    export(tmp_path / "first", tmp_path / "out", merge=True)
    model, tokenizer = clients.load(tmp_path / "out"), clients.load_tokenizer(tmp_path / "out")
    inputs = tokenizer("e f", return_tensors="pt")
    token = model.generate(**inputs, max_new_tokens=1)[0, -1].item()
    llm = tmp_path / "out" / "decoder"
    (llm / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, token]}))
    make_run(tmp_path / "run", tiny, decoder=llm)
    export(tmp_path / "run", tmp_path / "ends")
    model = clients.load(tmp_path / "ends")
    assert model.generation_config.eos_token_id == [2, token]
    assert model.generation_config.max_new_tokens == 16
    assert model.generate(**inputs).shape[1] == inputs.input_ids.shape[1] + 1


def test_a_config_alone_makes_no_model(reference):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(reference["out"], trust_remote_code=True)
    with pytest.raises(ValueError, match="use from_pretrained"):
        AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    with pytest.raises(ValueError, match="output_loading_info; remove it"):
        clients.load(reference["out"], output_loading_info=True)


def test_an_export_saved_by_transformers_is_taken_in_again(reference, tmp_path):
    """A Trainer's checkpoint is a directory like any export."""
    from jaxfusion.runs.adopt import adopt
    from jaxfusion.runs.open_run import open_run

    for name in ("out", "merged"):
        model = clients.load(reference[name])
        model.save_pretrained(tmp_path / name)
        adopt(str(tmp_path / name), tmp_path / f"{name}-run")
        ours = next_logits(open_run(tmp_path / f"{name}-run").model, reference["queries"])
        wanted = np.array(reference["logits"])
        assert np.abs(ours - wanted).max() < 1e-5 * np.abs(wanted).max()
