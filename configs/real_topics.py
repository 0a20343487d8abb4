"""Topics of sentences in 20 languages (SIB-200, arXiv:2309.07445), learned in English alone.

    python train.py --config configs/real_topics.py:compare     # four fusions, one report
    python train.py --config configs/real_topics.py             # Global Softmax alone

A bridge from multilingual-e5-small to SmolLM2-135M-Instruct, trained on SIB-200's 701 English rows
and scored by the likelihood of its seven topics.
"""

from configs.common import finish
from jaxfusion.config import default_config

LANGUAGES = (
    "eng_Latn", "sin_Sinh", "tam_Taml", "swh_Latn", "urd_Arab", "asm_Beng", "ben_Beng", "guj_Gujr",
    "hin_Deva", "kan_Knda", "mal_Mlym", "mar_Deva", "ory_Orya", "pan_Guru", "tel_Telu", "arb_Arab",
    "jpn_Jpan", "kor_Hang", "spa_Latn", "zho_Hans",
)
DEVELOPMENT = ("ben_Beng", "swh_Latn")  # their development rows chose the recipe, with English's


def get_config(arg=None):
    config = default_config()
    config.encoder.checkpoint = "intfloat/multilingual-e5-small"
    config.encoder.prefix = "query: "
    config.decoder.checkpoint = "HuggingFaceTB/SmolLM2-135M-Instruct"
    config.fusion.name = "global_softmax"
    config.projector.warm_start = True
    config.data.task = "sib200"
    config.data.language = "eng_Latn"
    config.data.text_prompt = "\nThe topic of this text is"
    config.data.max_encoder_tokens = 128
    config.data.buckets = (32, 48, 64, 128)
    config.optimizer.groups = {
        "projector": {"patterns": ("projector/.*",), "learning_rate": 1e-3, "weight_decay": 0.0},
        "fusion": {"patterns": ("fusion/.*",), "learning_rate": 1e-3, "weight_decay": 0.0},
    }
    config.optimizer.b1 = 0.9
    config.train.batch_size = 16
    config.train.epochs = 3
    config.train.log_every = 20
    config.train.eval_every = config.train.checkpoint_every = 132
    config.eval.languages = LANGUAGES
    config.eval.max_encoder_tokens = 256
    config.eval.max_new_tokens = 4
    return finish(config, arg)
