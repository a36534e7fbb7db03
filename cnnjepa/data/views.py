"""How training views and probe views are drawn from an image (paper, section IV-A); randomness is (seed, epoch, sample, view).

Views are uint8 [3, S, S]: normalisation happens on the device, where it is cheap.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from cnnjepa.config import AugmentConfig, DataConfig


@dataclass(frozen=True)
class ViewSpec:
    """One random view: a crop of random area and aspect, resized bicubically, perhaps mirrored, perhaps changed in colour and sharpness."""

    size: int  # pixels a side
    min_scale: float
    flip_probability: float
    min_aspect: float = 3 / 4
    max_aspect: float = 4 / 3
    augment: AugmentConfig | None = None


def crop_and_flip(config: DataConfig) -> ViewSpec:
    """The view of CNN-JEPA: random resized crop and horizontal flip."""
    return ViewSpec(config.image_size, config.min_crop_scale, config.flip_probability)


def augmented(config: DataConfig, augment: AugmentConfig) -> ViewSpec:
    """A view of the joint-embedding methods: the crop of `augment`, the flip of the data, and then the rest of `augment`."""
    return ViewSpec(config.image_size, augment.min_crop_scale, config.flip_probability, augment=augment)


def draw_crop(spec: ViewSpec, height: int, width: int, random: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width of a crop: area uniform in [min_scale, 1], aspect log-uniform; ten tries, then the centre."""
    for _ in range(10):
        area = height * width * random.uniform(spec.min_scale, 1.0)
        aspect = math.exp(random.uniform(math.log(spec.min_aspect), math.log(spec.max_aspect)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(random.integers(height - h + 1)), int(random.integers(width - w + 1)), h, w
    w, h = width, height
    if width / height < spec.min_aspect:
        h = round(width / spec.min_aspect)
    elif width / height > spec.max_aspect:
        w = round(height * spec.max_aspect)
    return (height - h) // 2, (width - w) // 2, h, w


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _jitter(augment: AugmentConfig, view: Image.Image, random: np.random.Generator) -> Image.Image:
    """Brightness, contrast, saturation and hue, each drawn uniformly, one after the other in random order."""
    strengths = [
        (TF.adjust_brightness, augment.brightness),
        (TF.adjust_contrast, augment.contrast),
        (TF.adjust_saturation, augment.saturation),
    ]
    changes = [(change, random.uniform(max(0.0, 1 - s), 1 + s)) for change, s in strengths]
    changes.append((TF.adjust_hue, random.uniform(-augment.hue, augment.hue)))
    for i in random.permutation(len(changes)):
        change, factor = changes[i]
        view = change(view, factor)
    return view


def _augment(augment: AugmentConfig, view: Image.Image, random: np.random.Generator) -> Image.Image:
    """Colour jitter, grey, blur and solarisation, each with its probability (SimCLR's and BYOL's order)."""
    jitter, grey, blur, solarise = random.random(4) < (
        augment.jitter_probability,
        augment.grey_probability,
        augment.blur_probability,
        augment.solarise_probability,
    )
    if jitter:
        view = _jitter(augment, view, random)
    if grey:
        view = view.convert("L").convert("RGB")
    if blur:
        view = view.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0) * view.width / 224))
    return ImageOps.solarize(view) if solarise else view


def random_view(spec: ViewSpec, image: Image.Image, random: np.random.Generator) -> Tensor:
    """A view of an RGB `image` as uint8 [3, size, size]; all randomness comes from `random`."""
    top, left, height, width = draw_crop(spec, image.height, image.width, random)
    size = [spec.size, spec.size]
    view = TF.resized_crop(image, top, left, height, width, size, InterpolationMode.BICUBIC)
    if random.random() < spec.flip_probability:
        view = TF.horizontal_flip(view)
    if spec.augment is not None:
        view = _augment(spec.augment, view, random)
    return _pixels(view)


def probe_view(config: DataConfig, image: Image.Image) -> Tensor:
    """The fixed view of a probe, uint8 [3, S, S]: short side to S / eval_crop_fraction, then the centre (224 of 256)."""
    view = TF.resize(image, [round(config.image_size / config.eval_crop_fraction)], InterpolationMode.BICUBIC)
    return _pixels(TF.center_crop(view, [config.image_size, config.image_size]))
