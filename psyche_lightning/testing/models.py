"""The conformance kit of models: subclass one class, and pytest tests the contract.

Example::

    # tests/test_tiny.py
    from psyche_lightning.testing.models import ModelContract

    class TestTiny(ModelContract):
        def make_factory(self):
            return build  # as it is registered

        def make_config(self):
            return {"vocab_size": 64, "hidden_size": 16}

The kit needs pytest alone (``pip install psyche-lightning[testing]``). Choose a configuration so small that a forward
pass takes milliseconds.
"""

# ruff: noqa: D102 - the name of a test says what it shows
from __future__ import annotations

import abc
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from psyche_lightning.errors import ConfigError

IGNORED = -100
SEED = 7
BATCH, LENGTH = 3, 12

Factory = Callable[[dict[str, Any]], torch.nn.Module]


class ModelContract(abc.ABC):
    """What every model must do; subclass it as ``Test...`` and define the two methods.

    Attributes:
        tolerance: largest difference between the loss and the mean cross-entropy of the logits, in nats per token.
            Increase it for a model whose loss has further terms, such as one that balances experts.
    """

    tolerance: float = 1e-4

    @abc.abstractmethod
    def make_factory(self) -> Factory:
        """Returns the factory that the plugin registers: ``factory(config)``."""

    @abc.abstractmethod
    def make_config(self) -> dict[str, Any]:
        """Returns a valid configuration of a tiny model that takes sequences of 12 tokens."""

    # -- helpers ------------------------------------------------------------------------------------------------------

    def make(self, config: dict[str, Any] | None = None, seed: int = SEED) -> torch.nn.Module:
        """Build a model with a seed."""
        torch.manual_seed(seed)
        return self.make_factory()(self.make_config() if config is None else config)

    @pytest.fixture
    def model(self) -> torch.nn.Module:
        """The model of one test."""
        return self.make()

    @pytest.fixture
    def ids(self, model: torch.nn.Module) -> torch.Tensor:
        """Random token ids, int64 of shape [3, 12]."""
        with torch.no_grad():
            vocabulary = model(input_ids=torch.zeros(1, 2, dtype=torch.int64)).logits.shape[-1]
        return torch.randint(vocabulary, (BATCH, LENGTH), generator=torch.Generator().manual_seed(SEED))

    @staticmethod
    def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
        """The logits of a model in evaluation mode."""
        model.eval()
        with torch.no_grad():
            logits: torch.Tensor = model(input_ids=ids).logits
        return logits

    def check_loss(self, model: torch.nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> None:
        """Check that the loss is that of predicting each label from the tokens before it."""
        model.eval()
        with torch.no_grad():
            result = model(input_ids=ids, labels=labels)
        expected = torch.nn.functional.cross_entropy(
            result.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED
        )
        assert abs(float(result.loss - expected)) <= self.tolerance, (
            "the loss must be the mean cross-entropy of logits[:, :-1] and labels[:, 1:]; the model shifts the labels"
        )

    # -- properties ---------------------------------------------------------------------------------------------------

    def test_it_comes_ready_to_train(self, model: torch.nn.Module) -> None:
        assert isinstance(model, torch.nn.Module)
        assert model.training
        parameters = dict(model.named_parameters())
        assert any(parameter.requires_grad for parameter in parameters.values())
        for name, parameter in parameters.items():
            assert parameter.dtype == torch.float32, f"{name} is {parameter.dtype}; the trainer chooses the precision"
            assert parameter.device.type == "cpu"
            assert bool(parameter.isfinite().all()), f"{name} has values that are not finite: is it initialized?"

    def test_the_configuration_stays_the_caller_s(self) -> None:
        config = self.make_config()
        before = copy.deepcopy(config)
        self.make(config)
        assert config == before

    # -- forward ------------------------------------------------------------------------------------------------------

    def test_forward_gives_a_loss_and_logits(self, model: torch.nn.Module, ids: torch.Tensor) -> None:
        result = model(input_ids=ids, labels=ids)
        assert result.loss.shape == ()
        assert result.loss.dtype == torch.float32
        assert bool(result.loss.isfinite())
        assert result.logits.shape[:2] == (BATCH, LENGTH)
        assert result.logits.ndim == 3
        assert model(input_ids=ids).logits.shape == result.logits.shape

    def test_labels_are_not_shifted_by_the_caller(self, model: torch.nn.Module, ids: torch.Tensor) -> None:
        self.check_loss(model, ids, ids)

    def test_labels_of_minus_100_are_ignored(self, model: torch.nn.Module, ids: torch.Tensor) -> None:
        labels = ids.clone()
        labels[0, 3:9] = IGNORED
        labels[1] = IGNORED
        self.check_loss(model, ids, labels)

    def test_inputs_stay_as_they_were(self, model: torch.nn.Module, ids: torch.Tensor) -> None:
        labels = ids.clone()
        labels[:, :2] = IGNORED
        given, marked = ids.clone(), labels.clone()
        model(input_ids=given, labels=marked)
        assert torch.equal(given, ids)
        assert torch.equal(marked, labels)

    def test_a_token_sees_nothing_after_it(self, model: torch.nn.Module, ids: torch.Tensor) -> None:
        other = ids.clone()
        other[:, -1] = (ids[:, -1] + 1) % (int(ids.max()) + 1)
        before, after = self.logits(model, ids), self.logits(model, other)
        assert torch.allclose(before[:, :-1], after[:, :-1], atol=1e-5), "a token changed the logits before it"

    def test_samples_of_a_batch_do_not_meet(self, model: torch.nn.Module, ids: torch.Tensor) -> None:
        together = self.logits(model, ids)
        for row in range(BATCH):
            assert torch.allclose(self.logits(model, ids[row : row + 1])[0], together[row], atol=1e-4)

    # -- training -----------------------------------------------------------------------------------------------------

    def test_every_parameter_gets_a_gradient(self, model: torch.nn.Module, ids: torch.Tensor) -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not missing, f"{missing} have no gradient; a parameter that is not trained must have requires_grad=False"

    def test_a_batch_can_be_learnt(self, model: torch.nn.Module, ids: torch.Tensor) -> None:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        losses = []
        for _ in range(12):
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0] - 0.1, f"the losses of twelve steps on one batch must fall: {losses}"

    # -- the same on every node ---------------------------------------------------------------------------------------

    def test_one_seed_one_model(self, model: torch.nn.Module) -> None:
        assert same(model, self.make()), "one seed must give the same parameters twice"
        assert not same(model, self.make(seed=SEED + 1)), "another seed must give other parameters"

    def test_one_seed_one_step(self, ids: torch.Tensor) -> None:
        def gradients() -> list[torch.Tensor]:
            model = self.make()
            model(input_ids=ids, labels=ids).loss.backward()
            return [p.grad for p in model.parameters() if p.grad is not None]

        assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))

    # -- the meta device ----------------------------------------------------------------------------------------------

    def test_the_meta_device_gives_shapes_only(self, model: torch.nn.Module) -> None:
        with torch.device("meta"):
            shapes = self.make()
        assert {parameter.device.type for parameter in shapes.parameters()} == {"meta"}
        assert [(n, p.shape, p.dtype, p.requires_grad) for n, p in shapes.named_parameters()] == [
            (n, p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()
        ]

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def test_a_saved_model_comes_back(self, model: torch.nn.Module, ids: torch.Tensor, tmp_path: Path) -> None:
        folder = self.save(model, tmp_path)
        again = self.make({"path": str(folder)}, seed=SEED + 1)
        assert again.training
        assert same(model, again)
        assert torch.equal(self.logits(again, ids), self.logits(model, ids))

    def test_anyone_can_load_it_with_transformers(
        self, model: torch.nn.Module, ids: torch.Tensor, tmp_path: Path
    ) -> None:
        from transformers import AutoModelForCausalLM

        folder = self.save(model, tmp_path)
        auto: Any = AutoModelForCausalLM  # has no annotations
        again = auto.from_pretrained(folder, local_files_only=True)
        assert torch.allclose(self.logits(again, ids).float(), self.logits(model, ids), atol=1e-5)

    def test_a_saved_model_has_shapes_on_the_meta_device(self, model: torch.nn.Module, tmp_path: Path) -> None:
        folder = self.save(model, tmp_path)
        with torch.device("meta"):
            shapes = self.make({"path": str(folder)})
        assert {parameter.device.type for parameter in shapes.parameters()} == {"meta"}
        assert [p.shape for p in shapes.parameters()] == [p.shape for p in model.parameters()]

    @staticmethod
    def save(model: torch.nn.Module, folder: Path) -> Path:
        """Save a checkpoint in Hugging Face format, check its files, and return its folder."""
        save_pretrained: Any = model.save_pretrained
        save_pretrained(folder / "saved")
        names = [path.name for path in (folder / "saved").iterdir()]
        assert "config.json" in names
        assert [name for name in names if name.endswith(".safetensors")]
        assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl"))], "no file may be a pickle"
        return folder / "saved"

    # -- wrong options ------------------------------------------------------------------------------------------------

    def test_an_unknown_key_is_refused_by_name(self) -> None:
        with pytest.raises(ConfigError, match="no_such_option"):
            self.make({**self.make_config(), "no_such_option": 1})

    def test_a_path_without_a_checkpoint_is_refused_by_name(self, tmp_path: Path) -> None:
        for folder in (tmp_path, tmp_path / "no_such_folder"):
            with pytest.raises(ConfigError, match=folder.name):
                self.make({"path": str(folder)})


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    """Whether the parameters of two models are equal bit for bit."""
    a, b = dict(first.named_parameters()), dict(second.named_parameters())
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
