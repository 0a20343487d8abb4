"""What config files share: the words behind a file's name, as in `--config configs/NAME.py:word`.

    python train.py --config configs/xnli_paper.py:last,debug

`debug` shrinks any run to a size that a CPU does in a minute, on checkpoints and rows made for it.
A bridge also takes the name of a fusion, and `compare`, which makes a comparison of the papers'
three fusions out of it. A file may have words of its own.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from jaxfusion.config import default_config
from jaxfusion.errors import choose
from jaxfusion.fields import FUSIONS

TINY_LAYERS = 4  # of the encoder that debug sizes have
# Changes a config in its place, or gives another one.
Word = Callable[[ConfigDict], ConfigDict | None]


def finish(config: ConfigDict, arg: str | None, words: dict[str, Word] | None = None) -> ConfigDict:
    """The locked config after the words of its argument, which a comma separates.

    Args:
      words: the file's own, besides those of its job.

    Raises:
      InputError: an unknown word.
    """
    words = words or {}
    known = {**OF_JOB[config.job], **words}
    chosen = [choose("config argument", word, known) for word in (arg.split(",") if arg else [])]
    own = [word for word in words if word != "compare"]
    for word in sorted(chosen, key=[*own, *FUSIONS, "compare", "debug"].index):
        # A word may make a comparison of the config, which has a debug size of its own.
        config = {**OF_JOB[config.job], **words}[word](config) or config
    return config.lock()


def set_fusion(name: str) -> Word:
    """A word that sets the fusion."""
    def change(config: ConfigDict) -> None:
        config.fusion.name = name

    return change


def compare(base: ConfigDict) -> ConfigDict:
    """The papers' three fusions under one config."""
    config = default_config("compare")
    config.base = base
    config.variants = tuple(
        {"name": name, "fusion": {"name": name}}
        for name in ("last", "global_softmax", "transformer_softmax")
    )
    return config


def debug_bridge(config: ConfigDict) -> None:
    """A bridge between two tiny towers."""
    config.encoder.checkpoint = config.decoder.checkpoint = "made:tiny"
    config.encoder.dtype = config.decoder.dtype = "float32"
    config.data.path = "made:rows"
    config.data.train_rows = config.data.dev_rows = None
    config.data.balanced = config.data.streaming = False
    config.data.revision = config.data.dev_patience = None
    config.data.dev_languages, config.data.dev_decides = (), "mean"
    config.data.max_encoder_tokens = config.eval.max_encoder_tokens = 128
    config.data.buckets = (128,)
    config.data.max_decoder_tokens = config.eval.max_decoder_tokens = 128
    config.fusion.d_ff, config.fusion.layer = 64, min(config.fusion.layer, TINY_LAYERS)
    config.train.batch_size = config.eval.batch_size = 8
    config.train.accumulate = 1
    for group in config.optimizer.groups.values():
        group.learning_rate = 1e-2
    config.train.steps = 200
    config.train.log_every = 20
    config.train.eval_every = config.train.checkpoint_every = 100
    config.eval.tasks = config.eval.languages = ()
    if config.first:
        config.first = debug_stage(config.first)


def debug_stage(first: Mapping) -> dict[str, Any]:
    """A few steps of a first stage on rows made for it."""
    data = first["data"]
    kept = {name: data[name] for name in ("task", "language", "text_prompt") if name in data}
    return {"data": {**kept, "path": "made:rows"}, "train": {"steps": 20}}


def debug_comparison(config: ConfigDict) -> None:
    """Bridges between two tiny towers, which are trained one after the other."""
    debug_bridge(config.base)
    config.base.train.steps = 40
    config.base.train.eval_every = config.base.train.checkpoint_every = 20
    config.rows = 12
    config.variants = tuple(debug_variant(variant) for variant in config.variants)


def debug_variant(variant: Mapping) -> dict[str, Any]:
    """A variant with a layer that the tiny encoder has, and a debug size of its first stage."""
    changed = dict(variant)
    if changed.get("fusion", {}).get("layer"):
        fusion = changed["fusion"]
        changed["fusion"] = {**fusion, "layer": min(fusion["layer"], TINY_LAYERS)}
    if changed.get("first"):
        changed["first"] = debug_stage(changed["first"])
    return changed


def debug_pretraining(config: ConfigDict) -> None:
    """A tower of a few thousand parameters on a hundredth of the pocket world's text."""
    config.data.path, config.data.pivot = "made:pocket_debug", "en"
    config.data.languages = ("en",) if config.data.languages else ()
    config.data.buckets = (config.data.max_tokens,)
    config.data.dev_rows = 16
    config.tower.d_model = config.tower.d_ff = 32
    config.tower.num_layers = config.tower.num_heads = 2
    config.tower.head_dim = 16
    config.train.batch_size = 8
    config.train.steps = 20
    config.train.log_every = config.train.eval_every = config.train.checkpoint_every = 10


def debug_lens(config: ConfigDict) -> None:
    """A tiny LLM on rows of the pocket world."""
    config.decoder.checkpoint = "made:tiny"
    config.decoder.dtype = "float32"
    config.data.path, config.data.probe_path = "made:pocket_debug", None
    config.data.central, config.data.targets = "en", ("latn_a", "deva")
    config.data.chat_template = False
    config.data.columns = ConfigDict()
    config.data.probe_rows = config.data.rows = 40
    config.data.perplexity_rows = config.data.reply_rows = 0
    config.data.max_tokens, config.data.buckets = 128, (128,)
    config.lens.blocks, config.lens.recipe = 1, "default"
    config.lens.loss_layers = config.lens.layers = ()
    config.train.batch_size = config.eval.batch_size = 8
    config.train.steps, config.train.log_every = 5, 1
    config.train.eval_every = config.train.checkpoint_every = 5
    config.eval.tasks, config.data.task_rows = ("pocket_nli",), 12
    config.data.task_path, config.data.answer = "made:pocket_debug", "answer"
    config.eval.languages = ()


OF_JOB: dict[str, dict[str, Word]] = {
    "bridge": {**{name: set_fusion(name) for name in FUSIONS}, "debug": debug_bridge,
               "compare": compare},
    "compare": {"debug": debug_comparison},
    "pretrain": {"debug": debug_pretraining},
    "lens": {"debug": debug_lens},
}
