"""JPEGs of ImageNet's shape, made from the photographs that scikit-learn and scikit-image ship: the same bytes for the same number."""

import functools
import io
import multiprocessing
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

_SCIKIT_IMAGE = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "ihc.png",
    "hubble_deep_field.jpg",
    "retina.jpg",
)
_SCIKIT_LEARN = ("china.jpg", "flower.jpg")
_MEAN_BYTES = 110_000


@functools.cache
def _photographs() -> list[Image.Image]:
    import skimage
    import sklearn.datasets

    folders = Path(skimage.__file__).parent / "data", Path(sklearn.datasets.__file__).parent / "images"
    paths = [folder / name for folder, names in zip(folders, (_SCIKIT_IMAGE, _SCIKIT_LEARN), strict=True) for name in names]
    return [Image.open(path).convert("RGB") for path in paths]


def _piece(random: np.random.Generator, width: int, height: int) -> npt.NDArray[np.float32]:
    """A random part of a random photograph, of half its size or more."""
    photograph = _photographs()[random.integers(len(_photographs()))]
    high = min(photograph.height, photograph.width * height / width) * random.uniform(0.5, 1)
    wide = high * width / height
    left, top = random.uniform(0, photograph.width - wide), random.uniform(0, photograph.height - high)
    box = (left, top, left + wide, top + high)
    return np.asarray(photograph.resize((width, height), Image.Resampling.BICUBIC, box), dtype=np.float32)


def photograph(number: int, scale: float = 1.0) -> bytes:
    """A JPEG of scale x (500 x 375), one in four upright: pieces of photographs, mixed, with grain, compressed to about 110 kB."""
    random = np.random.default_rng(number)
    width, height = (round(side * scale) for side in ((500, 375) if random.random() < 0.75 else (375, 500)))
    pixels = _piece(random, width, height)
    if random.random() < 0.5:
        share = random.uniform(0.2, 0.8)
        pixels = share * pixels + (1 - share) * _piece(random, width, height)
    pixels = pixels + random.uniform(3, 10) * random.standard_normal((height, width, 1), dtype=np.float32)
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    most = _MEAN_BYTES * scale**2 * random.uniform(0.7, 1.5)
    low, high = 50, 98
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(_jpeg(image, middle)) <= most else (low, middle - 1)
    return _jpeg(image, low)


def _jpeg(image: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def write_tree(root: Path, train: int, val: int, classes: int, scale: float = 1.0, processes: int = 1) -> None:
    """An image tree of so many images, of which every 500th is made again and the rest are repeated."""
    tasks = []
    for split, count in (("train", train), ("val", val)):
        for c in range(classes):
            (root / split / f"class{c}").mkdir(parents=True, exist_ok=True)
        tasks += [(root / split / f"class{i % classes}" / f"{i:06}.jpg", i % 500, scale) for i in range(count)]
    made: dict[int, bytes] = {}
    numbers = sorted({number for _, number, _ in tasks})
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        made = dict(zip(numbers, pool.imap(functools.partial(photograph, scale=scale), numbers, chunksize=8), strict=True))
    for path, number, _ in tasks:
        path.write_bytes(made[number])
