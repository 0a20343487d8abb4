"""The pocket LLM's job on real text: English of NTREX-128 and SIB-200, topics of its training rows.

    python benchmarks/realtext.py runs/realtext_data --ntrex PATH/TO/ntrex --sib200 PATH/TO/sib200
    python train.py --config configs/realtext_decoder.py

Writes runs/realtext_decoder/hf, which configs/sib200.py takes.

Needs: two CPU cores. The text is tiny, so the LLM knows little English; the labelled rows are those
of SIB-200's English training split alone.
"""

from configs.common import finish
from jaxfusion.config import default_config


def get_config(arg=None):
    config = default_config("pretrain")
    config.tower.role = "decoder"
    config.tower.d_ff = 384
    config.tower.num_layers = 4
    config.tower.vocab_size = 4096
    config.data.path = "runs/realtext_data"
    config.data.languages = ("eng_Latn",)
    config.data.buckets = (48, 64)
    config.data.max_tokens = 96
    config.data.dev_rows = 128
    config.objective.name = "causal_lm"
    config.objective.answer_weight = 10.0
    config.optimizer.groups = {
        "tower": {"patterns": ("decoder/.*",), "learning_rate": 2e-3, "weight_decay": 0.1},
    }
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.98
    config.train.batch_size = 64
    config.train.steps = 300
    config.train.log_every = 50
    config.train.eval_every = config.train.checkpoint_every = 100
    return finish(config, arg)
