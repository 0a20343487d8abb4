"""The pocket world's towers from nothing at a tenth of the text, and the kept ones."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import FILES, get_config

from jaxfusion.config import from_config_dict, from_json
from jaxfusion.data.pocket.lexicon import VERSION
from jaxfusion.miniatures.inputs import make_inputs
from jaxfusion.pretraining.job import pretrain

CONFIGS = {file.stem: file for file in FILES}
KEPT = Path(__file__).parent.parent / "pocket"


@pytest.mark.slow
@pytest.mark.parametrize("role,steps,least", [("encoder", 300, 0.25), ("decoder", 400, 0.3)])
def test_a_tenth_of_the_world_is_learned_from_nothing(role, steps, least, cache_dir, tmp_path):
    """The encoder restores words far above chance (1 in thousands), also in switched text; the
    decoder answers more than it could by the most frequent labels (a quarter)."""
    config = get_config(CONFIGS[f"pocket_{role}"]).unlock()
    config.data.path = "made:pocket_tenth"
    config.train.steps = config.train.eval_every = steps
    config = make_inputs(from_config_dict(config))
    pretrain(config, tmp_path / "run")
    about = json.loads((tmp_path / "run" / "hf" / "pretraining.json").read_text())
    assert about["dev"]["accuracy"] > least


@pytest.mark.parametrize("kept,role,arg", [
    ("encoder", "encoder", None), ("decoder", "decoder", "noise"),
    ("lens_decoder", "decoder", "lens"),
])
def test_the_kept_towers_are_of_this_world_and_config(kept, role, arg):
    about = json.loads((KEPT / kept / "pretraining.json").read_text())
    assert about["world"] == {"version": VERSION, "seed": 0, "scale": 1.0}
    config = from_config_dict(get_config(CONFIGS[f"pocket_{role}"], arg))
    kept = from_json(about["config"])
    assert replace(kept, data=replace(kept.data, path=config.data.path)) == config
    assert 0.5 < about["dev"]["accuracy"] < 1


def test_the_kept_towers_are_small():
    size = sum(file.stat().st_size for file in KEPT.rglob("*") if file.is_file())
    assert size < 20e6
