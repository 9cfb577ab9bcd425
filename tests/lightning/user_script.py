"""An ordinary Lightning program: only the import of psyche_lightning and the strategy's name are special."""

import json
import sys

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

import psyche_lightning  # noqa: F401

torch.set_num_threads(1)
torch.manual_seed(int(sys.argv[1]))


class Model(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Tanh(), torch.nn.Linear(8, 2)
        )

    def training_step(self, batch, batch_idx):
        loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


generator = torch.Generator().manual_seed(0)
x = torch.randn(64, 6, generator=generator)
loader = DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=8, shuffle=True)
model = Model()
before = {name: value.tolist() for name, value in model.state_dict().items()}
trainer = Trainer(
    strategy="psyche",
    accelerator="cpu",
    devices=1,
    max_steps=12,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(model, loader)
with open(sys.argv[2], "w") as file:
    parameters = {name: value.tolist() for name, value in model.named_parameters()}
    rate = trainer.optimizers[0].param_groups[0]["lr"]
    json.dump({"before": before, "parameters": parameters, "steps": trainer.global_step, "lr": rate}, file)
