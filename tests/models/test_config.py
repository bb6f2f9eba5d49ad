import json
from pathlib import Path

import pytest
import torch

from lowvram_models.config import DiTConfig
from lowvram_models.dit import CausalDiT

GOLDEN = Path(__file__).parents[1] / "golden"


def published() -> dict:
    return json.loads((GOLDEN / "dit_14b_config.json").read_text())


def test_names_and_shapes_of_the_real_model():
    with torch.device("meta"):
        dit = CausalDiT(DiTConfig.from_dict(published()))
    shapes = {name: list(tensor.shape) for name, tensor in dit.state_dict().items()}
    assert shapes == json.loads((GOLDEN / "dit_14b_manifest.json").read_text())


def test_absent_fields_take_the_published_values():
    config = DiTConfig.from_dict(published())
    assert (config.text_dim, config.head_dim, config.audio_inject_layers[-1]) == (4096, 128, 39)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 3}, "unknown fields"),
        ({"enable_framepack": False}, "only True is implemented"),
        ({"num_heads": 39}, "num_heads times"),
        ({"audio_inject_layers": [0, 40]}, "from 0 to 39"),
        ({"dim": "5120"}, "not a usable value"),
        ({"num_layers": 0}, "not a usable value"),
    ],
)
def test_what_is_not_implemented_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DiTConfig.from_dict(published() | change)


def test_a_missing_field_is_named():
    values = published()
    del values["ffn_dim"]
    with pytest.raises(ValueError, match="ffn_dim"):
        DiTConfig.from_dict(values)
