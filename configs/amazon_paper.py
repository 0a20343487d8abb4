"""The layer-fusion paper's Amazon reviews run (arXiv:2508.09091): five ratings, six languages.

    python train.py --config configs/amazon_paper.py          # Transformer Softmax
    python train.py --config configs/amazon_paper.py:last     # LangBridge's last layer
    python eval.py --workdir runs/amazon_paper

Needs: what configs/xnli_paper.py needs.

Published: the paper's abstract claims a gain over LangBridge and gives no single figure; its
tables have accuracy by language.
"""

from configs.common import finish
from jaxfusion.config import default_config


def get_config(arg=None):
    config = default_config()
    config.data.task = "amazon_reviews"
    config.data.train_rows = 100_000
    config.data.balanced = True
    config.data.dev_rows = 500
    return finish(config, arg)
