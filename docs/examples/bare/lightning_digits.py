"""Train a small network on scikit-learn's digits with PyTorch Lightning, and continue from its own last checkpoint."""

from dataclasses import dataclass

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset


@dataclass
class Config:
    lr: float = 0.01
    width: int = 32
    epochs: int = 4
    seed: int = 42


class Digits(pl.LightningModule):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.model = torch.nn.Sequential(torch.nn.Linear(64, config.width), torch.nn.ReLU(), torch.nn.Linear(config.width, 10))
        images, labels = load_digits(return_X_y=True)
        self.images, self.labels = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)

    def train_dataloader(self):
        # Its order follows from seed and epoch, so that a resumed run sees the same batches. A generator given
        # to the loader would not do: Lightning starts the loader once in a resumed epoch, and twice in others.
        order = torch.Generator().manual_seed(1000 * self.config.seed + self.current_epoch)
        rows = torch.randperm(1200, generator=order)
        return DataLoader(TensorDataset(self.images[rows], self.labels[rows]), 40)

    def val_dataloader(self):
        return DataLoader(TensorDataset(self.images[1200:], self.labels[1200:]), 597)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=self.config.lr)

    def training_step(self, batch, _):
        return cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.log("accuracy", 100 * (self.model(batch[0]).argmax(1) == batch[1]).float().mean(), prog_bar=True)


def train(config: Config) -> None:
    pl.seed_everything(config.seed)
    quiet = {"logger": False, "enable_model_summary": False, "num_sanity_val_steps": 0, "accelerator": "cpu"}
    callbacks = [ModelCheckpoint("checkpoints", save_last=True)]
    trainer = pl.Trainer(max_epochs=config.epochs, reload_dataloaders_every_n_epochs=1, callbacks=callbacks, **quiet)
    trainer.fit(Digits(config), ckpt_path="last")


if __name__ == "__main__":
    train(Config())
