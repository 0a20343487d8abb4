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
# # Lens: the languages inside an LLM, seen and moved
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxfusion/jaxfusion/blob/main/notebooks/lens_colab_tpu.ipynb)
#
# **What it does.** Reads sentences that mean the same in several languages through an LLM, shows
# where in its states the languages lie, trains the top blocks so that they meet English in what all
# share and stay apart in what is their own (Lens,
# [2410.04407](https://arxiv.org/abs/2410.04407)), compares that with steering and with the LLM as
# it was, and writes an ordinary LLM to upload. No labels, no encoder.
#
# **What it needs.** A TPU or a GPU with 8 GB or more: in Colab *Runtime > Change runtime type*.
# A T4 has no bfloat16 arithmetic: weights are kept in it, products go by way of float32 and are
# slower. About 10 GB of disk.
#
# **How long it takes.** On two CPU cores in pocket mode (`POCKET=1`) about half a minute. On an
# accelerator it depends on the LLM and the number of rows. It is safe to close: run all cells
# again, and it goes on with what is there.
#
# Only the pocket mode of this notebook is run by this project's tests; no free Colab runtime is.
# On the pocket LLM the languages move, and no score follows; why is in
# [`docs/results.md`](https://github.com/jaxfusion/jaxfusion/blob/main/docs/results.md).

# %%
import os

REPOSITORY = "https://github.com/jaxfusion/jaxfusion"
POCKET = os.environ.get("POCKET") == "1"  # a miniature, for a CPU
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

WORK = work_folder("lens", POCKET)

# %% [markdown]
# ## The languages, and sentences in them
#
# Any text files do, the same line meaning the same in each, or one table with a column for each
# language. Here it is NTREX-128 (CC BY-SA 4.0), news in 128 languages. `TASK` is what every method
# is scored on; `TEXT_ROWS` sentences that were not trained on tell its perplexity. Another choice
# needs another folder: change the name in the cell above.

# %%
CENTRAL, TARGETS = "en", ("sw", "ta", "zh")
SENTENCES = "NTREX/NTREX-128/newstest2019-{language}.txt"
COLUMNS = {"en": "src.eng", "sw": "ref.swa", "ta": "ref.tam", "zh": "ref.zho-CN"}
TASK, TASK_PATH = "xcopa", None
PROBE_ROWS, TRAIN_ROWS, TEXT_ROWS, TASK_ROWS = 1000, 400, 200, 500
BATCH, STEPS, BLOCKS, RATE = 8, 100, 2, 1e-5
WANTED = None  # or an LLM of your own choice: "meta-llama/Llama-3.2-1B-Instruct"

if POCKET:
    TARGETS, SENTENCES, COLUMNS = ("latn_a", "deva"), "made:pocket", {}
    TASK, TASK_PATH = "pocket_nli", "made:pocket"
    PROBE_ROWS, TRAIN_ROWS, TEXT_ROWS, TASK_ROWS = 96, 96, 48, 96
    STEPS, RATE = 40, 1e-4
elif not os.path.isdir("NTREX"):
    get_ipython().system("git clone -q --depth 1 https://github.com/MicrosoftTranslator/NTREX")

# %% [markdown]
# ## The LLM
#
# The largest that fits the memory found.

# %%
from jaxfusion.notebook import LLMS, pick_models, pocket_model

if POCKET:
    LLM = pocket_model("lens_decoder")
else:
    _, LLM = pick_models(device, LLMS, WANTED and (None, WANTED))

# %% [markdown]
# ## The run
#
# All fields and their meanings:
# [`docs/lens.md`](https://github.com/jaxfusion/jaxfusion/blob/main/docs/lens.md).

# %%
from jaxfusion.config import default_config, from_config_dict
from jaxfusion.lens.job import lens
from jaxfusion.miniatures.inputs import make_inputs

config = default_config("lens")
config.decoder.checkpoint = LLM
if not POCKET:
    config.decoder.dtype = "bfloat16"
data = config.data
data.path, data.columns, data.central, data.targets = SENTENCES, COLUMNS, CENTRAL, TARGETS
data.chat_template = False
data.probe_rows, data.rows = PROBE_ROWS, TRAIN_ROWS
data.max_tokens, data.buckets = (64, (64,)) if POCKET else (128, (64, 128))
config.lens.blocks = BLOCKS
config.train.batch_size, config.train.steps = BATCH, STEPS
config.train.log_every = config.train.checkpoint_every = STEPS // 2
config.train.eval_every = STEPS
config.eval.batch_size = 48 if POCKET else 16
for group in config.optimizer.groups.values():
    group.learning_rate = RATE

# %% [markdown]
# ## Probe: where the languages lie
#
# Left, the languages in the plane of the two directions in which they differ most in the last
# layer, English at the origin. Right, how much they differ in each layer: the singular values of
# the languages' means.

# %%
from IPython.display import Image, Markdown, display

config.lens.method = "none"
lens(make_inputs(from_config_dict(config)), WORK / "probe")
display(Image(WORK / "probe" / "languages.png"))

# %% [markdown]
# ## Move them, and compare
#
# The long cell: the LLM as it was, steering (adds each language's displacement in the middle
# layers, trains nothing), and Lens. Started again, it goes on with what is there.

# %%
config.lens.method = "lens"
config.data.probe = str(WORK / "probe" / "probe.safetensors")
config.data.perplexity_rows = TEXT_ROWS
config.data.task_path, config.data.task_rows, config.eval.tasks = TASK_PATH, TASK_ROWS, (TASK,)
config.eval.max_new_tokens = 1 if POCKET else 4
config.sweep = (
    {"name": "steering", "lens": {"method": "steering"}},
    {"name": "Lens"},
)
comparison = lens(make_inputs(from_config_dict(config)), WORK / "moved")

# %% [markdown]
# ## The tables for your paper
#
# Accuracy in % with 95% intervals, and perplexity. The folder has them as `report.json` and
# `table.tex`, and `report.html` with what is sure of them and every changed answer. The languages'
# picture has them before and after.

# %%
import json

import pandas as pd

from jaxfusion.reports.comparison import table

header, *rows = table(comparison)
latex = pd.DataFrame(rows, columns=header).to_latex(index=False, escape=True)
(WORK / "table.tex").write_text(latex, "utf-8")
display(Markdown(json.loads((WORK / "moved" / "report.json").read_text("utf-8"))["table"]))
display(Image(WORK / "moved" / "accuracy.png"), Image(WORK / "moved" / "languages.png"))

# %% [markdown]
# ## A directory in Hugging Face format
#
# An ordinary checkpoint of the LLM's family, with a model card; nothing of this project is needed
# to load it.

# %%
from pathlib import Path

from jaxfusion.runs.export.tower import export_lens

EXPORTED = Path("exported_lens")
export_lens(WORK / "moved" / "Lens", EXPORTED, overwrite=True)
for file in sorted(EXPORTED.iterdir()):
    print(f"{file.stat().st_size / 2**20:10.2f} MiB  {file}")

# %% [markdown]
# ## To the hub
#
# Off until you name a place. Mind the licence of the LLM.

# %%
PUSH_TO = None  # "your-name/your-llm"
if PUSH_TO:
    from huggingface_hub import HfApi

    HfApi().create_repo(PUSH_TO, private=True, exist_ok=True)
    HfApi().upload_folder(repo_id=PUSH_TO, folder_path=EXPORTED)
else:
    print(f"nothing is uploaded; {EXPORTED} is ready")
