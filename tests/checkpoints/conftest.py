"""Small models and checkpoints of them, made once, and a writer that tells what it says."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from huggingface_hub import HfFileSystem
from support.hub import LocalHub

from psyche_lightning.checkpoints.manifest import NAME, Metadata, describe, folder_name
from psyche_lightning.checkpoints.model import ModelCopy

RECIPE = "ab" * 32


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Gives what the log had since it was asked last, but for what was written."""
    caplog.set_level(logging.INFO, "psyche_lightning")

    def take() -> list[str]:
        lines = [message for message in caplog.messages if not message.startswith("wrote ")]
        caplog.clear()
        return lines

    return take


@pytest.fixture
def quiet(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Nothing is wrong, unless a test looks at what is said."""
    yield
    if "said" not in request.fixturenames:
        assert not [
            record
            for record in caplog.get_records("call")
            if record.name.startswith("psyche_lightning.checkpoints") and record.levelno > logging.INFO
        ]


def metadata(step: int, run: str = "run") -> Metadata:
    return Metadata(run, step, 1, 10 * step, RECIPE)


@pytest.fixture(scope="session")
def model() -> Any:
    """A Llama of some thousand parameters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "llama", vocab_size=256, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="session")
def saved(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with the tokenizer of bytes, in Hugging Face format and without a manifest."""
    from psyche_lightning.data.tokenizer import byte_tokenizer

    folder = tmp_path_factory.mktemp("saved") / "model"
    ModelCopy(model).save(folder)
    byte_tokenizer().save_pretrained(str(folder))
    return folder


Make = Callable[[Path, int], Path]


@pytest.fixture
def make(saved: Path, model: Any) -> Make:
    """Puts a complete checkpoint of a step into a folder of checkpoints."""

    def put(folder: Path, step: int) -> Path:
        target = folder / folder_name(step)
        shutil.copytree(saved, target)
        manifest = describe(target, metadata(step), ModelCopy(model).digest())
        (target / NAME).write_text(manifest.text())
        return target

    return put


@pytest.fixture
def memory() -> Iterator[str]:
    """An address in the memory of this process, empty before and after."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield "memory://bucket/run"
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A Hub of this test behind a real socket, for the Hub's own client; with a fresh cache and a token."""
    from huggingface_hub import constants

    with LocalHub() as server:
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        )
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a storage of its own, which this Hub has not
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", server.token)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # it remembers its endpoint
        HfFileSystem.clear_instance_cache()
        yield server
        HfFileSystem.clear_instance_cache()
