"""Runs typical client code on an exported bridge, in the installed PyTorch.

    python benchmarks/check_clients.py REFERENCE

Needs torch, transformers, accelerate, peft and lm-eval. REFERENCE (.json) has `out` and `merged`
(exports of one bridge, with its backbones by name and inside), `texts`, `answers` and jaxfusion's
`logits` and greedy `tokens` after them, `queries` and `targets` (its own ids). Prints the outcome
of each client as JSON: "works", or "refused" with the one-line reason.
"""

import contextlib
import io
import json
import logging
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

NEW = 8  # tokens


class Case:
    """One export, loaded for each client."""

    def __init__(self, reference: dict, merged: bool = False, **kwargs):
        self.reference, self.path = reference, reference["merged" if merged else "out"]
        self.texts = reference["texts"]
        self.tokens = torch.tensor(reference["tokens"])[:, :NEW]
        self.tokenizer = load_tokenizer(self.path)
        self.model = load(self.path, **kwargs)
        self.inputs = self.tokenizer(self.texts, padding=True, return_tensors="pt")

    def answers(self) -> list[str]:
        """jaxfusion's answers as text."""
        return [self.tokenizer.answers.decode(row, skip_special_tokens=True)
                for row in self.tokens.tolist()]

    def answered(self, model=None, tolerance=None) -> None:
        """Raises unless a model answers as jaxfusion does."""
        model = model or self.model
        found = model.generate(**self.inputs, max_new_tokens=NEW, eos_token_id=None)
        new = found[:, self.inputs.input_ids.shape[1]:]
        assert torch.equal(new.cpu(), self.tokens), (new, self.tokens)


def load(path, **kwargs):
    """The model of an export."""
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, **kwargs)


def load_tokenizer(path):
    """The tokenizer of an export."""
    return AutoTokenizer.from_pretrained(path, trust_remote_code=True)


class Refused(Exception):
    """The error message that a client got."""


def refused(call, *errors) -> None:
    """Raises `Refused` with the one-line error of `call`; anything else is a bug."""
    try:
        call()
    except errors as error:
        line = str(error).strip()
        assert line and "\n" not in line, f"expected one line, got {line!r}"
        raise Refused(line) from None
    raise AssertionError("expected a refusal, got none")


def difference(found, wanted) -> float:
    """The largest difference, relative to the largest."""
    wanted = torch.as_tensor(wanted)
    return float((found.detach().float() - wanted).abs().max() / wanted.abs().max())


def tokenizer_ids(case):
    """`tokenizer(texts)` and `tokenizer(texts, text_target=…)` give the ids of training."""
    offset = case.model.config.query_offset
    rows = case.tokenizer(case.texts).input_ids
    assert [[i - offset for i in row] for row in rows] == case.reference["queries"]
    both = case.tokenizer(case.texts, text_target=case.reference["answers"])
    assert [[i for i in row if i != -100] for row in both.labels] == case.reference["targets"]
    assert case.tokenizer.decode(rows[0], skip_special_tokens=True) == ""
    assert case.tokenizer.decode(rows[0]) == case.tokenizer.queries.decode(
        case.reference["queries"][0])
    answer = case.reference["answers"][0]
    assert case.tokenizer(answer, add_special_tokens=False).input_ids == case.tokenizer.answers(
        answer, add_special_tokens=False).input_ids


def tokenizer_saved(case):
    """`tokenizer.save_pretrained` and back."""
    with tempfile.TemporaryDirectory() as out:
        case.tokenizer.save_pretrained(out)
        again = load_tokenizer(out)
        assert again(case.texts).input_ids == case.tokenizer(case.texts).input_ids
        assert again.pad_token_id == case.tokenizer.pad_token_id is not None
        assert again.answers.pad_token_id is not None


def tokenizer_without_trust(case):
    """`AutoTokenizer.from_pretrained(DIR)` without `trust_remote_code`."""
    def call():
        try:
            AutoTokenizer.from_pretrained(case.path, trust_remote_code=False)
        except ValueError as error:  # which adds a second line
            raise ValueError(str(error).splitlines()[0]) from None
    refused(call, ValueError)


