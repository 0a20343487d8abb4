"""Topics of sentences in 20 languages (SIB-200, arXiv:2309.07445), learned in English alone.

    python train.py --config configs/real_topics.py             # Global Softmax
    python train.py --config configs/real_topics.py:compare     # four fusions, one report
    python train.py --config configs/real_topics.py:methods     # LayAlign, two stages, no noise
    python eval.py --workdir runs/real_topics

A bridge from multilingual-e5-small to SmolLM2-135M-Instruct. It learns SIB-200's 701 English rows
and is scored by the likelihood of the seven topics. `:all` scores all 205 languages in place of 20.

Needs: the hub, or `--config.encoder.checkpoint`, `--config.decoder.checkpoint` and
`--config.data.path` (a clone of the SIB-200 repository); with `:compare` these fields are below
`--config.base`. Two CPU cores take 5 to 10 minutes to train a bridge, and about as
long to score it. `:methods` needs translations besides, NTREX-128's files in `NTREX-128/`.

Published: none for a bridge. The largest class has 25% of each split.
"""

from configs.common import finish
from jaxfusion.config import default_config

LANGUAGES = (
    "eng_Latn", "sin_Sinh", "tam_Taml", "swh_Latn", "urd_Arab", "asm_Beng", "ben_Beng", "guj_Gujr",
    "hin_Deva", "kan_Knda", "mal_Mlym", "mar_Deva", "ory_Orya", "pan_Guru", "tel_Telu", "arb_Arab",
    "jpn_Jpan", "kor_Hang", "spa_Latn", "zho_Hans",
)
# By gigabytes of text in CC-100, which XLM-R and with it E5 learned from (1911.02116, table 6).
SEEN = {
    "above 10 GB": ("jpn_Jpan", "kor_Hang", "spa_Latn", "zho_Hans", "arb_Arab", "hin_Deva",
                    "tam_Taml"),
    "2 to 10 GB": ("mal_Mlym", "urd_Arab", "tel_Telu", "sin_Sinh", "kan_Knda", "mar_Deva"),
    "below 2 GB": ("guj_Gujr", "pan_Guru", "ory_Orya", "asm_Beng"),
}
DEVELOPMENT = ("ben_Beng", "swh_Latn")  # their development rows chose the recipe, with English's


def get_config(arg=None):
    config = default_config()
    config.encoder.checkpoint = "intfloat/multilingual-e5-small"
    config.encoder.prefix = "query: "
    config.encoder.keep_states = 6.0
    config.decoder.checkpoint = "HuggingFaceTB/SmolLM2-135M-Instruct"
    config.fusion.name = "global_softmax"
    config.fusion.noise = 0.3
    config.projector.warm_start = True
    config.data.task = "sib200"
    config.data.language = "eng_Latn"
    config.data.text_prompt = "\nThe topic of this text is "
    config.data.max_encoder_tokens = 128
    config.data.pack = True
    config.optimizer.groups = {
        "projector": {"patterns": ("projector/.*",), "learning_rate": 3e-3, "weight_decay": 0.0},
        "fusion": {"patterns": ("fusion/w",), "learning_rate": 3e-4, "weight_decay": 0.0},
    }
    config.optimizer.b1 = 0.9
    config.train.batch_size = 16
    config.train.epochs = 3
    config.train.log_every = 20
    config.train.eval_every = config.train.checkpoint_every = 66
    config.eval.languages = LANGUAGES
    config.eval.max_encoder_tokens = 256
    config.eval.max_new_tokens = 4
    return finish(config, arg, {"all": score_all, "last": last, "layer": one_layer,
                                "compare": compare_fusions, "methods": compare_methods})


def score_all(config):
    config.eval.languages = ()


def last(config):
    config.fusion.name = "last"
    del config.optimizer.groups["fusion"]  # it has nothing to learn


def one_layer(config):
    # The best by a probe of each layer on the development rows, before the last.
    config.fusion.name, config.fusion.layer = "layer", 11
    del config.optimizer.groups["fusion"]


def compare_fusions(base):
    config = default_config("compare")
    config.base = base
    only_projector = {"optimizer": {"groups": {"fusion": None}}}
    every = {"optimizer": {"groups": {
        "fusion": {"patterns": ("fusion/.*",), "learning_rate": 1e-3}}}}
    config.variants = (
        {"name": "last", "fusion": {"name": "last"}, **only_projector},
        {"name": "layer 11", "fusion": {"name": "layer", "layer": 11}, **only_projector},
        {"name": "global_softmax", "fusion": {"name": "global_softmax"}},
        {"name": "transformer_softmax", "fusion": {"name": "transformer_softmax"}, **every},
    )
    config.groups = SEEN
    config.development = DEVELOPMENT
    return config


def compare_methods(base):
    """Layer 11 with one thing changed: LayAlign's aligner, MindMerger's first stage, no noise."""
    one_layer(base)
    config = default_config("compare")
    config.base = base
    projector = base.optimizer.groups.projector.to_dict()
    aligner = {**projector, "patterns": ("aligner/.*",), "learning_rate": 1e-3}
    base.tasks = {"ntrex": {
        "prompt": "{text}", "languages": ("arb", "ben", "jpn", "kor", "sin", "swa", "tam", "zho"),
        "names": {"zho": "zho-CN"}, "source": "NTREX-128/newstest2019-ref.{language}.txt",
        "answers": "NTREX-128/newstest2019-src.eng.txt",
        "splits": {"train": "all[0:1900]", "dev": "all[1900:1997]"}}}
    translate = {
        "data": {"task": "ntrex", "path": None, "language": "all", "text_prompt": "",
                 "train_rows": 2112, "dev_rows": 12, "max_decoder_tokens": 128},
        "train": {"epochs": 1},
    }
    config.variants = (
        {"name": "layer 11, LayAlign", "aligner": {"name": "mlp"},
         "optimizer": {"groups": {"aligner": aligner}}},
        {"name": "layer 11, translations first", "first": translate},
        {"name": "layer 11, no noise", "fusion": {"noise": 0.0}},
    )
    config.groups = SEEN
    config.development = DEVELOPMENT
    return config
