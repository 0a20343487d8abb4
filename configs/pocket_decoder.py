"""The pocket LLM: a Llama of a million parameters that reads and answers English alone.

    python train.py --config configs/pocket_decoder.py
    python train.py --config configs/pocket_decoder.py:noise

The second command goes on from runs/pocket_decoder with noise on the embeddings, as a bridge will
never hit them exactly. It writes runs/pocket_decoder_noise/hf, kept in the repository as
pocket/decoder (see pocket/README.md).

    python train.py --config configs/pocket_decoder.py:lens

makes runs/pocket_decoder_lens/hf, kept as pocket/lens_decoder: an LLM that has read and solved much
in English and little in two other languages, for configs/lens_quickstart.py.

Needs: two CPU cores; about half an hour for the first two, 50 minutes for the third.
Learns from English text of the pocket world (jaxfusion/data/pocket/world.py), some of it solved
tasks; no frame of a development or test row is among it.
"""

from configs.common import finish
from jaxfusion.config import default_config


def get_config(arg=None):
    config = default_config("pretrain")
    config.tower.role = "decoder"
    config.tower.d_ff = 384
    config.tower.num_layers = 4
    config.tower.vocab_size = 1024
    config.data.languages = ("en",)
    config.data.buckets = (24, 32, 40)
    config.data.max_tokens = 48
    config.objective.name = "causal_lm"
    config.objective.answer_weight = 30.0
    config.optimizer.groups = {
        "tower": {"patterns": ("decoder/.*",), "learning_rate": 1e-3, "weight_decay": 0.1},
    }
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.98
    config.train.batch_size = 128
    config.train.steps = 3300
    config.train.log_every = 150
    config.train.eval_every = config.train.checkpoint_every = 300
    return finish(config, arg, {"noise": noise, "lens": lens})


def noise(config):
    config.train.init_from = "runs/pocket_decoder"
    config.objective.noise = 0.8
    config.train.steps = 1800


def lens(config):
    config.tower.vocab_size = 2048
    config.data.languages = ("en", "latn_a", "deva")
    config.data.translations = True
    config.data.sampling = 0.4
    config.data.buckets = (24, 32, 40, 48)
    config.data.max_tokens = 64
    config.train.steps = 8000
    config.train.eval_every = config.train.checkpoint_every = 500