def foreign_ids(case):
    """Ids of the LLM's own tokenizer or of the encoder's."""
    for part in ("decoder_tokenizer", "encoder_tokenizer"):
        ids = AutoTokenizer.from_pretrained(case.path, subfolder=part)(
            case.texts[0], return_tensors="pt").input_ids
        with contextlib.suppress(Refused):
            refused(lambda ids=ids: case.model.generate(ids), ValueError)
        refused(lambda ids=ids: case.model(ids), ValueError)


def logits(case):
    """`model(**inputs).logits` with padding on either side."""
    for side in ("left", "right"):
        inputs = case.tokenizer(case.texts, padding=True, return_tensors="pt", padding_side=side)
        assert difference(case.model(**inputs).logits[:, -1], case.reference["logits"]) < 1e-5
    no_mask = case.model(inputs.input_ids).logits[:, -1]  # which the padding's own id replaces
    assert difference(no_mask, case.reference["logits"]) < 1e-5


def generate_and_decode(case):
    """`tokenizer.batch_decode(model.generate(**inputs), skip_special_tokens=True)`."""
    case.answered()
    found = case.model.generate(**case.inputs, max_new_tokens=NEW, eos_token_id=None)
    assert case.tokenizer.batch_decode(found, skip_special_tokens=True) == case.answers()
    new = found[:, case.inputs.input_ids.shape[1]:]
    assert case.tokenizer.batch_decode(new, skip_special_tokens=True) == case.answers()


def generate_in_silence(case):
    """`model.generate` says nothing, and warns of nothing."""
    heard = io.StringIO()
    handler = logging.StreamHandler(heard)
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            case.model.generate(**case.inputs)
            case.model.generate(**case.inputs, max_new_tokens=NEW)
    finally:
        logger.removeHandler(handler)
    assert not heard.getvalue(), heard.getvalue()


