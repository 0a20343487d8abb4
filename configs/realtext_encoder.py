"""The pocket encoder's job on real text: sentences and translations of NTREX-128 and SIB-200.

    python benchmarks/realtext.py runs/realtext_data --ntrex PATH/TO/ntrex --sib200 PATH/TO/sib200
    python train.py --config configs/realtext_encoder.py

Writes runs/realtext_encoder/hf, which configs/sib200.py takes.

Needs: two CPU cores. Two thousand sentence pairs in eight languages are no pretraining: this shows
that the job runs on real text, and how far so little of it goes.
"""

from configs.common import finish
from jaxfusion.config import default_config


def get_config(arg=None):
    config = default_config("pretrain")
    config.tower.vocab_size = 8_000
    config.data.path = "runs/realtext_data"
    config.data.pivot = "eng_Latn"
    config.data.buckets = (32, 48, 64)
    config.data.max_tokens = 96
    config.optimizer.groups = {
        "tower": {"patterns": ("encoder/.*",), "learning_rate": 2e-3, "weight_decay": 0.01},
    }
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.98
    config.train.batch_size = 32
    config.train.steps = 400
    config.train.log_every = 50
    config.train.eval_every = config.train.checkpoint_every = 200
    return finish(config, arg)
