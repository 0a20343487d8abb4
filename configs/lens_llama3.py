"""Lens (arXiv:2410.04407) on Llama-3-8B-Instruct, English and Chinese, with its authors' settings.

    python train.py --config configs/lens_llama3.py --config.data.path=prompts.jsonl
    python train.py --config configs/lens_llama3.py --config.data.path=prompts.jsonl \
        --config.data.targets="('sw','bn')"
    python export.py --workdir runs/lens_llama3/Lens --out lensed

Needs: a GPU of 40 GB; access to meta-llama/Meta-Llama-3-8B-Instruct; parallel prompts, a column for
each language (200 of them train two blocks in a minute). Mask-aware, with one BOS and one chat
template in probing and training, where the authors' code is not.

Published: XCOPA, XStoryCloze, XWinograd and M-MMLU, which are not scored here yet; XNLI is.
"""

from jaxfusion.config import default_config, finish


def get_config(arg=None):
    config = default_config("lens")
    config.decoder.checkpoint = "meta-llama/Meta-Llama-3-8B-Instruct"
    config.decoder.dtype = "bfloat16"
    config.data.path = "prompts.jsonl"
    config.data.central, config.data.targets = "en", ("zh",)
    config.data.rows = 200
    config.data.task_rows = 500
    config.eval.tasks = ("xnli",)
    config.eval.max_new_tokens = 4
    config.lens.blocks = 2
    config.optimizer.b1 = 0.9
    # Norms are not decayed.
    config.optimizer.groups = {
        "blocks": {"patterns": ("decoder/blocks/.*/kernel",), "learning_rate": 1e-5,
                   "weight_decay": 0.1},
        "norms": {"patterns": ("decoder/blocks/.*/scale",), "learning_rate": 1e-5,
                  "weight_decay": 0.0},
    }
    config.train.batch_size = 8
    config.train.epochs = 1
    config.train.log_every = 5
    config.sweep = (
        {"name": "steering", "lens": {"method": "steering"}},
        {"name": "disentangle", "lens": {"method": "disentangle"}},
        {"name": "Lens"},
    )
    return finish(config, arg)