def generation_config(case):
    """`model.generation_config`, `generation_config=`, `max_length` and a list of end tokens."""
    asked = case.inputs.input_ids.shape[1]
    first, second = case.tokens[0, 0].item(), case.tokens[1, 0].item()
    case.model.generation_config.max_new_tokens = 3
    assert case.model.generate(**case.inputs).shape[1] <= asked + 3
    none = {"eos_token_id": None}
    assert case.model.generate(**case.inputs, max_new_tokens=2, **none).shape[1] == asked + 2
    assert case.model.generate(**case.inputs, max_length=asked + 5, **none).shape[1] == asked + 5
    own = GenerationConfig(max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert case.model.generate(**case.inputs, generation_config=own).shape[1] == asked + 4
    one = {name: x[:1] for name, x in case.inputs.items()}
    stopped = case.model.generate(**one, max_new_tokens=NEW, eos_token_id=[second, first])
    assert stopped.shape[1] == asked + 1


def beams_and_scores(case):
    """Beams, several answers, and `compute_transition_scores`."""
    found = case.model.generate(
        **case.inputs, max_new_tokens=NEW, num_beams=3, num_return_sequences=2,
        return_dict_in_generate=True, output_scores=True)
    assert len(found.sequences) == 2 * len(case.texts)
    found = case.model.generate(**case.inputs, max_new_tokens=NEW, eos_token_id=None,
                                return_dict_in_generate=True, output_scores=True)
    scores = case.model.compute_transition_scores(found.sequences, found.scores,
                                                  normalize_logits=True)
    ids = found.sequences
    mask = torch.cat([case.inputs.attention_mask,
                      torch.ones(len(ids), NEW, dtype=torch.long)], dim=1)
    told = case.model(ids, mask).logits.log_softmax(-1)[:, -NEW - 1:-1]
    wanted = told.gather(2, ids[:, -NEW:, None])[..., 0]
    assert difference(scores, wanted.detach()) < 1e-4


def stopping(case):
    """Stopping criteria, stop strings, a streamer and a processor see the prompt and the answer."""
    from transformers import StoppingCriteriaList, TextStreamer

    asked, seen = case.inputs.input_ids.shape[1], []

    def stop(input_ids, scores, **kwargs):
        seen.append(input_ids.shape[1])
        return torch.full((len(input_ids),), input_ids.shape[1] >= asked + 3)

    found = case.model.generate(**case.inputs, max_new_tokens=NEW, eos_token_id=None,
                                stopping_criteria=StoppingCriteriaList([stop]))
    assert found.shape[1] == asked + 3 and seen == [asked + 1, asked + 2, asked + 3]
    one = case.tokenizer(case.texts[0], return_tensors="pt")
    word = case.answers()[0][:2]
    found = case.model.generate(**one, max_new_tokens=NEW, stop_strings=[word],
                                tokenizer=case.tokenizer)
    assert found.shape[1] < one.input_ids.shape[1] + NEW
    heard = io.StringIO()
    with contextlib.redirect_stdout(heard):
        case.model.generate(**one, max_new_tokens=NEW, eos_token_id=None,
                            streamer=TextStreamer(case.tokenizer, skip_prompt=True))
    assert heard.getvalue().strip() == case.answers()[0].strip()


def pipeline_by_name(case):
    """`pipeline("text-generation", model=DIR, trust_remote_code=True)`."""
    asked = pipeline("text-generation", model=case.path, trust_remote_code=True)
    _piped(case, asked)


def pipeline_of_objects(case):
    """`pipeline("text-generation", model=model, tokenizer=tokenizer)`, in batches and as a chat."""
    asked = pipeline("text-generation", model=case.model, tokenizer=case.tokenizer)
    _piped(case, asked, batch_size=2)
    chat = [{"role": "user", "content": case.texts[0]}]
    found = asked(chat, max_new_tokens=NEW, eos_token_id=None)[0]["generated_text"][-1]["content"]
    assert found == case.answers()[0]


def _piped(case, asked, **kwargs):
    found = asked(case.texts, max_new_tokens=NEW, eos_token_id=None, **kwargs)
    assert [x[0]["generated_text"] for x in found] == [
        text + answer for text, answer in zip(case.texts, case.answers(), strict=True)]
    found = asked(case.texts, max_new_tokens=NEW, eos_token_id=None, return_full_text=False,
                  **kwargs)
    assert [x[0]["generated_text"] for x in found] == case.answers()


def lm_eval_generation(case):
    """lm-eval's `--model hf`: tasks of generation."""
    from lm_eval.api.instance import Instance

    requests = [Instance("generate_until", {}, (text, {"until": ["\n\n"], "max_gen_toks": NEW}), i)
                for i, text in enumerate(case.texts)]
    with torch.no_grad():
        found = _harness(case).generate_until(requests, disable_tqdm=True)
    ends = case.model.generation_config.eos_token_id
    wanted = []
    for row in case.tokens.tolist():
        upto = next((i for i, x in enumerate(row) if x in ends), len(row))
        wanted.append(case.tokenizer.answers.decode(row[:upto], skip_special_tokens=True))
    assert found == [text.split("\n\n")[0] for text in wanted], (found, wanted)


def lm_eval_likelihood(case):
    """lm-eval's `--model hf`: tasks of likelihood."""
    from lm_eval.api.instance import Instance

    harness = _harness(case)
    requests = [Instance("loglikelihood", {}, (text, " yes"), i)
                for i, text in enumerate(case.texts)]
    refused(lambda: harness.loglikelihood(requests, disable_tqdm=True), ValueError)


def _harness(case):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=case.path, trust_remote_code=True, device="cpu", batch_size=2,
                dtype="auto")


