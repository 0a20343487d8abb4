"""Lens (arXiv:2410.04407) on Qwen2.5-7B-Instruct, with its authors' settings.

    python train.py --config configs/lens_qwen25.py --config.data.path=prompts.jsonl
    python train.py --config configs/lens_qwen25.py:multilingual --config.data.path=prompts.jsonl
    python train.py --config configs/lens_qwen25.py:paper_code --config.data.path=prompts.jsonl
    python export.py --workdir runs/lens_qwen25/Lens --out lensed

The first moves Chinese, the second Chinese, Japanese, Korean, Arabic, Bengali and Swahili; the
third makes prompts and probe as the authors' code does, not mask-aware and with two BOS (see
docs/lens.md).

Needs: a GPU of 40 GB;
parallel prompts, a column for each language (`en`, `zh`, …; 200 of them train two blocks in a
minute). Scored on XCOPA, XStoryCloze, XWinograd and 2,000 rows of MMLU, from the hub or
`--config.data.task_path`.
"""

from jaxfusion.config import default_config, finish


def get_config(arg=None):
    config = default_config("lens")
    config.decoder.checkpoint = "Qwen/Qwen2.5-7B-Instruct"
    config.decoder.dtype = "bfloat16"
    config.data.path = "prompts.jsonl"
    config.data.central, config.data.targets = "en", ("zh",)
    config.data.task_rows = 2000
    config.eval.tasks = ("xcopa", "xstorycloze", "xwinograd", "mmmlu")
    config.lens.blocks = 2
    config.train.batch_size = 8
    config.sweep = (
        {"name": "steering", "lens": {"method": "steering"}},
        {"name": "disentangle", "lens": {"method": "disentangle"}},
        {"name": "Lens"},
    )
    return finish(config, arg)
