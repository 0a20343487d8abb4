r"""Topic classification on SIB-200 (arXiv:2309.07445): English training, 20 languages tested.

    python -m jaxfusion.miniatures.checkpoints checkpoints/pocket --size pocket \
        --encoder_tokenizer PATH/TO/T5.model --decoder_tokenizer PATH/TO/LLM.model
    python train.py --config configs/sib200.py --config.data.path=PATH/TO/sib200
    python eval.py --workdir runs/sib200

Needs: a CPU; two SentencePiece models (without these flags small tokenizers are trained); a clone
of the SIB-200 repository (its `data/annotated/LANGUAGE/SPLIT.tsv`; without `--config.data.path` the
rows come from the hub). The checkpoints above have random weights: with them every part of the
path runs and English is learned, but nothing transfers; give `--config.encoder.checkpoint` and
`--config.decoder.checkpoint` real ones.

Published: none for a bridge; the largest class makes up 25% of each split.
"""

from configs.common import finish
from jaxfusion.config import default_config


def get_config(arg=None):
    config = default_config()
    config.encoder.checkpoint = "checkpoints/pocket/encoder"
    config.decoder.checkpoint = "checkpoints/pocket/decoder"
    config.data.task = "sib200"
    config.data.language = "eng_Latn"
    config.optimizer.groups.bridge.learning_rate = 3e-3
    config.optimizer.groups.bridge.weight_decay = 0.0
    config.optimizer.b1 = 0.9
    config.train.batch_size = 16
    config.train.epochs = 10
    config.train.eval_every = config.train.checkpoint_every = 200
    config.eval.max_encoder_tokens = 256
    return finish(config, arg)
