"""A local Lightning script plus three lines. Each site trains on a third of scikit-learn's
digits.
"""

import argparse

import pytorch_lightning as pl
import torch
from model import Digits
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import fedpool.client.lightning as flare  # (1)

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--num_sites", type=int, default=3)
args = parser.parse_args()


class SiteData(pl.LightningDataModule):
    """One site's training images, and the test images that all sites share."""

    def __init__(self, site: int) -> None:
        super().__init__()
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32) / 16
        labels = torch.tensor(digits.target)
        self.train = TensorDataset(images[:1437][site :: args.num_sites], labels[:1437][site :: args.num_sites])
        self.test = TensorDataset(images[1437:], labels[1437:])

    def train_dataloader(self) -> DataLoader:
        """Batches of 32, in a different order in each epoch."""
        return DataLoader(self.train, batch_size=32, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """All test images in one batch."""
        return DataLoader(self.test, batch_size=len(self.test))


trainer = pl.Trainer(
    max_epochs=args.epochs,  # per round
    accelerator="cpu",
    logger=False,  # the scores are in the job's record, and the model is in its store
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
flare.patch(trainer)  # (2)
model = Digits()
data = SiteData(site=int(flare.get_site_name().split("-")[1]) - 1)

while flare.is_running():  # (3)
    trainer.validate(model, datamodule=data, verbose=False)  # scores the received model
    trainer.fit(model, datamodule=data)  # starts from the received model, and sends at the end