def saved_and_loaded(case):
    """`model.save_pretrained` and back, after the bridge and a part of the LLM have changed."""
    for merged in (False, True):
        this = Case(case.reference, merged)
        with torch.no_grad():
            this.model.projector.end += 0.1
            this.model.decoder.get_decoder().layers[0].mlp.up_proj.weight += 0.01
        wanted = this.model(**this.inputs).logits
        with tempfile.TemporaryDirectory() as out:
            this.model.save_pretrained(out)
            again = load(out)
            assert torch.equal(again(**load_tokenizer(out)(
                this.texts, padding=True, return_tensors="pt")).logits, wanted)
            again.save_pretrained(f"{out}/twice")
            assert torch.equal(load(f"{out}/twice")(**this.inputs).logits, wanted)


def trainer(case):
    """`Trainer`: a step, a checkpoint, on from it, and the checkpoint as a directory."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    rows = case.tokenizer(case.texts, text_target=case.reference["answers"])
    rows = [{name: rows[name][i] for name in rows} for i in range(len(case.texts))] * 2
    before = {name: x.clone() for name, x in case.model.named_parameters()}
    with tempfile.TemporaryDirectory() as out:
        def train(steps, model, **kwargs):
            settings = TrainingArguments(
                out, max_steps=steps, save_steps=2, per_device_train_batch_size=2, use_cpu=True,
                learning_rate=1e-2, report_to=[], disable_tqdm=True, lr_scheduler_type="constant",
                gradient_accumulation_steps=2, gradient_checkpointing=True)
            made = Trainer(model=model, args=settings, train_dataset=rows,
                           processing_class=case.tokenizer,
                           data_collator=DataCollatorForSeq2Seq(case.tokenizer))
            made.train(**kwargs)
            return made

        train(2, case.model)
        changed = {name for name, x in case.model.named_parameters()
                   if not torch.equal(x, before[name])}
        assert changed and all(x.startswith(("fusion.", "projector.")) for x in changed)
        case.model.eval()
        wanted = case.model(**case.inputs).logits
        assert torch.equal(load(f"{out}/checkpoint-2")(**case.inputs).logits, wanted)
        resumed = load(case.path)
        train(4, resumed, resume_from_checkpoint=f"{out}/checkpoint-2")
        straight = load(case.path)
        train(4, straight)
        assert difference(resumed.eval()(**case.inputs).logits,
                          straight.eval()(**case.inputs).logits.detach()) < 1e-4


def peft_lora(case):
    """peft's LoRA with task type CAUSAL_LM: a step, saved, loaded, merged."""
    from peft import LoraConfig, PeftModel, get_peft_model

    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    model = get_peft_model(case.model, lora)
    rows = case.tokenizer(case.texts, text_target=case.reference["answers"], padding=True,
                          return_tensors="pt")
    optimizer = torch.optim.SGD([x for x in model.parameters() if x.requires_grad], 1.0)
    for _ in range(2):
        loss = model(**rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model(**rows).loss < loss
    wanted = model(**case.inputs).logits
    answers = model.generate(**case.inputs, max_new_tokens=NEW)
    with tempfile.TemporaryDirectory() as out:
        model.save_pretrained(f"{out}/lora")
        again = PeftModel.from_pretrained(load(case.path), f"{out}/lora")
        assert torch.equal(again(**case.inputs).logits, wanted)
        assert torch.equal(again.generate(**case.inputs, max_new_tokens=NEW), answers)
        again.merge_and_unload().save_pretrained(f"{out}/whole")
        assert difference(load(f"{out}/whole")(**case.inputs).logits, wanted.detach()) < 1e-5


def bfloat16(case):
    """`model.to(torch.bfloat16)` after loading, and `dtype=torch.bfloat16`."""
    cast = case.model.to(torch.bfloat16)
    assert cast.decoder.dtype == torch.bfloat16 and cast.projector.end.dtype == torch.float32
    read = load(case.path, dtype=torch.bfloat16)
    with torch.no_grad():
        found = cast(**case.inputs).logits
        assert difference(found[:, -1], case.reference["logits"]) < 0.1
        assert torch.equal(found, read(**case.inputs).logits)
    assert cast.generate(**case.inputs).shape[0] == len(case.texts)
    with tempfile.TemporaryDirectory() as out:
        cast.save_pretrained(out)
        again = load(out)
        assert not any(x.requires_grad for x in again.decoder.parameters())
        with torch.no_grad():
            assert torch.equal(again(**case.inputs).logits, found)


def attention(case):
    """`attn_implementation='sdpa'` and `'eager'`."""
    for name in ("sdpa", "eager"):
        model = load(case.path, attn_implementation=name)
        assert model.decoder.config._attn_implementation == name
        assert difference(model(**case.inputs).logits[:, -1], case.reference["logits"]) < 1e-5


def gradient_checkpointing(case):
    """`model.gradient_checkpointing_enable()`: the same gradient."""
    rows = case.tokenizer(case.texts, text_target=case.reference["answers"], padding=True,
                          return_tensors="pt")
    found = []
    for enable in (False, True):
        if enable:
            case.model.gradient_checkpointing_enable()
        case.model.train()
        case.model.zero_grad()
        case.model(**rows).loss.backward()
        found.append(case.model.projector.end.grad.clone())
    assert found[0].abs().max() > 0 and difference(found[1], found[0]) < 1e-5


def embeddings(case):
    """`get_input_embeddings`, `output_hidden_states`, `return_dict=False`."""
    table = case.model.get_input_embeddings()
    assert table.weight.shape == (case.model.config.vocab_size, case.model.config.writer["width"])
    found = case.model(**case.inputs, output_hidden_states=True)
    assert found.hidden_states[-1].shape[:2] == case.inputs.input_ids.shape
    head = case.model.get_output_embeddings()
    assert difference(head(found.hidden_states[-1][:, -1]), found.logits[:, -1].detach()) < 1e-5
    assert torch.equal(case.model(**case.inputs, return_dict=False)[0], found.logits)
    before = case.model.get_output_embeddings().weight.clone()
    case.model.tie_weights()
    assert torch.equal(case.model.get_output_embeddings().weight, before)


def unknown_arguments(case):
    """Arguments that a bridge has not: `inputs_embeds`, `use_cache`, and misspelt ones."""
    inputs = dict(case.inputs)
    calls = [
        (lambda: case.model(**inputs, max_tokens=3), TypeError),
        (lambda: case.model.generate(**inputs, max_tokens=3), (TypeError, ValueError)),
        (lambda: case.model(**inputs, use_cache=True), ValueError),
        (lambda: case.tokenizer("a", "b"), ValueError),
        (lambda: case.tokenizer("a", text_target="b", add_special_tokens=False), ValueError),
        (lambda: case.model.resize_token_embeddings(10), ValueError),
        (lambda: case.model(**inputs, labels=inputs["input_ids"]), ValueError),
    ]
    for call, errors in calls:
        with contextlib.suppress(Refused):
            refused(call, *(errors if isinstance(errors, tuple) else (errors,)))
    refused(lambda: case.model(inputs_embeds=torch.zeros(1, 2, 64)), ValueError)


CLIENTS = (
    tokenizer_ids, tokenizer_saved, tokenizer_without_trust, foreign_ids, logits,
    generate_and_decode, generate_in_silence, generation_config, beams_and_scores, stopping,
    pipeline_by_name, pipeline_of_objects, lm_eval_generation, lm_eval_likelihood,
    saved_and_loaded, trainer, peft_lora, bfloat16, attention, gradient_checkpointing, embeddings,
    unknown_arguments,
)


def outcome(client, reference: dict) -> str:
    """The outcome of a client: "works" or "refused: …".

    Raises:
      Exception: any other error.
    """
    torch.manual_seed(0)
    try:
        client(Case(reference))
    except Refused as told:
        return f"refused: {told}"
    return "works"


def main(file: str) -> None:
    reference = json.loads(Path(file).read_text("utf-8"))
    found = {}
    for client in CLIENTS:
        try:
            found[client.__name__] = outcome(client, reference)
        except Exception as error:
            logging.getLogger(__name__).exception(client.__name__)
            found[client.__name__] = f"FAILS: {type(error).__name__}: {error}"[:200]
    print(json.dumps({"transformers": transformers.__version__, "clients": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
