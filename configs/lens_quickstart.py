"""Lens (arXiv:2410.04407) on the pocket LLM of three languages: does it lift the two that it knows
poorly, and what does each of its losses do?

    python train.py --config configs/pocket_decoder.py:lens     # makes the LLM, half an hour
    python train.py --config configs/lens_quickstart.py

Needs: two CPU cores; the second command takes about three minutes. The LLM has read and solved much
in English and little in two other languages. Every method sees the same parallel prompts;
supervised tuning alone sees their answers.

So far it lifts nothing: that LLM is at chance in both other languages (37% and 37% of 300
development rows, 75% in English), and no method changes that. There is nothing yet to align.
"""

from jaxfusion.config import default_config, finish


def get_config(arg=None):
    config = default_config("lens")
    config.decoder.checkpoint = "runs/pocket_decoder_lens/hf"
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
    return finish(config, arg)
