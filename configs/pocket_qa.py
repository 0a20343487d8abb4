"""Questions about two sentences of the pocket world, answered in English in every language.

    python train.py --config configs/pocket_qa.py               # Transformer Softmax
    python train.py --config configs/pocket_qa.py:compare       # all three fusions
    python train.py --config configs/pocket_qa.py:two_stages    # translations first: MindMerger
    python eval.py --workdir runs/pocket_qa

Needs: two CPU cores, a few minutes. The projector starts at a regression onto the LLM's embeddings,
which is no part of the papers' method: `--config.projector.warm_start=False` starts it at random.

Published: none; the pocket world is this project's own.
"""

from pathlib import Path

from configs.common import finish
from jaxfusion.config import default_config

POCKET = Path(__file__).resolve().parents[1] / "pocket"  # from wherever the command is given


def get_config(arg=None):
    config = default_config()
    config.encoder.checkpoint = str(POCKET / "encoder")
    config.decoder.checkpoint = str(POCKET / "decoder")
    config.data.task = "pocket_qa"
    config.data.path = "made:pocket"
    config.data.max_encoder_tokens = 64
    config.data.buckets = (40, 48, 64)
    config.data.dev_rows = 200
    config.projector.name = "ffn"
    config.projector.warm_start = True
    config.fusion.d_ff = 256
    config.optimizer.groups.bridge.learning_rate = 1e-3
    config.optimizer.groups.bridge.weight_decay = 0.0
    config.optimizer.b1 = 0.9
    config.train.batch_size = 32
    config.train.steps = 600
    config.train.eval_every = config.train.checkpoint_every = 300
    config.eval.batch_size = 100
    config.eval.max_encoder_tokens = 64
    config.eval.max_new_tokens = 4
    return finish(config, arg, {"two_stages": translate_first})


def translate_first(config):
    """MindMerger's two stages (2405.17386): translations into English, then the task, with the
    query in the LLM's own tokens behind the prefix."""
    config.data.text_prompt = "{query}"
    config.first = {
        "data": {"task": "pocket_translation", "path": "made:pocket", "language": "all",
                 "text_prompt": ""},
        "train": {"steps": 300, "eval_every": 150, "checkpoint_every": 150},
    }
