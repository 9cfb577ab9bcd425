"""What cannot be done is said before anything runs: what is wrong, what was expected, what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import DataLoader, IterableDataset, WeightedRandomSampler

from psyche_lightning import CoordinatorCallback, PsycheStrategy
from psyche_lightning.errors import ConfigError, CoordinatorError, ManifestMismatchError, PsycheError

Make = Callable[..., Any]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"global_batch_size": 0}, "global_batch_size is 0; choose a whole number from 1 on"),
        ({"seed": -1}, r"run\.seed is -1; choose a whole number from 0 to 2\^64 - 1"),
        ({"overlap": "yes"}, r"run\.overlap is 'yes'; choose true or false"),
        ({"k": 0}, r"distro\.k is 0; with distro\.chunk=64 choose a whole number from 1 to 128"),
        ({"patience": -1}, r"node\.patience is -1; choose a number of seconds above 0"),
        ({"manifest": {"run": {}}}, r"manifest has the section 'run', whose values are options: overlap, seed,"),
        ({"coordinator": "localhost", "run": "r"}, "'localhost' is not a URL"),
        ({"coordinator": "http://127.0.0.1:1", "run": "../r"}, r"'\.\./r' is no name of a run; it has 1 to 32 letters"),
    ],
)
def test_a_wrong_value_of_an_option(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        PsycheStrategy(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"transport": "pigeon"}, r"no transport 'pigeon'\. Installed: .*memory, tcp"),
        ({"transport_options": {"prot": 4000}}, r"no option 'prot'\. Did you mean 'port'"),
    ],
)
def test_who_trains_alone_is_told_of_a_wrong_transport_too(
    classifier: Make, loader: Make, trainer: Make, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(PsycheError, match=words):
        trainer(strategy=PsycheStrategy(**options), max_steps=1).fit(classifier(), loader())


@pytest.mark.parametrize(("known", "missing"), [("COORDINATOR", "RUN"), ("RUN", "COORDINATOR")])
def test_coordinator_and_run_go_together(monkeypatch: pytest.MonkeyPatch, known: str, missing: str) -> None:
    monkeypatch.setenv(f"PSYCHE_{known}", "http://127.0.0.1:1")
    with pytest.raises(ConfigError, match=f"set PSYCHE_{missing}, or neither"):
        PsycheStrategy()


def test_several_machines(trainer: Make) -> None:
    with pytest.raises(ConfigError, match=r"num_nodes=2.*start the same program on every machine"):
        trainer(num_nodes=2)


def test_manual_optimization(classifier: Make, loader: Make, trainer: Make) -> None:
    module = classifier()
    module.automatic_optimization = False
    with pytest.raises(ConfigError, match=r"automatic_optimization=False.*Fabric"):
        trainer(max_steps=1).fit(module, loader())


def test_no_optimizer(classifier: Make, loader: Make, trainer: Make) -> None:
    class Without(classifier):  # type: ignore[misc]
        def configure_optimizers(self) -> None:
            return None

    with pytest.raises(ConfigError, match=r"needs exactly one"):
        trainer(max_steps=1).fit(Without(), loader())


def test_sparse_gradients(loader: Make, trainer: Make, classifier: Make) -> None:
    class Sparse(classifier):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(4, 2, sparse=True)

        def loss(self, batch: Any) -> torch.Tensor:
            return self.table(batch[1]).sum()

    with pytest.raises(ConfigError, match=r"'table.weight' is sparse"):
        trainer(max_steps=1).fit(Sparse(), loader())


def test_a_changing_accumulation(classifier: Make, loader: Make, trainer: Make) -> None:
    with pytest.raises(ConfigError, match=r"GradientAccumulationScheduler"):
        trainer(max_steps=1, callbacks=[GradientAccumulationScheduler({1: 2})]).fit(classifier(), loader())


def test_an_optimizer_of_foreign_tensors(classifier: Make, loader: Make, trainer: Make) -> None:
    class Foreign(classifier):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))], lr=0.1)

    with pytest.raises(ConfigError, match=r"1 tensors that are not parameters of Foreign.*\(3,\)"):
        trainer(max_steps=1).fit(Foreign(), loader())


class Endless(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Any:
        return iter([torch.zeros(6)])


class Own(DataLoader[Any]):
    def __iter__(self) -> Any:
        return super().__iter__()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda data: DataLoader(Endless()), "Endless is an IterableDataset"),
        (lambda data: data.tensors[0], "is a Tensor, not a torch DataLoader"),
        (lambda data: DataLoader(data, sampler=WeightedRandomSampler([1.0] * 4, 4)), "sampler WeightedRandomSampler"),
        (lambda data: DataLoader(data, batch_sampler=[[0, 1]]), "no batch_size"),
        (lambda data: DataLoader(data, batch_size=None), "no batch_size"),
        (lambda data: Own(data), "Own has its own iterator"),
        (lambda data: DataLoader(torch.utils.data.Subset(data, [])), "data set is empty"),
    ],
)
def test_loaders_that_decide_by_themselves(
    classifier: Make, loader: Make, trainer: Make, make: Callable[[Any], Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        trainer(max_steps=1).fit(classifier(), make(loader().dataset))


def test_several_train_loaders(classifier: Make, loader: Make, trainer: Make) -> None:
    with pytest.raises(ConfigError, match=r"exactly one train dataloader"):
        trainer(max_steps=1).fit(classifier(), {"a": loader(), "b": loader()})


def test_a_callback_with_a_wrong_interval() -> None:
    with pytest.raises(ConfigError, match=r"log_every is -1"):
        CoordinatorCallback(log_every=-1)


def test_an_unknown_run_names_the_known_ones(classifier: Make, loader: Make, trainer: Make, create_run: Make) -> None:
    url, run = create_run()
    with pytest.raises(CoordinatorError, match=f"no run 'other'.*{run}"):
        trainer(strategy=PsycheStrategy(url, "other"), max_steps=1).fit(classifier(), loader())


def test_options_that_are_not_the_run_s(classifier: Make, loader: Make, trainer: Make, create_run: Make) -> None:
    url, run = create_run({"distro": {"k": 4}, "run": {"overlap": False}}, total_steps=5)
    strategy = PsycheStrategy(url, run, k=16, overlap=True, total_steps=9)
    with pytest.raises(ManifestMismatchError) as caught:
        trainer(strategy=strategy, max_steps=1).fit(classifier(), loader())
    assert caught.value.differences == [
        ("run.overlap", False, True),
        ("distro.k", 4, 16),
        ("run.total_steps", 5, 9),
    ]


def test_what_a_section_of_the_run_leaves_out_has_its_default(
    classifier: Make, loader: Make, trainer: Make, create_run: Make
) -> None:
    url, run = create_run({"distro": {"k": 4}}, total_steps=5)
    strategy = PsycheStrategy(url, run, chunk=32, k=4)
    with pytest.raises(ManifestMismatchError, match=r"distro\.chunk: the run has 64, this node has 32") as caught:
        trainer(strategy=strategy, max_steps=1).fit(classifier(), loader())
    assert caught.value.differences == [("distro.chunk", 64, 32)]


def test_a_module_that_is_not_the_run_s(classifier: Make, loader: Make, trainer: Make, create_run: Make) -> None:
    url, run = create_run({"model": {"parameters": [["other", [1], "float32", True]], "buffers": []}})
    with pytest.raises(ManifestMismatchError, match=r"model.parameters: the run has"):
        trainer(strategy=PsycheStrategy(url, run), max_steps=1).fit(classifier(), loader())


def test_a_coordinator_that_nobody_reaches(classifier: Make, loader: Make, trainer: Make) -> None:
    strategy = PsycheStrategy("http://127.0.0.1:9", "r")
    with pytest.raises(CoordinatorError, match=r"cannot reach the coordinator at http://127.0.0.1:9.*Tried 5 times"):
        trainer(strategy=strategy, max_steps=1).fit(classifier(), loader())


def test_overfitting_on_purpose(classifier: Make, loader: Make, trainer: Make) -> None:
    with pytest.raises(ConfigError, match=r"overfit_batches set"):
        trainer(max_steps=1, overfit_batches=1).fit(classifier(), loader())
