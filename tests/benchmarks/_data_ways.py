"""Ways from image files to micro-batches of training views, and what they make of the same crop."""

import io
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as v1
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode

from cnnjepa.config import TrainConfig
from cnnjepa.data.datasets import IMAGENET_MEAN, IMAGENET_STD, load_splits
from cnnjepa.data.loader import build_plan, train_loader
from cnnjepa.data.pictures import Drawn, EncodedPicture
from cnnjepa.data.views import ViewSpec, crop_and_flip, draw_crop, random_views
from cnnjepa.data_config import DATA_PRESETS, DataConfig, DatasetName
from cnnjepa.methods.cnn_jepa import Config
from cnnjepa.run.ranks import Ranks

CPU = torch.device("cpu")
BATCH = 128
SPEC = crop_and_flip(DATA_PRESETS["imagenet100"])


def official_transform() -> Any:
    """Crop, flip and normalisation on Pillow images and float tensors, as the official code has them."""
    crop = v1.RandomResizedCrop(224, scale=(0.2, 1.0), interpolation=InterpolationMode.BICUBIC)
    return v1.Compose([crop, v1.RandomHorizontalFlip(), v1.ToTensor(), v1.Normalize(IMAGENET_MEAN, IMAGENET_STD)])


def write_hdf5(tree: Path, path: Path) -> None:
    """One object an image, its encoded bytes, in a group a class."""
    with h5py.File(path, "w") as file:
        for image in sorted((tree / "train").rglob("*.jpg")):
            file.create_dataset(f"{image.parent.name}/{image.name}", data=np.frombuffer(image.read_bytes(), np.uint8))


class Hdf5Images(Dataset[tuple[torch.Tensor, int]]):
    """Reads as the official code does: one object, Pillow, transform."""

    def __init__(self, path: Path, transform: Any) -> None:
        self.file, self.transform = h5py.File(path), transform
        self.names = [(f"{group}/{name}", label) for label, group in enumerate(sorted(self.file)) for name in self.file[group]]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        name, label = self.names[index]
        image = Image.open(io.BytesIO(self.file[name][()].tobytes())).convert("RGB")
        return self.transform(image), label


def official(images: Dataset[Any]) -> Iterator[Any]:
    """Micro-batches of float tensors, for ever."""
    while True:
        yield from DataLoader(images, BATCH, shuffle=True, drop_last=True)


def ours(root: Path, **changes: Any) -> Iterator[Any]:
    """This project's loader on loose or packed files."""
    data = DataConfig(DatasetName.imagefolder, root=str(root), image_size=224, **changes)
    config = TrainConfig(Config(), data, epochs=1000, global_batch_size=BATCH, micro_batch_size=BATCH)
    splits = load_splits(data)
    return train_loader(config, splits, [SPEC], build_plan(config, len(splits.pretrain), 1), Ranks(0, 1, CPU), 0)


def ways(folder: Path) -> dict[str, Iterator[Any]]:
    """All ways, by the name that the figures carry."""
    return {
        "imagefolder": official(ImageFolder(str(folder / "tree" / "train"), official_transform())),
        "hdf5": official(Hdf5Images(folder / "objects.h5", official_transform())),
        "packed": ours(folder / "packed"),
        "decoded": ours(folder / "decoded"),
        "loose": ours(folder / "tree"),
        "short320": ours(folder / "short320", short_side=320, jpeg_quality=90),
        "short256": ours(folder / "short256", short_side=256, jpeg_quality=90),
    }


def take(batches: Iterator[Any], images: int) -> Callable[[], None]:
    """Draw so many images and drop them."""

    def do() -> None:
        for _ in range(images // BATCH):
            next(batches)

    return do


def differences(images: list[bytes], way: Callable[[bytes, ViewSpec, int], torch.Tensor]) -> dict[str, float]:
    """Grey levels between `way` and Pillow's crop on the same draw: mean, largest, and the share of values more than 1 apart."""
    means, largest, shares = [], 0.0, []
    for seed, data in enumerate(images):
        image = Image.open(io.BytesIO(data)).convert("RGB")
        random = np.random.default_rng(seed)
        top, left, height, width = draw_crop(SPEC, image.height, image.width, random)
        view = v1.functional.resized_crop(image, top, left, height, width, [224, 224], InterpolationMode.BICUBIC)
        if random.random() < SPEC.flip_probability:
            view = v1.functional.hflip(view)
        off = (way(data, SPEC, seed).int() - v1.functional.pil_to_tensor(view).int()).abs()
        means.append(off.float().mean().item())
        largest = max(largest, off.max().item())
        shares.append((off > 1).float().mean().item())
    return {"mean": statistics.mean(means), "largest": largest, "above_1": statistics.mean(shares)}


def exact(data: bytes, spec: ViewSpec, seed: int) -> torch.Tensor:
    """As from packed files."""
    return random_views([spec], EncodedPicture(data, sound=True), [np.random.default_rng(seed)])[0]


def scaled(data: bytes, spec: ViewSpec, seed: int) -> torch.Tensor:
    """With data.dct_scaling."""
    return random_views([spec], EncodedPicture(data, sound=True), [np.random.default_rng(seed)], dct_scaling=True)[0]


def shrunk(side: int) -> Callable[[bytes, ViewSpec, int], torch.Tensor]:
    """From files packed with --short-side and --quality 90; the crop takes the same share of the image."""

    def view(data: bytes, spec: ViewSpec, seed: int) -> torch.Tensor:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        crop = draw_crop(spec, image.height, image.width, np.random.default_rng(seed))
        ratio = side / min(image.size)
        small, file = image.resize((round(image.width * ratio), round(image.height * ratio)), Image.Resampling.LANCZOS), io.BytesIO()
        small.save(file, "JPEG", quality=90)
        top, left, height, width = (round(edge * ratio) for edge in crop)
        pixels = np.asarray(Image.open(file))[top : top + height, left : left + width]
        whole = ViewSpec(spec.size, 1.0, 0.0, pixels.shape[1] / pixels.shape[0], pixels.shape[1] / pixels.shape[0])
        resized = random_views([whole], Drawn(pixels), [np.random.default_rng(0)])[0]
        random = np.random.default_rng(seed)
        draw_crop(spec, image.height, image.width, random)
        return resized.flip(-1) if random.random() < spec.flip_probability else resized

    return view
