"""The plugin as the host loads it, and its factory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from psyche_lightning_mla import MLAForCausalLM
from psyche_lightning_mla.plugin import build

from psyche_lightning.errors import ConfigError
from psyche_lightning.plugins import Plugins

TINY: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize("name", ["mla", "psyche_mla"])
def test_the_host_finds_the_model(name: str) -> None:
    plugins = Plugins(only=["psyche-lightning-mla"])
    assert not plugins.failures
    assert plugins.models().registrations[name].distribution == "psyche-lightning-mla"
    model = plugins.models()[name](TINY)
    assert isinstance(model, MLAForCausalLM)
    assert model.training
    assert model.config.hidden_size == 32


def test_loading_the_plugin_imports_nothing_heavy() -> None:
    script = (
        "import sys, psyche_lightning_mla.plugin; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_a_checkpoint_loads_in_a_fresh_process_after_the_factory_ran(tmp_path: Path) -> None:
    build(TINY).save_pretrained(tmp_path)
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM as Auto\n"
        "from psyche_lightning_mla.plugin import build\n"
        "with torch.device('meta'): build({})\n"
        "print(type(Auto.from_pretrained(sys.argv[1], local_files_only=True)).__name__)"
    )
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, capture_output=True, text=True)
    assert run.stdout.split()[-1] == "MLAForCausalLM"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hiden_size": 32}, "Did you mean 'hidden_size'"),
        ({"experts": 8}, "Options: attention_bias, .*vocab_size"),
        ({"hidden_size": "big"}, "'hidden_size' expected int"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, expected a positive"),
        ({"q_lora_rank": -1}, "q_lora_rank is -1, expected a positive"),
        ({"n_routed_experts": -1}, "n_routed_experts is -1, expected 0 or a positive"),
        ({"n_routed_experts": 4, "num_hidden_layers": 1}, "no layer is left for the experts"),
        ({"n_routed_experts": 6, "n_group": 4}, "n_group is 4, expected a divisor of n_routed_experts, which is 6"),
        ({"n_routed_experts": 4, "topk_group": 2}, "topk_group is 2, expected at most n_group"),
        ({"n_routed_experts": 8, "num_experts_per_tok": 5, "n_group": 2}, "expected at most 4"),
        ({"qk_rope_head_dim": 7}, "expected an even number"),
        ({"pad_token_id": 256}, "below vocab_size"),
        ({"rope_theta": "far"}, "far"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "expected one of default, linear, llama3, yarn"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "factor"),
        ({"gradient_checkpointing": 1}, "expected true or false"),
        ({"path": "no/such/folder"}, "'no/such/folder' is not a folder in Hugging Face format"),
        ({"path": ".", "hidden_size": 32}, "remove the options hidden_size"),
    ],
)
def test_wrong_options_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(config)


def test_the_given_configuration_is_left_alone() -> None:
    config = {**TINY, "rope_parameters": {"rope_type": "linear", "factor": 2.0}}
    build(config)
    assert config["rope_parameters"] == {"rope_type": "linear", "factor": 2.0}


def test_rope_theta_and_gradient_checkpointing() -> None:
    model = build({**TINY, "rope_theta": 500, "gradient_checkpointing": True})
    assert model.config.rope_parameters == {"rope_type": "default", "rope_theta": 500.0}
    assert model.is_activation_checkpointing


def test_path_loads_a_checkpoint_and_refuses_others(tmp_path: Path) -> None:
    saved = build(TINY)
    saved.save_pretrained(tmp_path)
    loaded = build({"path": str(tmp_path), "gradient_checkpointing": True})
    assert loaded.training
    for name, value in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    with torch.device("meta"):
        assert all(p.is_meta for p in build({"path": str(tmp_path)}).parameters())

    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace("psyche_mla", "llama"))
    with pytest.raises(ConfigError, match="has the model type 'llama', expected 'psyche_mla' or 'deepseek_v3'"):
        build({"path": str(tmp_path)})
