"""The whole idea on two CPU cores: the pocket world's inference task, in eleven languages.

    python train.py --config configs/quickstart.py

Trains four bridges between pocket/encoder and pocket/decoder on English alone and scores them, the
LLM alone and a lookup of surface features in every language of the pocket world. Writes
runs/quickstart/report.html, report.md, accuracy.png, layers.png and a run's workdir for each
bridge.

Needs: two CPU cores, three to five minutes. The projector starts at a regression onto the LLM's
embeddings, which is not part of the papers' method: `--config.base.projector.warm_start=False`
starts it at random.
"""

from pathlib import Path

from configs.common import finish
from jaxfusion.config import default_config
from jaxfusion.data.pocket.lexicon import LANGUAGES

POCKET = Path(__file__).resolve().parents[1] / "pocket"  # from wherever the command is given


def get_config(arg=None):
    config = default_config("compare")
    base = config.base
    base.encoder.checkpoint = str(POCKET / "encoder")
    base.decoder.checkpoint = str(POCKET / "decoder")
    base.data.task = "pocket_nli"
    base.data.path = "made:pocket"
    base.data.max_encoder_tokens = 48
    base.data.buckets = (48,)
    base.data.dev_rows = 100
    base.projector.name = "ffn"
    base.projector.d_ff = 512
    base.projector.warm_start = True
    base.fusion.d_ff = 256
    base.optimizer.groups = {
        "projector": {
            "patterns": ("projector/.*",), "learning_rate": 1e-4, "weight_decay": 0.0,
        },
        "fusion": {"patterns": ("fusion/.*",), "learning_rate": 1e-3, "weight_decay": 0.0},
    }
    base.optimizer.b1 = 0.9
    base.train.batch_size = 32
    base.train.steps = 80
    base.train.log_every = 20
    base.train.eval_every = base.train.checkpoint_every = 80
    base.eval.batch_size = 100
    base.eval.max_encoder_tokens = 64
    base.eval.max_new_tokens = 4

    only_projector = {"optimizer": {"groups": {"fusion": None}}}
    config.variants = (
        {"name": "last", "fusion": {"name": "last"}, **only_projector},
        {"name": "layer 4", "fusion": {"name": "layer", "layer": 4}, **only_projector},
        # Its scale `t` moves 1e5 times as fast as it is told to: at such rates it stays as it is.
        {"name": "global_softmax", "fusion": {"name": "global_softmax"}, "optimizer": {
            "groups": {"fusion": {"patterns": ("fusion/w",), "learning_rate": 1e-3}},
        }},
        {"name": "transformer_softmax", "fusion": {"name": "transformer_softmax"}},
    )
    config.groups = {
        group: tuple(name for name, x in LANGUAGES.items() if x.group == group and x.reported)
        for group in ("rich", "mid", "poor")
    }
    config.development = tuple(name for name, x in LANGUAGES.items() if not x.reported)
    config.rows = 150
    return finish(config, arg)
