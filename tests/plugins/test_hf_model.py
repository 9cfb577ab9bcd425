from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from psyche_lightning.errors import ConfigError
from psyche_lightning.plugins import Plugins

TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def hf(config: dict[str, Any]) -> Any:
    return Plugins(only=[]).models()["hf"](config)


def test_a_model_by_configuration_trains_saves_and_loads_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = hf(TINY)
    ids = torch.randint(64, (2, 8))
    result = model(input_ids=ids, labels=ids)
    assert result.loss.shape == ()
    assert result.logits.shape == (2, 8, 64)
    result.loss.backward()
    model.save_pretrained(tmp_path)
    again = hf({"path": str(tmp_path)})
    assert again.training
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, again.get_parameter(name))


def test_the_meta_device_gives_shapes_only(tmp_path: Path) -> None:
    hf(TINY).save_pretrained(tmp_path)
    with torch.device("meta"):
        by_config, by_path = hf({**TINY, "vocab_size": 10**9}), hf({"path": str(tmp_path)})
    for model in (by_config, by_path):
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert sum(parameter.numel() for parameter in by_config.parameters()) > 16 * 10**9


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "got neither"),
        ({"model_type": "llama", "path": "x"}, "got both"),
        ({"model_type": "lama"}, "Did you mean 'llama'"),
        ({"model_type": "llama", "hiden_size": 3}, "Did you mean 'hidden_size'"),
        ({"path": "nowhere"}, r"'nowhere'.*no config\.json"),
        ({**TINY, "num_attention_heads": 3}, "'llama'"),
    ],
)
def test_wrong_configurations_are_explained(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        hf(config)
