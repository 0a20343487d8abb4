r"""A task of one's own, declared here: complaints and the department that they go to.

    python train.py --config configs/own_task.py \
        --config.tasks.complaints.source='PATH/TO/{split}-{language}.csv'
    python eval.py --workdir runs/own_task --languages si,ta

Needs: what configs/xnli_paper.py needs, and the rows: train-en.csv, dev-en.csv and a test file for
each language to be scored, with a header and the columns `text` and `department`:

    text,department
    "They sent me two bills, again.",billing

All that a task may say is in `TaskConfig` of jaxfusion/fields.py; where rows may be and what is
checked in docs/data.md.

Published: nothing, as the rows are yours.
"""

from configs.common import finish
from jaxfusion.config import default_config


def get_config(arg=None):
    config = default_config()
    config.tasks = {"complaints": {
        "prompt": "Complaint: {text} Department: ",
        "labels": ("billing", "delivery", "returns"),
        "languages": ("en", "si", "ta"),
        "source": "data/complaints/{split}-{language}.csv",
        "columns": {"label": "department"},
    }}
    config.data.task = "complaints"
    config.train.eval_every = config.train.checkpoint_every = 200
    return finish(config, arg)
