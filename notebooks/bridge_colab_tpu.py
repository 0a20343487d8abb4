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
# # A bridge from a multilingual encoder to an LLM
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxfusion/jaxfusion/blob/main/notebooks/bridge_colab_tpu.ipynb)
#
# **What it does.** Trains a small part between frozen mT5 and a frozen English LLM on English rows
# alone (LangBridge's last layer, and a fusion of all layers), scores the languages that you choose
# beside the bare LLM, shows which layers the fusion takes, and writes a directory to upload.
#
# **What it needs.** A TPU or a GPU with 8 GB or more: in Colab *Runtime > Change runtime type*.
# A T4 has no bfloat16 arithmetic: weights are kept in it, products go by way of float32 and are
# slower. About 10 GB of disk.
#
# **How long it takes.** On two CPU cores in pocket mode (`POCKET=1`) a minute and a half. On an
# accelerator it depends on the models, on `TRAIN_ROWS` and on `TEST_ROWS`; the training cell
# prints the time left. It is safe to close: run all cells again, and it goes on where it stood.
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

WORK = work_folder("bridge", POCKET)

# %% [markdown]
# ## What to train on, and what to score
#
# `TASK` is any of [`docs/data.md`](https://github.com/jaxfusion/jaxfusion/blob/main/docs/data.md).
# **Rows of your own**: put `train-en.jsonl`, `dev-en.jsonl` and `test-LANGUAGE.jsonl` into a
# directory, with the columns of the task (of XNLI `premise`, `hypothesis` and `label`), and give
# its path as `DATA`. Another choice needs another folder: change the name in the cell above.

# %%
TASK, DATA = "xnli", None
LANGUAGES = ("en", "sw", "ur", "hi", "th")  # () is all of the task
FUSIONS = ("last", "transformer_softmax")  # the first is what the others are compared with
TRAIN_ROWS, DEV_ROWS, TEST_ROWS = 50_000, 300, 500
BATCH, STEPS, CHECKPOINT_EVERY = 16, 3000, 250
TOKENS = (64, 96, 128)  # lengths that get compiled; longer rows are cut, counted and reported
RATES = {"projector": 3e-5, "fusion": 3e-5}
WARM_START = False
WANTED = None  # or an encoder and an LLM of your own choice: ("google/mt5-xl", "Qwen/…")

if POCKET:
    TASK, DATA, LANGUAGES = "pocket_nli", "made:pocket", ("en", "latn_a", "ethi", "thaa")
    TRAIN_ROWS, DEV_ROWS, TEST_ROWS = 2000, 48, 96
    BATCH, STEPS, CHECKPOINT_EVERY = 32, 40, 40
    TOKENS = (48,)
    RATES, WARM_START = {"projector": 1e-4, "fusion": 1e-3}, True

# %% [markdown]
# ## The models
#
# The largest pair that fits the memory found. mT5 lies on the hub as pickles, which are not loaded:
# they are converted to safetensors once.

# %%
from jaxfusion.notebook import BRIDGES, converted, pick_models, pocket_model

if POCKET:
    ENCODER, LLM = pocket_model("encoder"), pocket_model("decoder")
else:
    ENCODER, LLM = pick_models(device, BRIDGES, WANTED)
    ENCODER = converted(ENCODER)

# %% [markdown]
# ## The run
#
# All fields and their meanings:
# [`fields.py`](https://github.com/jaxfusion/jaxfusion/blob/main/jaxfusion/fields.py).

# %%
from jaxfusion.config import default_config, from_config_dict

config = default_config("compare")
no_weights = {"optimizer": {"groups": {"fusion": None}}}  # of its own, that would train
config.variants = tuple(
    {"name": name, "fusion": {"name": name}, **(no_weights if name == "last" else {})}
    for name in FUSIONS)
config.rows = TEST_ROWS
base = config.base
base.encoder.checkpoint, base.decoder.checkpoint = ENCODER, LLM
if not POCKET:
    base.encoder.dtype = base.decoder.dtype = "bfloat16"
    base.encoder.remat = base.decoder.remat = "full"
base.data.task, base.data.train_rows, base.data.dev_rows = TASK, TRAIN_ROWS, DEV_ROWS
if DATA:
    base.data.path = DATA
base.data.buckets, base.data.max_encoder_tokens = TOKENS, max(TOKENS)
base.data.max_decoder_tokens = 16
base.eval.languages = LANGUAGES
base.eval.batch_size, base.eval.max_new_tokens = 48, 4 if POCKET else 8
base.eval.max_encoder_tokens = 64 if POCKET else 256
base.projector.name = "ffn"
base.projector.warm_start = WARM_START
base.train.batch_size, base.train.steps = BATCH, STEPS
base.train.log_every = STEPS // 3 if POCKET else 50
base.train.eval_every = base.train.checkpoint_every = CHECKPOINT_EVERY
base.optimizer.groups = {
    part: {"patterns": (f"{part}/.*",), "learning_rate": rate, "weight_decay": 0.0}
    for part, rate in RATES.items()
}

# %% [markdown]
# ## Train and score
#
# The long cell. Each fusion is trained and scored in turn, then the bare LLM. Started again, it
# goes on from the last checkpoint.

# %%
from dataclasses import replace

from jaxfusion.bridge.compare import compare
from jaxfusion.miniatures.inputs import make_inputs

run = from_config_dict(config)
comparison = compare(replace(run, base=make_inputs(run.base)), WORK)

# %% [markdown]
# ## The table for your paper
#
# Accuracy in % with 95% intervals. The same lies in the folder as `report.md`, with tests of
# significance and examples as `report.html` (one file, to keep or send), and as `table.tex`.

# %%
import pandas as pd
from IPython.display import Image, Markdown, display

from jaxfusion.reports.comparison import markdown, table

header, *rows = table(comparison)
latex = pd.DataFrame(rows, columns=header).to_latex(index=False, escape=True)
(WORK / "table.tex").write_text(latex, "utf-8")
display(Markdown(markdown(comparison)))
display(Image(WORK / "accuracy.png"))

# %% [markdown]
# ## Which layers the fusion takes

# %%
display(Image(WORK / "layers.png")) if comparison.layer_weights else print("none has weights")

# %% [markdown]
# ## A directory in Hugging Face format
#
# With both backbones inside; plain PyTorch loads it, and its `README.md` is a model card with the
# scores.

# %%
from pathlib import Path

from jaxfusion.runs.export.bridge import export

CHOSEN = FUSIONS[-1]
EXPORTED = Path("exported_bridge")
export(WORK / CHOSEN, EXPORTED, merge=True, overwrite=True)
for file in sorted(EXPORTED.rglob("*.*")):
    print(f"{file.stat().st_size / 2**20:10.2f} MiB  {file}")

# %% [markdown]
# ## To the hub
#
# Off until you name a place. Mind the licences of the two backbones.

# %%
PUSH_TO = None  # "your-name/your-bridge"
if PUSH_TO:
    from huggingface_hub import HfApi

    HfApi().create_repo(PUSH_TO, private=True, exist_ok=True)
    HfApi().upload_folder(repo_id=PUSH_TO, folder_path=EXPORTED)
else:
    print(f"nothing is uploaded; {EXPORTED} is ready")
