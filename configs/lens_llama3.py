"""Lens (arXiv:2410.04407) on Llama-3-8B-Instruct, with its authors' settings.

    python train.py --config configs/lens_llama3.py
    python train.py --config configs/lens_llama3.py:multilingual
    python train.py --config configs/lens_llama3.py:paper_code
    python export.py --workdir runs/lens_llama3/Lens --out lensed

The first moves Chinese, the second Chinese, Japanese, Korean, Arabic, Bengali and Swahili; the
third makes prompts and probe as the authors' code does, not mask-aware and with two BOS (see
docs/lens.md).

Needs: a GPU of 24 GB; access to meta-llama/Meta-Llama-3-8B-Instruct;
parallel prompts in two files, `probe_prompts.jsonl` (300 are probed) and `prompts.jsonl` (200
train), a column for each language (`en`, `zh`, …). Scored on XCOPA, XStoryCloze, XWinograd and
1,000 rows of M-MMLU, from the hub or `--config.data.task_path`.
"""

from jaxfusion.config import finish, published_lens


def get_config(arg=None):
    return finish(published_lens("meta-llama/Meta-Llama-3-8B-Instruct"), arg)
