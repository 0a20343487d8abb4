"""Made-up text: tokenizers and task rows for tests and for every config's `:debug`."""

import json
import random
import re
from pathlib import Path

from jaxfusion.data.tasks import SPLITS, Task

SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
SPECIALS = {"encoder": ["<pad>", "</s>", "<unk>"], "decoder": ["<unk>", "<s>", "</s>"]}


def word(rng: random.Random) -> str:
    """A pseudo-word of two or three syllables."""
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.choice((2, 3))))


def train_tokenizer(role: str):
    """A byte-level BPE tokenizer of about 512 tokens, with T5's or Llama's special tokens."""
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(0)
    corpus = [" ".join(word(rng) for _ in range(12)) for _ in range(200)]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        corpus, vocab_size=512, special_tokens=SPECIALS[role], show_progress=False
    )
    backend = tokenizer._tokenizer
    if role == "decoder":
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        )
    backend.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def write_rows(out: Path, task: Task, *, rows: dict[str, int], seed: int = 0) -> None:
    """Writes `{split}-{language}.jsonl` for a task's first two languages.

    The answer can be learned: each class has a word of its own, which begins the first column of
    the prompt (free text answers with that word). Languages share no such word.
    """
    rng = random.Random(seed)
    columns = re.findall(r"{(\w+)}", task.prompt)
    for language in task.languages[:2]:
        cues = [word(rng) for _ in range(max(len(task.labels), 8))]
        for split in SPLITS:
            lines = [
                json.dumps(_row(rng, task, columns, cues, i), ensure_ascii=False)
                for i in range(rows[split])
            ]
            file = out / f"{split}-{language}.jsonl"
            file.write_text("\n".join(lines) + "\n", "utf-8")


def _row(rng, task: Task, columns: list[str], cues: list[str], i: int) -> dict:
    choice = i % (len(task.labels) or len(cues))
    texts = {c: " ".join(word(rng) for _ in range(rng.randint(2, 10))) for c in columns}
    texts[columns[0]] = f"{cues[choice]} {texts[columns[0]]}"
    return {**texts, task.target_column: choice if task.labels else cues[choice]}
