"""The layer-fusion paper's XNLI run (arXiv:2508.09091): mT5-large, Llama-3.2-1B-Instruct.

    python train.py --config configs/xnli_paper.py                 # Transformer Softmax
    python train.py --config configs/xnli_paper.py:global_softmax
    python train.py --config configs/xnli_paper.py:last            # LangBridge's last layer
    python eval.py --workdir runs/xnli_paper --tasks xnli,indicxnli

Needs: an accelerator with 24 GB; google/mt5-large, which the hub may hold as a pickle only
(`python -m jaxfusion.hf.convert google/mt5-large checkpoints/mt5-large`, then
`--config.encoder.checkpoint=checkpoints/mt5-large`); access to meta-llama/Llama-3.2-1B-Instruct.

Published: average over XNLI's 15 languages 71.50 (Transformer Softmax), 70.36 (last layer). The
authors' frozen encoder ran with its dropout on: `--config.encoder.dropout=0.1` does the same.
"""

from configs.common import finish
from jaxfusion.config import default_config


def get_config(arg=None):
    config = default_config()
    config.data.task = "xnli"
    config.data.train_rows = 100_000
    config.data.balanced = True
    config.data.dev_rows = 500
    return finish(config, arg)
