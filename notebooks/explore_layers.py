# ---
# jupyter:
#   accelerator: TPU
#   colab:
#     provenance: []
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What each layer of a multilingual encoder knows
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxfusion/jaxfusion/blob/main/notebooks/explore_layers.ipynb)
#
# **What it does.** Opens a bridge whose fusion weighs the encoder's layers, shows token by token
# which layers it takes of sentences that you type, and asks every layer for itself how well it
# finds the translation of a sentence: the reason to read all layers, not only the last.
#
# **What it needs.** A TPU or a GPU with 8 GB or more: in Colab *Runtime > Change runtime type*. A
# bridge that you trained, or the patience to train a short one here.
#
# **How long it takes.** On two CPU cores in pocket mode (`POCKET=1`) less than a minute. On an
# accelerator most of it is the short training. It is safe to close: run all cells again, and it
# goes on where it stood.
#
# Only the pocket mode of this notebook is run by this project's tests; no free Colab runtime is.

# %%
import os

REPOSITORY = "https://github.com/jaxfusion/jaxfusion"
POCKET = os.environ.get("POCKET") == "1"  # miniatures, for a CPU
if not POCKET:
    extra = "cuda" if os.path.exists("/dev/nvidia0") else "tpu"
    package = f"jaxfusion[{extra}] @ git+{REPOSITORY}"
    get_ipython().run_line_magic("pip", f"install -q '{package}'")

# %% [markdown]
# ## The device

# %%
from jaxfusion.notebook import start

device = start(POCKET)

# %% [markdown]
# ## Where runs are kept
#
# In Colab on your Google Drive, which asks for leave; elsewhere in `runs/`.

# %%
from jaxfusion.notebook import work_folder

WORK = work_folder("explore", POCKET)

# %% [markdown]
# ## Sentences and languages
#
# Type one sentence in as many languages as you like. Retrieval takes the test rows of `TASK`, which
# are translations of each other; its first language is the one that is searched.

# %%
SENTENCES = {
    "en": "The children are sleeping in the garden.",
    "sw": "Watoto wanalala bustanini.",
    "hi": "बच्चे बगीचे में सो रहे हैं।",
    "ur": "بچے باغ میں سو رہے ہیں۔",
}
TASK, DATA = "xnli", None
LANGUAGES = ("en", "de", "hi", "sw", "th", "ur", "zh")
ROWS = 300
BRIDGE = None  # the workdir of your own, such as …/bridge/transformer_softmax
TRAIN_ROWS, STEPS, BATCH, TOKENS = 8000, 500, 16, (64, 96, 128)
RATES, WARM_START = {"projector": 3e-5, "fusion": 3e-5}, False
WANTED = None  # or an encoder and an LLM of your own choice

if POCKET:
    SENTENCES = {
        "en": "the scarlet king behind the orchard hears",
        "latn_a": "zuki redi luto puve gaibu kiva",
        "sinh": "යායො ගෙජ බොසෙත පිවු දනා",
        "arab": "سيري ليساني فوهو سيبا عاسو",
    }
    TASK, DATA, ROWS = "pocket_nli", "made:pocket", 96
    LANGUAGES = ("en", "latn_a", "arab", "beng", "taml", "ethi", "mlym", "sinh", "thaa")
    TRAIN_ROWS, STEPS, BATCH, TOKENS = 2000, 40, 32, (48,)
    RATES, WARM_START = {"projector": 1e-4, "fusion": 1e-3}, True

# %% [markdown]
# ## A bridge
#
# Trained here unless `BRIDGE` names one. Its fusion gives every token its own weights of the
# layers.

# %%
from pathlib import Path

from jaxfusion.bridge.job import train
from jaxfusion.config import default_config, from_config_dict
from jaxfusion.miniatures.inputs import make_inputs
from jaxfusion.notebook import BRIDGES, converted, pick_models, pocket_model
from jaxfusion.runs.open_run import open_run
from jaxfusion.runs.score import read_rows

config = default_config()
config.fusion.name = "transformer_softmax"
config.projector.name, config.projector.warm_start = "ffn", WARM_START
config.data.task, config.data.train_rows, config.data.dev_rows = TASK, TRAIN_ROWS, 48
if DATA:
    config.data.path = DATA
