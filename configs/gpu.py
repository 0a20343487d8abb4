"""LangBridge's recipe with any fusion on GPUs of 80 GB: mT5-XL and Llama-2-7B, 1024 + 128 tokens.

    python train.py --config configs/gpu.py                           # one GPU, or all there are
    python train.py --config configs/gpu.py --config.train.accumulate=2            # on eight
    python train.py --config configs/gpu.py --compile_only            # what it takes, beforehand

Needs: one GPU of 80 GB or more; the checkpoints of configs/tpu_v4.py, whose run this is: a batch of
128 in parts that fit one GPU. On eight, parameters and batch are spread over all of them.

Published: no figure for this pair; configs/langbridge.py is the published recipe.
"""

from configs import tpu_v4
from configs.common import finish


def get_config(arg=None):
    config = tpu_v4.get_config().unlock()
    config.train.accumulate = 16
    return finish(config, arg)
