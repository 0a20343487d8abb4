"""LangBridge's recipe with any fusion on one GPU of 24 GB: mT5-XL and Llama-2-7B in 8 bits.

    python train.py --config configs/gpu_24gb.py
    python train.py --config configs/gpu_24gb.py:last
    python train.py --config configs/gpu_24gb.py --config.decoder.dtype=int4     # a larger LLM

Needs: one GPU of 24 GB; the checkpoints of configs/tpu_v4.py, whose run this is: both towers in
int8, and a batch of 128 in parts of two rows. Compiled for a TPU v5e the step takes 9.2 GiB, with
the LLM in int4 7.2 GiB; it has not run on such a GPU yet.

Published: no figure for this pair; configs/langbridge.py is the published recipe.
"""

from configs import tpu_v4
from configs.common import finish


def get_config(arg=None):
    config = tpu_v4.get_config().unlock()
    config.encoder.dtype = config.decoder.dtype = "int8"
    config.train.accumulate = 64
    config.eval.batch_size = 8  # the LLM's keys and values of a row take 0.7 GiB
    return finish(config, arg)
