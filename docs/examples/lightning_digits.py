"""Which width for a small network on scikit-learn's digits? In PyTorch Lightning, which keeps its own checkpoints."""

from dataclasses import dataclass

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LambdaCallback, ModelCheckpoint
from pytorch_lightning.plugins.environments import LightningEnvironment
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from sweeps import Configuration, PlainTask, SweepSpec, main


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


def train(config: Config, run) -> None:
    def report(trainer, _):
        trainer.should_stop = not run.report(trainer.current_epoch + 1, accuracy=trainer.callback_metrics["accuracy"])

    pl.seed_everything(config.seed)
    quiet = {"logger": False, "enable_model_summary": False, "num_sanity_val_steps": 0, "accelerator": "cpu"}
    quiet["plugins"] = [LightningEnvironment()]  # else Lightning may requeue a Slurm job itself
    callbacks = [ModelCheckpoint(run.folder, save_last=True), LambdaCallback(on_validation_end=report)]
    trainer = pl.Trainer(max_epochs=config.epochs, reload_dataloaders_every_n_epochs=1, callbacks=callbacks, **quiet)
    trainer.fit(Digits(config), ckpt_path="last")


TASK = PlainTask(Config, train, objective="accuracy", unit="%")
SWEEP = SweepSpec(configurations=[Configuration({"width": 8}), Configuration({"width": 32})], task=TASK)

if __name__ == "__main__":
    main(SWEEP)
