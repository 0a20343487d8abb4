"""Checks an exported bridge in PyTorch: `python benchmarks/check_export.py OUT REFERENCE`.

Needs only torch and transformers. REFERENCE (.json) has texts, jaxfusion's logits after each
prefix, and its greedy tokens. Prints as JSON the largest difference of the logits, relative to the
largest, for padding on either side, and whether the tokens are the same.
"""

import json
import sys

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

NEAR_TIE = 1e-4


@torch.no_grad()
def main(out: str, reference: str) -> None:
    with open(reference, encoding="utf-8") as file:
        wanted = json.load(file)
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    tokenizer.src_lang = wanted["language"]
    logits, difference = torch.tensor(wanted["logits"]), 0.0
    for side in ("right", "left"):
        inputs = tokenizer(wanted["texts"], padding=True, padding_side=side, return_tensors="pt")
        found = model(**inputs).logits[:, -1]
        assert found.isfinite().all()
        difference = max(difference, float((found - logits).abs().max() / logits.abs().max()))
        tokens = model.generate(**inputs, max_new_tokens=len(wanted["tokens"][0]),
                                eos_token_id=None)[:, inputs["input_ids"].shape[1]:]
        # Compared up to the first step whose two best logits are nearly the same.
        same = all(
            torch.equal(row[:upto], torch.tensor(theirs)[:upto])
            for row, theirs, upto in zip(tokens, wanted["tokens"], wanted["upto"], strict=True)
        )
        if not same:
            break
    print(json.dumps({"transformers": transformers.__version__, "difference": difference,
                      "tokens": same, "compared": min(wanted["upto"])}))


if __name__ == "__main__":
    main(*sys.argv[1:])
