"""LangBridge's recipe with any fusion on TPU v4: mT5-XL and Llama-2-7B, 1024 + 128 tokens.

    python train.py --config configs/tpu_v4.py                        # v4-8 to v4-64, one mesh
    python train.py --config configs/tpu_v4.py:transformer_softmax
    python train.py --config configs/tpu_v4.py --compile_only --topology v4-32     # needs no TPU

Needs: DKYoon/mt5-xl-lm-adapt (converted once where the hub holds a pickle:
`python -m jaxfusion.hf.convert HUB_ID OUT`) and access to meta-llama/Llama-2-7b-hf. Parameters are
spread over all chips (`mesh.fsdp=-1`); what each slice takes stands in docs/scaling.md.

Published: no figure for this pair; configs/langbridge.py is the published recipe.
"""

from configs.common import finish
from jaxfusion.config import default_config


def get_config(arg=None):
    config = default_config()
    config.encoder.checkpoint = "DKYoon/mt5-xl-lm-adapt"
    config.decoder.checkpoint = "meta-llama/Llama-2-7b-hf"
    config.encoder.dtype = config.decoder.dtype = "bfloat16"
    config.decoder.remat = "full"
    config.fusion.name = "global_softmax"
    config.fusion.backward = "second_pass"
    config.projector.end_std = 1.0

    config.data.task = "metamath"
    config.data.train_rows = 200_000
    config.data.dev_rows = 128
    config.data.max_encoder_tokens = 1024
    config.data.max_decoder_tokens = 128
    config.data.buckets = (128, 256, 512, 1024)

    config.optimizer.groups.bridge.learning_rate = 6e-4
    config.optimizer.groups.bridge.weight_decay = 0.0
    config.optimizer.b1 = 0.9
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_fraction = 0.0
    config.train.batch_size = 128
    config.train.epochs = 1
    config.train.eval_every = config.train.checkpoint_every = 200
    config.eval.batch_size = 64
    config.eval.max_encoder_tokens = 1024
    config.eval.max_new_tokens = 256
    config.mesh.data, config.mesh.fsdp = 1, -1
    return finish(config, arg)
