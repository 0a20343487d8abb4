"""MindMerger (arXiv:2405.17386), two stages in one command: mT5-XL, MetaMath-7B.

    python train.py --config configs/mindmerger.py         # :layalign adds LayAlign (2502.11405)
    python eval.py --workdir runs/mindmerger --tasks mgsm

The first stage learns the mapping on translations into English, the second mathematics, with the
query in the LLM's own tokens behind the prefix. The first is kept in WORKDIR/first.

Needs: accelerators with 80 GB together; the checkpoints, each converted once where the hub holds a
pickle; pairs of sentences, line by line: `pairs/train-sw.txt` with their English in
`pairs/train-sw.en.txt`, `pairs/dev-sw.txt`, and so on for each language of `config.tasks`.

Published: in the papers, MGSM by extracted answer. What differs is in docs/reproducing.md.
"""

from configs.common import finish
from jaxfusion.config import default_config


def get_config(arg=None):
    config = default_config()
    config.encoder.checkpoint = "google/mt5-xl"
    config.encoder.dtype = config.decoder.dtype = "bfloat16"
    config.decoder.checkpoint = "meta-math/MetaMath-7B-V1.0"
    config.decoder.remat = "full"
    config.fusion.name = "last"
    config.projector.name = "mapping"
    config.data.task = "metamath"
    config.data.train_rows = 30_000
    config.data.dev_rows = 100
    config.data.text_prompt = "{query}"
    config.data.max_encoder_tokens = config.data.max_decoder_tokens = 512
    config.data.buckets = (64, 128, 256, 512)
    config.optimizer.groups.bridge.learning_rate = 3e-5
    config.train.batch_size = 128
    config.train.epochs = 3
    config.train.eval_every = config.train.checkpoint_every = 200
    config.eval.max_encoder_tokens = config.eval.max_decoder_tokens = 1024
    config.tasks.translation = {
        "prompt": "{text}", "languages": ("bn", "de", "es", "fr", "ja", "ru", "sw", "th", "zh"),
        "source": "pairs/{split}-{language}.txt", "answers": "pairs/{split}-{language}.en.txt"}
    config.first = {
        "data": {"task": "translation", "language": "all", "text_prompt": "", "train_rows": None,
                 "max_encoder_tokens": 200, "max_decoder_tokens": 200,
                 "buckets": (32, 64, 128, 200)},
        "optimizer": {"groups": {"bridge": {"learning_rate": 4e-5}}},
    }
    return finish(config, arg, {"layalign": align})


def align(config):
    """LayAlign on top, as its authors' code has it."""
    config.aligner.name, config.aligner.recipe = "mlp", "paper_code"
