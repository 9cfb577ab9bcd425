"""The loss of a share is the mean over all of its trained tokens, however it is cut into micro-batches."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from transformers import BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForCausalLM

from psyche_lightning import PsycheStrategy
from psyche_lightning.errors import ConfigError
from psyche_lightning.lightning.weights import IGNORED, ShareLoss, shifts, trained

Make = Callable[..., Any]
SIZES = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), 32)
LENGTH, ROWS = 12, 6
COUNTS = (12, 1, 0, 12, 3, 1)
"""Trained labels of each row; the first of a whole row has no token before it."""


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Rows of tokens, the last of which are labels: ``counts`` of them in each."""

    def __init__(self, counts: tuple[int, ...] = COUNTS) -> None:
        tokens = torch.randint(32, (len(counts), LENGTH), generator=torch.Generator().manual_seed(1))
        labels = tokens.clone()
        for row, count in zip(labels, counts, strict=True):
            row[: LENGTH - count] = IGNORED
        self.rows = {"input_ids": tokens, "labels": labels}

    def __len__(self) -> int:
        return len(self.rows["labels"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: rows[index] for name, rows in self.rows.items()}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(3)
    return LlamaForCausalLM(
        LlamaConfig(num_hidden_layers=1, num_attention_heads=2, initializer_range=0.5, **SIZES, use_cache=False)
    )


class Whole(LightningModule):
    """A causal language model, as users write it: the batch says what is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.model = llama()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Tagger(Whole):
    """Compares outputs and labels of the same place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.model = torch.nn.Sequential(torch.nn.Embedding(32, 16), torch.nn.Linear(16, 32))  # type: ignore[assignment]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": cross_entropy(self.model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())}


class Telling(Whole):
    """Its batch has another form, so that only the module can say what its loss is the mean over."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        tokens, goals = batch.values()
        count = (goals != IGNORED).sum()
        logits = self.model(input_ids=tokens).logits
        return {"loss": cross_entropy(logits.flatten(0, 1), goals.flatten()), "weight": count}


class Skipping(Telling):
    """Returns None where there is nothing to train."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        output = super().training_step(batch, batch_idx)
        return output if output["weight"] else None


class Renamed(Rows):
    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return dict(zip("xy", super().__getitem__(index).values(), strict=True))


class Notes(Callback):
    def __init__(self) -> None:
        self.gradients: list[list[torch.Tensor]] = []
        self.losses: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
        self.gradients.append([p.grad.clone() for p in module.parameters() if p.grad is not None])

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if outputs:
            self.losses.append(float(outputs["loss"]))


def fit(trainer: Make, module: LightningModule, rows: Dataset[Any], size: int, **options: Any) -> tuple[Any, Notes]:
    notes = Notes()
    strategy = PsycheStrategy(global_batch_size=len(rows))  # type: ignore[arg-type]
    fitted = trainer(strategy=strategy, max_steps=1, callbacks=[notes], **options)
    fitted.fit(module, DataLoader(rows, batch_size=size))
    return fitted.strategy.session, notes


@pytest.mark.parametrize("size", [1, 2, 4, 6])
@pytest.mark.parametrize(("kind", "rows"), [(Whole, Rows), (Tagger, Rows), (Telling, Renamed), (Skipping, Renamed)])
def test_micro_batches_have_the_loss_and_gradient_of_all_trained_tokens(
    trainer: Make, kind: type[Whole], rows: type[Rows], size: int
) -> None:
    module, data, model = kind(), rows(), kind().model
    tokens, labels = data.rows.values()
    shift = int(kind is Whole)
    logits = model(tokens) if kind is Tagger else model(tokens).logits[:, : LENGTH - shift]
    expected = cross_entropy(logits.flatten(0, 1), labels[:, shift:].flatten())
    expected.backward()
    session, notes = fit(trainer, module, data, size)
    assert (session.rounds, session.empty_rounds) == (1, 0)
    assert session.loss == pytest.approx(expected.item(), abs=1e-5)
    assert notes.losses == [session.loss]
    torch.testing.assert_close(notes.gradients, [[p.grad for p in model.parameters()]], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("counts", [(0, 0, 12, 12), (12, 12, 0, 0), (0, 12, 12, 0)])
def test_rows_without_labels_add_nothing_wherever_they_are(trainer: Make, counts: tuple[int, ...]) -> None:
    data = Rows(counts)
    of_one, of_all = (fit(trainer, Whole(), data, size) for size in (1, 4))
    torch.testing.assert_close(of_one[1].gradients, of_all[1].gradients, rtol=1e-4, atol=1e-6)
    assert of_one[0].loss == pytest.approx(of_all[0].loss, abs=1e-5)


def test_what_a_loss_has_besides_keeps_its_scale(trainer: Make) -> None:
    class Routed(Whole):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) + 10.0  # such as a router's

    plain, routed = (fit(trainer, kind(), Rows(), 1)[0].loss for kind in (Whole, Routed))
    assert routed == pytest.approx(plain + 10, abs=1e-4)


@pytest.mark.parametrize("size", [1, 2])
def test_a_share_without_labels_is_said_and_gives_nothing(
    trainer: Make, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    module = Whole()
    before = [p.detach().clone() for p in module.parameters()]
    session, _ = fit(trainer, module, Rows((0, 0)), size)
    assert (session.rounds, session.empty_rounds) == (1, 1)
    assert all(map(torch.equal, before, module.parameters()))
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "none of its 2 samples has a loss or a trained label" in warnings[0].getMessage()
    assert warnings[-1].levelname == "ERROR"
    assert warnings[-1].getMessage().startswith("this node contributed nothing to 1 of its 1 rounds")


def test_a_loss_that_is_not_a_number_names_the_way_out(trainer: Make, caplog: pytest.LogCaptureFixture) -> None:
    class Silent(Telling):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx)["loss"]

    session, _ = fit(trainer, Silent(), Renamed(), 1)
    assert session.empty_rounds == 1
    assert "its loss is not a number. If some micro-batches have nothing to train" in caplog.text
    assert "'weight'" in caplog.text


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf")])
def test_a_wrong_weight_is_refused(trainer: Make, weight: float) -> None:
    class Wrong(Whole):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": super().training_step(batch, batch_idx), "weight": weight}

    with pytest.raises(ConfigError, match=r"returned the 'weight' .*: a finite number from 0"):
        fit(trainer, Wrong(), Rows(), 2)


def test_a_weight_that_is_nearly_nothing_does_not_blow_up_gradients_under_way() -> None:
    share = ShareLoss(4, shifted=False)
    labels = torch.full((1, 100), IGNORED)
    labels[0, 0] = 1
    first = share.part(torch.tensor(2.0), {"labels": labels}, 1)
    others = [share.part(torch.tensor(3.0), {"labels": torch.ones(1, 100, dtype=torch.int64)}, 1) for _ in range(3)]
    assert first is not None
    assert float(first) == pytest.approx(2 / 400)
    assert [float(part) for part in others if part is not None] == pytest.approx([3 / 4] * 3), "no more than the mean's"
    assert share.correction == pytest.approx(400 / 301)


def test_which_models_shift_their_labels() -> None:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    bart = BartForConditionalGeneration(BartConfig(vocab_size=32, max_position_embeddings=16, **sizes, **heads))
    assert not shifts(bart)
    assert not shifts(torch.nn.Linear(2, 2))
    assert shifts(Whole())
    assert trained(torch.tensor([[5, IGNORED, 5]]), True) == 1
    assert trained(torch.tensor([[5, IGNORED, 5]]), False) == 2


def test_a_batch_of_fabric_without_a_gradient_gives_nothing(caplog: pytest.LogCaptureFixture) -> None:
    fabric = Fabric(strategy="psyche", accelerator="cpu", devices=1)
    module = torch.nn.Linear(2, 2)
    model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    loader = fabric.setup_dataloaders(DataLoader(torch.ones(8, 2), batch_size=4))  # type: ignore[arg-type]
    for number, batch in enumerate(loader):
        optimizer.zero_grad()
        if number:
            fabric.backward(model(batch).sum())
        optimizer.step()
    session = fabric.strategy.session  # type: ignore[union-attr]
    fabric.strategy.close()  # type: ignore[union-attr]
    assert (session.rounds, session.empty_rounds) == (2, 1)
    assert "its data ids 0-3 stay open: no parameter has a gradient" in caplog.text
