"""LangBridge (arXiv:2401.10695) on its labelled mathematics corpus: mT5-XL, MetaMath-7B.

    python train.py --config configs/langbridge.py

Needs: accelerators with 80 GB together; DKYoon/mt5-xl-lm-adapt and meta-math/MetaMath-7B-V1.0, each
converted once where the hub holds a pickle (`python -m jaxfusion.hf.convert HUB_ID OUT`).

Published: 70.36 is LangBridge on XNLI as 2508.09091 reran it (configs/xnli_paper.py:last); the
LangBridge paper reports MGSM by extracted answer: `python eval.py --workdir runs/langbridge --tasks
mgsm` asks and counts as its authors do. What differs from their run is in docs/reproducing.md.

The encoder's embeddings train as well, for the whitespace tokens that are added. On unlabelled
corpora, each text split at a random point (`unlabelled` in docs/data.md), the authors train the
whole encoder: `--config.optimizer.groups.encoder.patterns="('encoder/.*',)"`.
"""

from configs.common import finish
from jaxfusion.config import default_config
from jaxfusion.data.tokenizers import LANGBRIDGE_WHITESPACE


def get_config(arg=None):
    config = default_config()
    config.encoder.checkpoint = "DKYoon/mt5-xl-lm-adapt"
    config.encoder.dtype = "bfloat16"
    config.encoder.added_tokens = LANGBRIDGE_WHITESPACE
    config.decoder.checkpoint = "meta-math/MetaMath-7B-V1.0"
    config.decoder.dtype = "bfloat16"
    config.decoder.remat = "full"
    config.fusion.name = "last"
    config.projector.end_std = 1.0

    config.data.task = "metamath"
    config.data.train_rows = 200_000
    config.data.dev_rows = 100
    config.data.max_encoder_tokens = 1024
    config.data.max_decoder_tokens = 128
    config.data.max_total_tokens = 1024 + 128
    config.data.target_eos = False
    config.data.buckets = (64, 128, 256, 512, 1024)

    groups = config.optimizer.groups
    groups.bridge.learning_rate = 6e-4
    groups.bridge.weight_decay = 0.0
    groups.encoder = {
        "patterns": ("encoder/embed/.*",), "learning_rate": 2e-5, "weight_decay": 0.1,
    }
    config.optimizer.b1 = 0.9
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_fraction = 0.0
    config.train.batch_size = 128
    config.train.epochs = 1
    config.train.eval_every = config.train.checkpoint_every = 200
    config.eval.max_encoder_tokens = 1024
    return finish(config, arg)
