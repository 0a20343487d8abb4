"""Bridges from multilingual encoders into English-centric LLMs, and Lens, in JAX.

    from pathlib import Path
    import jaxfusion

    config = jaxfusion.default_config()               # every field: jaxfusion/fields.py
    config.data.path, config.fusion.name = "my_rows", "global_softmax"
    jaxfusion.train(jaxfusion.from_config_dict(config), Path("runs/mine"))
    jaxfusion.evaluate(Path("runs/mine"), languages=("si", "ta"))
    jaxfusion.export(Path("runs/mine"), Path("exported"), merge=True)

`open_run` opens a trained bridge for experiments. Modules that need jax are imported on first use.
"""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "default_config": "jaxfusion.config", "from_config_dict": "jaxfusion.config",
    "train": "jaxfusion.bridge.job", "evaluate": "jaxfusion.runs.score",
    "open_run": "jaxfusion.runs.open_run", "export": "jaxfusion.runs.export.bridge",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'jaxfusion' has no attribute '{name}'")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
