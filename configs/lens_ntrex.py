"""Lens (arXiv:2410.04407) on aligned text files, no chat: NTREX-128 in nine languages.

    python train.py --config configs/lens_ntrex.py --config.data.path='NTREX-128/{language}.txt' \\
        --config.decoder.checkpoint=meta-llama/Llama-3.2-1B

Needs: NTREX-128 (github.com/MicrosoftTranslator/NTREX, CC BY-SA 4.0); a GPU of 16 GB, or two CPU
cores and a few minutes with a small LLM. The probe reads 1,500 lines, 400 train, and of the others
the perplexity is measured, and whether what follows is in their language (pip install
'jaxfusion[identify]').
"""

from configs.common import finish
from jaxfusion.config import default_config

NAMES = {"en": "src.eng", "si": "ref.sin", "ta": "ref.tam", "sw": "ref.swa", "bn": "ref.ben",
         "zh": "ref.zho-CN", "ja": "ref.jpn", "ko": "ref.kor", "ar": "ref.arb"}


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
    return finish(config, arg)
