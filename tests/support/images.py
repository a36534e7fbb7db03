"""Images and folders of images that tests make."""

import gzip
import struct
from pathlib import Path

import numpy as np
from PIL import Image

from cnnjepa.data.datasets import Images
from cnnjepa.data.pictures import Pixels


def picture(width: int = 100, height: int = 80, seed: int = 0) -> Image.Image:
    """Smooth colours with edges, as photographs have."""
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (8, 10, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def pixels_of(images: Images, index: int) -> Pixels:
    return images.pictures([index])[0].pixels()


def image_tree(root: Path, classes: list[str], images: int = 4) -> Path:
    for split in ("train", "val"):
        for c, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(images):
                picture(40, 36, seed=100 * c + i).save(root / split / name / f"{i}.jpg")
    return root


def write_idx(path: Path, array: np.ndarray, packed: bool) -> None:
    data = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape) + array.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(path.name + ".gz" * packed).write_bytes(gzip.compress(data) if packed else data)
