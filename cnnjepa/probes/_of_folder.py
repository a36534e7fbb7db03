"""Compute the features of any folder of images, as the probes of a run see its own."""

import copy
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from cnnjepa.config import TrainConfig
from cnnjepa.data.datasets import FolderImages, Splits, load_dataset
from cnnjepa.data_config import DatasetName
from cnnjepa.probes.features import pooled_features
from cnnjepa.run.ranks import Device, joined


def features_of(encoder: nn.Module, config: TrainConfig, folder: Path, device: Device) -> tuple[list[str], Tensor]:
    """Return the path of each image below `folder`, relative to it, and their pooled features, fp32 [N, C].

    Images are resized and normalised as those of the run. Raise ValueError if there are none.
    """
    known = load_dataset(config.data)  # whose mean and standard deviation the encoder was trained with
    own = copy.deepcopy(config)
    own.data.name, own.data.root, own.data.fingerprint, own.data.val_fraction = DatasetName.images, str(folder), "", 0.0
    own.data.mean, own.data.std = list(known.mean), list(known.std)
    dataset, none = load_dataset(own.data), np.arange(0)
    images = dataset.train
    if not isinstance(images, FolderImages):
        raise ValueError(f"folder must hold image files; got the packed set {folder}")
    with joined(device) as ranks:
        splits = Splits(dataset, none, none, none, none)
        return images.names(), pooled_features(encoder.to(ranks.device), own, splits, images, np.arange(len(images)), ranks)