config.data.buckets, config.data.max_encoder_tokens = TOKENS, max(TOKENS)
config.data.max_decoder_tokens = 16
config.eval.batch_size, config.eval.max_new_tokens = 48, 4 if POCKET else 8
config.eval.max_encoder_tokens = 64 if POCKET else 256
config.train.batch_size, config.train.steps = BATCH, STEPS
config.train.log_every = config.train.checkpoint_every = max(STEPS // 5, 20)
config.train.eval_every = STEPS
config.optimizer.groups = {
    part: {"patterns": (f"{part}/.*",), "learning_rate": rate, "weight_decay": 0.0}
    for part, rate in RATES.items()
}

if BRIDGE is None:
    if POCKET:
        encoder, llm = pocket_model("encoder"), pocket_model("decoder")
    else:
        encoder, llm = pick_models(device, BRIDGES, WANTED)
        encoder = converted(encoder)
        config.encoder.dtype = config.decoder.dtype = "bfloat16"
        config.encoder.remat = config.decoder.remat = "full"
    config.encoder.checkpoint, config.decoder.checkpoint = encoder, llm
    train(make_inputs(from_config_dict(config)), WORK / "bridge")
else:
    converted(open_run(Path(BRIDGE)).config.encoder.checkpoint)  # if this session lacks it

# %% [markdown]
# ## Which layers the fusion takes of each token
#
# Weights in %, a column for each layer of the encoder.

# %%
from html import escape

from IPython.display import HTML, Image, Markdown, display

from jaxfusion.reports.page import token_table
from jaxfusion.runs.open_run import open_run

bridge = open_run(Path(BRIDGE or WORK / "bridge"))
for language, sentence in SENTENCES.items():
    display(HTML(f"<h4>{language}: <span dir='auto'>{escape(sentence)}</span></h4>"
                 + token_table(bridge.layers_of(sentence))))

# %% [markdown]
# ## Retrieval, layer by layer
#
# Every row as one vector, the mean over its tokens, in each layer. Of how many rows is the nearest
# one in the searched language (by cosine) the translation? On the right each language's own mean is
# taken away first: what says *which language this is* goes, what says *what is meant* stays. Rows
# are read as the bridge reads them, prompt and all, and some share a premise.

# %%
from jaxfusion.evaluation.layers import retrieval_accuracy
from jaxfusion.reports.pictures import draw_by_layer, draw_sentences

rows = read_rows(bridge.model.config, (), LANGUAGES, ROWS, None)[TASK]
texts = {language: [row.query for row in found] for language, found in rows.items()}
states = {language: bridge.states_of(found) for language, found in texts.items()}
searched, *others = LANGUAGES
found = {
    title: {x: retrieval_accuracy(states[x], states[searched], centred) for x in others}
    for title, centred in (("as they are", False), ("without each language's mean", True))
}
draw_by_layer(found, f"rows whose translation in {searched} is nearest, %", WORK / "retrieval.png")
display(Image(WORK / "retrieval.png"))

# %% [markdown]
# ## What the fusion takes
#
# The mean weight of each layer over the same rows. A fusion that was trained on English alone need
# not take the layers that find most.

# %%
taken = {language: bridge.weights_of(found) for language, found in texts.items()}
draw_by_layer({"fusion": taken}, "mean weight, %", WORK / "taken.png")
display(Image(WORK / "taken.png"))

# %% [markdown]
# ## The picture behind the idea
#
# Each point is a row, each colour a language, in the layer that finds most; grey lines join a few
# rows with their translations. Left, as they are; right, without each language's mean.

# %%
import numpy as np

centred = np.mean(list(found["without each language's mean"].values()), axis=0)
layer = int(centred.argmax()) + 1
here = {language: x[layer - 1][:50] for language, x in states.items()}
draw_sentences({
    f"layer {layer}, as they are": here,
    "without each language's mean": {x: at - at.mean(axis=0) for x, at in here.items()},
}, WORK / "sentences.png", joined=5)
display(Image(WORK / "sentences.png"))

# %% [markdown]
# ## The table for your paper
#
# Mean over languages of the rows found, in %.

# %%
from jaxfusion.reports.comparison import as_markdown

lines = [["layer", *found, "weight in the fusion"]]
for i in range(len(centred)):
    cells = [np.mean([x[i] for x in by.values()]) for by in (*found.values(), taken)]
    lines.append([str(i + 1), *(f"{100 * x:.1f}" for x in cells)])
(WORK / "layers.md").write_text(as_markdown(lines), "utf-8")
display(Markdown(as_markdown(lines)))
