"""A program whose node has two ranks; it trains once for each of the options that it is given."""

import hashlib
import json
import os
import signal
import sys

import torch
from lightning.fabric import Fabric
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from psyche_lightning import MuonAdamW, PsycheStrategy
from psyche_lightning.lightning.fabric import PsycheFabricStrategy

torch.set_num_threads(1)


class Model(LightningModule):
    def __init__(self, norm, muon=False) -> None:
        super().__init__()
        self.muon = muon
        self.net = torch.nn.Sequential(torch.nn.Linear(6, 8), norm, torch.nn.Tanh(), torch.nn.Linear(8, 2))
        self.unused = torch.nn.Linear(2, 2)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = torch.nn.functional.cross_entropy(self.net(x.to(self.net[0].weight.dtype)), y)
        self.log("loss", loss, sync_dist=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx), sync_dist=True)

    def configure_optimizers(self):
        return MuonAdamW(self, lr=0.01) if self.muon else torch.optim.AdamW(self.parameters(), lr=0.01)


class Scaled(torch.nn.Sequential):
    """With a scalar, which every rank has."""

    def __init__(self, *parts):
        super().__init__(*parts)
        self.scale = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return super().forward(x) * self.scale


class Trouble(Callback):
    """Has a rank do something in a step."""

    def __init__(self, rank, step, what):
        self.rank, self.step, self.what = rank, step, what

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_rank == self.rank and trainer.global_step == self.step:
            match self.what:
                case "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "memory":
                    raise torch.OutOfMemoryError("this rank is out of memory")
                case "terminate":
                    os.kill(os.getpid(), signal.SIGTERM)


def whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


def digest(module):
    values = [whole(value).float().numpy().tobytes() for value in module.state_dict().values()]
    return hashlib.sha256(b"".join(values)).hexdigest()


def train(case):
    torch.manual_seed(0 if case.get("equal", True) else os.getpid())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 6, generator=generator)
    loader = DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=case.get("batch", 4), shuffle=True)
    norm = torch.nn.BatchNorm1d(8) if case.get("statistics") else torch.nn.LayerNorm(8)
    model = Model(norm, case.get("muon")).to(getattr(torch, case.get("dtype", "float32")))
    if case.get("other") and os.environ.get("LOCAL_RANK", "0") != "0":
        model.unused = torch.nn.Linear(3, 3)
    callbacks = [Trouble(*case["trouble"])] if "trouble" in case else []
    if "saved" in case:
        callbacks.append(ModelCheckpoint(case["saved"], "{step}", every_n_train_steps=2, save_top_k=-1))
    trainer = Trainer(
        strategy=PsycheStrategy(directory=case.get("directory"), **case.get("options", {})),
        accelerator="cpu",
        devices=case.get("devices", 2),
        max_steps=case.get("steps", 4),
        gradient_clip_val=case.get("clip", 1.0),
        accumulate_grad_batches=case.get("accumulate", 1),
        callbacks=callbacks,
        num_sanity_val_steps=0,
        logger=False,
        log_every_n_steps=1,
        enable_checkpointing="saved" in case,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    validation = DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=8)
    trainer.fit(model, loader, validation, ckpt_path=case.get("resumed"))
    session = trainer.strategy.session
    found = {
        "rank": trainer.global_rank,
        "digest": digest(model),
        "steps": trainer.global_step,
        "loss": session.loss,
        "samples": session.samples,
        "figures": session.step_figures(),
        "gradients": sum(parameter.grad is not None for parameter in model.parameters()),
        "published": session.digest().hex() if trainer.global_rank == 0 or "inner" in case.get("options", {}) else None,
    }
    print("FOUND " + json.dumps(found), flush=True)


def train_with_fabric(case):
    fabric = Fabric(strategy=PsycheFabricStrategy(**case["fabric"]), accelerator="cpu", devices=case.get("devices", 2))
    fabric.launch()
    torch.manual_seed(0 if case.get("equal") else os.getpid())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 6, generator=generator)
    module = Scaled(torch.nn.Linear(6, 2)) if case.get("scaled") else torch.nn.Linear(6, 2)
    model, optimizer = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.01))
    data = TensorDataset(x, (x.sum(1) > 0).long())
    loader = fabric.setup_dataloaders(DataLoader(data, batch_size=case.get("batch", 4), shuffle=True))
    for x, y in loader:
        optimizer.zero_grad()
        fabric.backward(torch.nn.functional.cross_entropy(model(x), y))
        fabric.clip_gradients(module, optimizer, max_norm=1.0)
        optimizer.step()
    session = fabric.strategy.session
    found = {"rank": fabric.global_rank, "digest": digest(module), "loss": session.loss, "samples": session.samples}
    if "saved" in case:
        state = {"model": model, "optimizer": optimizer, "round": session.rounds}
        fabric.save(case["saved"], state)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()
        state["round"] = 0
        left = fabric.load(case["saved"], state)
        found |= {"loaded": digest(module), "round": state["round"], "left": list(left)}
    print("FOUND " + json.dumps({**found, "rounds": session.rounds}), flush=True)
    fabric.strategy.close()


for case in json.loads(sys.argv[1]):
    (train_with_fabric if "fabric" in case else train)(case)
