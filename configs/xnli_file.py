r"""Inference on XNLI's own TSV files (`dev-LANGUAGE.tsv`), split by premise into train, dev, test.

    python -m jaxfusion.miniatures.checkpoints checkpoints/pocket --size pocket \
        --encoder_tokenizer PATH/TO/T5.model --decoder_tokenizer PATH/TO/LLM.model
    python train.py --config configs/xnli_file.py --config.data.path=PATH/TO/xnli
    python eval.py --workdir runs/xnli_file

Needs: a CPU; two SentencePiece models (without these flags small tokenizers are trained); the
directory of the TSV files (rows 0-1889 train, 1890-2189 dev, 2190-2489 test, no premise in two of
them). On random weights, as written, nothing transfers.

Published: none on these splits; the classes are balanced (33.3%).
"""

from configs.common import finish
from jaxfusion.config import default_config


def get_config(arg=None):
    config = default_config()
    config.encoder.checkpoint = "checkpoints/pocket/encoder"
    config.decoder.checkpoint = "checkpoints/pocket/decoder"
    config.data.task = "xnli"
    config.optimizer.groups.bridge.learning_rate = 1e-3
    config.optimizer.b1 = 0.9
    config.train.batch_size = 16
    config.train.epochs = 3
    config.train.eval_every = config.train.checkpoint_every = 200
    config.eval.max_encoder_tokens = 256
    return finish(config, arg)
