"""The pocket encoder: an mT5 encoder of 1.5 million parameters that reads eleven languages.

    python train.py --config configs/pocket_encoder.py

Writes runs/pocket_encoder/hf, kept in the repository as pocket/encoder (see pocket/README.md).

Needs: two CPU cores. Learns from unlabelled text of the pocket world
(jaxfusion/data/pocket/world.py) and from sentence pairs with English, out of which it takes its
translations; no frame of a development or test row is among it.
"""

from configs.common import finish
from jaxfusion.config import default_config


def get_config(arg=None):
    config = default_config("pretrain")
    config.data.buckets = (16, 24, 32, 40, 48)
    config.data.sampling = 0.3
    config.objective.masked = 0.1
    config.objective.switched_texts = 0.9
    config.objective.switched_words = 0.55
    config.optimizer.groups = {
        "tower": {"patterns": ("encoder/.*",), "learning_rate": 2e-3, "weight_decay": 0.01},
    }
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.98
    config.train.batch_size = 96
    config.train.steps = 1300
    config.train.log_every = 50
    config.train.eval_every = config.train.checkpoint_every = 300
    return finish(config, arg)
