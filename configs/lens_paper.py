"""Lens (arXiv:2410.04407) with its authors' settings for Llama-3-8B-Instruct.

    python train.py --config configs/lens_paper.py
    python train.py --config configs/lens_paper.py:multilingual
    python train.py --config configs/lens_paper.py:llama31,multilingual     # or qwen25, phi35
    python train.py --config configs/lens_paper.py:paper_code
    python export.py --workdir runs/lens_paper/Lens --out lensed

The first moves Chinese; `multilingual` moves Chinese, Japanese, Korean, Arabic, Bengali and
Swahili. `paper_code` makes prompts and probe as the authors' code does: not mask-aware, with two
BOS (see docs/lens.md).

Needs: a GPU of 24 GB (16 GB for phi35); access to meta-llama/Meta-Llama-3-8B-Instruct (or
meta-llama/Llama-3.1-8B-Instruct); parallel prompts in two files, `probe_prompts.jsonl` (300 are
probed) and `prompts.jsonl` (200 train), a column for each language (`en`, `zh`, …). Scored on
XCOPA, XStoryCloze, XWinograd and 1,000 rows of M-MMLU, from the hub or `--config.data.task_path`.
"""

from configs.common import finish
from jaxfusion.config import default_config

LLMS = {
    "llama3": "meta-llama/Meta-Llama-3-8B-Instruct", "llama31": "meta-llama/Llama-3.1-8B-Instruct",
    "qwen25": "Qwen/Qwen2.5-7B-Instruct", "phi35": "microsoft/Phi-3.5-mini-instruct",
}


def get_config(arg=None):
    config = default_config("lens")
    config.decoder.checkpoint, config.decoder.dtype = LLMS["llama3"], "bfloat16"
    # Its authors probe 300 prompts of one set and train on 200 of another.
    config.data.path, config.data.probe_path = "prompts.jsonl", "probe_prompts.jsonl"
    config.data.probe_rows, config.data.rows = 300, 200
    config.data.central, config.data.targets = "en", ("zh",)
    config.data.task_rows = 2000
    config.eval.tasks = ("xcopa", "xstorycloze", "xwinograd", "m_mmlu")
    config.sweep = (  # beside the baselines that train nothing
        {"name": "steering", "lens": {"method": "steering"}},
        {"name": "disentangle", "lens": {"method": "disentangle"}},
        {"name": "Lens"},
    )
    llms = {word: lambda config, word=word: set_llm(config, word) for word in LLMS}
    return finish(config, arg, {**llms, "multilingual": multilingual, "paper_code": paper_code})


def set_llm(config, word):
    config.decoder.checkpoint = LLMS[word]


def multilingual(config):
    config.data.targets = ("zh", "ja", "ko", "ar", "bn", "sw")


def paper_code(config):
    config.lens.recipe = "paper_code"
