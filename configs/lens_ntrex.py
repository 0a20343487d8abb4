"""Lens (arXiv:2410.04407) on aligned text files, no chat: NTREX-128 in nine languages.

    python train.py --config configs/lens_ntrex.py --config.data.path='NTREX-128/{language}.txt' \\
        --config.decoder.checkpoint=meta-llama/Llama-3.2-1B
    python train.py --config configs/lens_ntrex.py:tasks

The second command also scores topics of sentences (SIB-200), XCOPA and XWinograd, adds
disentanglement, and trains eight blocks beside the two of the paper. It probes 300 lines and trains
on 200.

Needs: NTREX-128 (github.com/MicrosoftTranslator/NTREX, CC BY-SA 4.0); a GPU of 16 GB, or two CPU
cores and a few minutes with a small LLM. The probe reads 1,500 lines, 400 train, and of the others
the perplexity is measured, and whether what follows is in their language (pip install
'jaxfusion[identify]').
"""

from configs.common import finish
from jaxfusion.config import default_config

NAMES = {"en": "src.eng", "si": "ref.sin", "ta": "ref.tam", "sw": "ref.swa", "bn": "ref.ben",
         "zh": "ref.zho-CN", "ja": "ref.jpn", "ko": "ref.kor", "ar": "ref.arb"}
SIB = {"en": "eng_Latn", "si": "sin_Sinh", "ta": "tam_Taml", "sw": "swh_Latn", "bn": "ben_Beng",
       "zh": "zho_Hans", "ja": "jpn_Jpan", "ko": "kor_Hang", "ar": "arb_Arab"}
TOPICS = ("science/technology", "travel", "politics", "sports", "health", "entertainment",
          "geography")


def get_config(arg=None):
    config = default_config("lens")
    config.decoder.checkpoint = "meta-llama/Llama-3.2-1B"
    config.data.path = "NTREX-128/{language}.txt"
    config.data.central, *targets = NAMES
    config.data.targets = tuple(targets)
    config.data.columns = {name: f"newstest2019-{file}" for name, file in NAMES.items()}
    config.data.chat_template = False
    config.data.probe_rows, config.data.rows = 1500, 400
    config.data.perplexity_rows, config.data.reply_rows = 200, 32
    config.eval.max_new_tokens = 32
    config.sweep = (
        {"name": "steering", "lens": {"method": "steering"}},
        {"name": "Lens"},
    )
    return finish(config, arg, {"tasks": score_tasks})


def score_tasks(config):
    config.tasks = {"topics": {
        # The space at the end goes to the label, as the LLM has read words.
        "prompt": f"The topic of a text is one of: {', '.join(TOPICS)}.\n\nText: {{text}}\nTopic: ",
        "labels": TOPICS, "languages": tuple(SIB), "names": SIB, "source": "hub:Davlan/sib200",
        "subset": "{language}", "columns": {"label": "category"}, "parallel": True}}
    config.eval.tasks = ("topics", "xcopa", "xwinograd")
    # Perplexity and replies take most of the time.
    config.data.probe_rows, config.data.rows = 300, 200
    config.data.perplexity_rows = 100
    config.sweep = (*config.sweep, {"name": "Lens, 8 blocks", "lens": {"blocks": 8}},
                    {"name": "disentangle", "lens": {"method": "disentangle"}})
