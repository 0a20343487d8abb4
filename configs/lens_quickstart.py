"""Lens (arXiv:2410.04407) and its baselines on the pocket LLM of three languages, in a minute.

    python train.py --config configs/lens_quickstart.py
    python train.py --config configs/lens_quickstart.py:ceiling

Needs: two CPU cores; the first command takes about a minute, the second about six. The LLM
(pocket/lens_decoder) has read and solved much in English, less in latn_a and little in deva. Every
method sees the same 200 parallel prompts; supervised tuning alone sees their answers. The second
command tells what there is to gain: supervised tuning on 4,000 answers, in two blocks and in three.
"""

from pathlib import Path

from configs.common import finish
from jaxfusion.config import default_config

POCKET = Path(__file__).resolve().parents[1] / "pocket"  # from wherever the command is given


def get_config(arg=None):
    config = default_config("lens")
    config.decoder.checkpoint = str(POCKET / "lens_decoder")
    config.data.path = config.data.task_path = "made:pocket"
    config.data.central, config.data.targets = "en", ("latn_a", "deva")
    config.data.answer = "answer"
    config.data.chat_template = False
    config.data.probe_rows = config.data.rows = 200
    config.data.buckets = (32, 48, 64)
    config.data.max_tokens = 64
    config.data.task_rows = 300
    config.eval.tasks = ("pocket_nli",)
    config.eval.batch_size = 100
    config.eval.max_new_tokens = 1
    config.eval.max_decoder_tokens = 64
    config.lens.blocks = 2
    group = config.optimizer.groups.blocks
    group.learning_rate, group.weight_decay = 1e-4, 0.1
    config.optimizer.b1 = 0.9
    config.train.batch_size = 8
    config.train.steps = 100
    config.train.log_every = 50
    config.train.eval_every = config.train.checkpoint_every = 100
    config.sweep = (
        {"name": "steering", "lens": {"method": "steering"}},
        {"name": "disentangle", "lens": {"method": "disentangle"}},
        {"name": "supervised", "lens": {"method": "supervised"}},
        {"name": "Lens"},
        {"name": "no align", "lens": {"align": 0.0}},
        {"name": "no separate", "lens": {"separate": 0.0}},
        {"name": "no retain", "lens": {"retain": 0.0}},
    )
    return finish(config, arg, {"ceiling": ceiling})


def ceiling(config):
    config.data.rows = 4000
    config.optimizer.groups.blocks.learning_rate = 1e-3
    config.train.batch_size = 32
    config.train.steps = 400
    config.sweep = tuple(
        {"name": f"supervised, {blocks} blocks",
         "lens": {"method": "supervised", "blocks": blocks}} for blocks in (2, 3))
