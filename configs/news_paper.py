"""The layer-fusion paper's Sinhala news run (arXiv:2508.09091): English news, tested on Sinhala.

    python train.py --config configs/news_paper.py          # Transformer Softmax
    python train.py --config configs/news_paper.py:last     # LangBridge's last layer
    python eval.py --workdir runs/news_paper

Needs: what configs/xnli_paper.py needs.

Published: Sinhala accuracy 75.86 (Transformer Softmax), 71.66 (last layer). The authors' loader
reads the dataset's train_si for testing; this project reads test_si, so the figures are not of the
same rows.
"""

from configs.common import finish
from jaxfusion.config import default_config


def get_config(arg=None):
    config = default_config()
    config.data.task = "sinhala_news"
    return finish(config, arg)
