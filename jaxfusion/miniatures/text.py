"""Made-up text: tokenizers and task rows for tests and `:debug` configs."""

import json
import random
import re
from pathlib import Path

from jaxfusion.data.tasks.spec import SPLITS, Task
from jaxfusion.data.tokenizers import train_tokenizer

SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]


def word(rng: random.Random) -> str:
    """A pseudo-word of two or three syllables."""
    return "".join(rng.choice(SYLLABLES) for _ in range(rng.choice((2, 3))))


def made_up_tokenizer(role: str):
    """A tokenizer of about 512 tokens, trained on made-up text."""
    rng = random.Random(0)
    return train_tokenizer(role, [" ".join(word(rng) for _ in range(12)) for _ in range(200)], 512)


def write_rows(out: Path, task: Task, *, rows: dict[str, int], seed: int = 0) -> None:
    """Writes `{split}-{language}.jsonl` for a task's first two languages, or all of translations.

    The answer can be learned: each class has its own word at the beginning of the prompt's first
    column (free text answers with that word). Languages use different words.
    """
    rng = random.Random(seed)
    columns = re.findall(r"{(\w+)}", task.prompt)
    for language in task.languages if task.translation else task.languages[:2]:
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
    return {**texts, task.target_column: (task.labels or cues)[choice]}
