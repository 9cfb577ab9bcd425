"""Models by their names on the Hub: the real code of transformers and the Hub's client, against a server here."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.hub import LocalHub

from psyche_lightning.builtin.models import hf
from psyche_lightning.errors import ConfigError


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same(first: Any, second: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def changed(files: Mapping[str, bytes], **fields: Any) -> dict[str, bytes]:
    return {**files, "config.json": json.dumps(json.loads(files["config.json"]) | fields).encode()}


@pytest.fixture
def files(saved: Path) -> dict[str, bytes]:
    return content(saved)


def test_a_model_comes_from_the_hub_and_then_from_its_cache(
    hub: LocalHub, files: dict[str, bytes], model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("me/model", files)
    found = hf({"path": "me/model"})
    assert found.training
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    assert same(found, model)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert same(hf({"path": "me/model"}), model)
    assert hub.requests == []


def test_a_revision_names_parameters_for_good(hub: LocalHub, files: dict[str, bytes], model: Any) -> None:
    repository = hub.add("me/model", files)
    first = next(iter(repository.commits))
    other = bytearray(files["model.safetensors"])
    other[-1] ^= 1
    repository.commit({**files, "model.safetensors": bytes(other)}, "second")
    assert same(hf({"path": f"me/model@{first}"}), model)
    assert not same(hf({"path": "me/model@main"}), model)


def test_shapes_and_fresh_parameters_need_only_the_configuration(
    hub: LocalHub, files: dict[str, bytes], model: Any
) -> None:
    hub.add("me/model", files)
    with torch.device("meta"):
        shapes = hf({"path": "me/model"})
    assert [p.shape for p in shapes.parameters()] == [p.shape for p in model.parameters()]
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(hf({"path": "me/model", "fresh": True, "num_hidden_layers": 2}))
    assert len(drawn[0].model.layers) == 2  # type: ignore[operator, arg-type]
    assert same(drawn[0], drawn[1])
    assert not same(drawn[0], drawn[2])
    assert not any("safetensors" in request for request in hub.requests)


def test_each_wrong_name_has_its_own_message(
    hub: LocalHub, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("me/model", files)
    hub.add("me/gated", files, gated=True)
    own = changed(files, auto_map={"AutoConfig": "own.Own"}, model_type="own")
    hub.add("me/own", {**own, "own.py": b"raise SystemExit"})
    for name, message in {
        "me/nothing": "the Hub has no such model, or your user may not see it: check the name",
        "me/model@other": "the Hub has the model, but not this revision",
        "me/gated": "it is gated: ask for access on its page",
        "me/own": "it has code of its own, which nobody has checked",
        str(tmp_path): "is not a folder in Hugging Face format",
        "a/b/c": "nor a name on the Hub",
        "me/model@": "nor a name on the Hub",
        "../model": "nor a name on the Hub",
    }.items():
        with pytest.raises(ConfigError, match=message):
            hf({"path": name})
    with pytest.raises(ConfigError, match=r"has no field 'hiden_size'\. Did you mean 'hidden_size'"):
        hf({"path": "me/model", "hiden_size": 3})
    with pytest.raises(ConfigError, match="trust_remote_code of the model 'hf' is 'yes'; expected true or false"):
        hf({"path": "me/model", "trust_remote_code": "yes"})
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        hf({"path": "me/another"})


def test_no_server_at_the_hubs_address(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:1/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client tries again several times
    with pytest.raises(ConfigError, match="the Hub's cache does not have it, and the Hub cannot be reached"):
        hf({"path": "me/model"})


OWN = """
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

class OwnConfig(PretrainedConfig):
    model_type = "own"
    vocab_size = 256

class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        self.table = torch.nn.Embedding(config.vocab_size, config.vocab_size)
        self.post_init()
    def forward(self, input_ids, labels=None):
        logits = self.table(input_ids)
        return CausalLMOutput(loss=None if labels is None else logits.mean(), logits=logits)
"""


def test_a_models_own_code_runs_only_if_the_recipe_allows_it(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}}
    hub.add("me/own", {"config.json": json.dumps(config).encode(), "own.py": OWN.encode()})
    with pytest.raises(ConfigError, match=r"if you trust it, set model\.config\.trust_remote_code=true"):
        hf({"path": "me/own", "fresh": True})
    model = hf({"path": "me/own", "fresh": True, "trust_remote_code": True})
    assert type(model).__name__ == "OwnModel"
    assert "table.weight" in dict(model.named_parameters())


@pytest.mark.slow
def test_psyche_train_takes_one_and_saves_to_the_hub(hub: LocalHub, files: dict[str, bytes], tmp_path: Path) -> None:
    """The command in a process of its own, with nothing replaced in it: only its environment says where the Hub is."""
    hub.add("me/model", files)
    run = hub.add("me/run")
    text = tmp_path / "text"
    text.mkdir()
    (text / "all.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    (tmp_path / "recipe.yaml").write_text(
        "run: {total_steps: 2, global_batch_size_start: 2, global_batch_size_end: 2}\n"
        "model: {name: hf, path: me/model@main}\n"
        f"data: {{name: text, seq_len: 16, config: {{path: {text}}}}}\n"
        "trainer: {accelerator: cpu, threads: 1}\n"
        "checkpoint: {to: 'hf://me/run/out', every: 1}\n"
    )
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, "-m", "psyche_lightning", "train", str(tmp_path / "recipe.yaml"), "node.directory=node"]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "node" / "result.json").read_text())
    manifest = json.loads(run.files["out/step-000002/manifest.json"])
    assert manifest["digest"] == result["digest"]
    weights = run.files["out/step-000002/model.safetensors"]
    assert manifest["files"]["model.safetensors"]["sha256"] == hashlib.sha256(weights).hexdigest()
    assert weights != files["model.safetensors"]


def test_a_tokenizer_that_does_not_fit_the_model(hub: LocalHub, files: dict[str, bytes], tmp_path: Path) -> None:
    """The data's vocabulary is compared with the model's before anything is trained."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from psyche_lightning.recipe import resolve
    from psyche_lightning.train.runner import train_recipe

    hub.add("me/model", files)
    (tmp_path / "a.txt").write_text("w1 w2 w3 " * 2000)
    words = Tokenizer(models.WordLevel({f"w{n}": n for n in range(300)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(str(tmp_path / "words"))
    recipe = {
        "name": "x",
        "model": {"path": "me/model"},
        "data": {"seq_len": 8, "config": {"path": str(tmp_path / "a.txt"), "tokenizer": str(tmp_path / "words")}},
    }
    with pytest.raises(ConfigError, match="the data has 300 token ids and the model has 256"):
        train_recipe(resolve(recipe), directory=tmp_path / "node")
