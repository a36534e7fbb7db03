"""Draw training views and probe views from an image (paper, section IV-A).

Randomness depends on (seed, epoch, sample, view). Views are uint8 [C, S, S], channels last in
memory; they are normalised on the device. The resize function is that of torchvision's transforms.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from cnnjepa.config import AugmentConfig
from cnnjepa.data.pictures import Picture, Pixels
from cnnjepa.data_config import DataConfig


@dataclass(frozen=True)
class ViewSpec:
    """Random crop, resized bicubically. It may be mirrored and changed in colour and sharpness."""

    size: int  # pixels per side
    min_scale: float
    flip_probability: float
    min_aspect: float = 3 / 4
    max_aspect: float = 4 / 3
    augment: AugmentConfig | None = None
    max_scale: float = 1.0


def crop_and_flip(config: DataConfig) -> ViewSpec:
    """Return the view of CNN-JEPA: random resized crop and horizontal flip."""
    return ViewSpec(config.image_size, config.min_crop_scale, config.flip_probability)


def augmented(config: DataConfig, augment: AugmentConfig) -> ViewSpec:
    """Return a view of the joint-embedding methods, with the crop and changes of `augment`."""
    import torchvision.transforms.v2.functional  # noqa: F401, loaded once, before the fork

    return ViewSpec(config.image_size, augment.min_crop_scale, config.flip_probability, augment=augment)


def draw_crop(spec: ViewSpec, height: int, width: int, random: np.random.Generator) -> tuple[int, int, int, int]:
    """Return top, left, height and width of a random crop, centred after ten failed tries.

    The area is uniform in [min_scale, max_scale] and the aspect is log-uniform.
    """
    for _ in range(10):
        area = height * width * random.uniform(spec.min_scale, spec.max_scale)
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


def _tensor(pixels_HWC: Pixels) -> Tensor:
    """Copy to [1, C, H, W] with channels-last strides: others are resized at half the speed."""
    return torch.from_numpy(np.array(pixels_HWC, order="C")).unsqueeze(0).permute(0, 3, 1, 2)


def _jitter(augment: AugmentConfig, view: Image.Image, random: np.random.Generator) -> Image.Image:
    """Adjust brightness, contrast, saturation and hue in random order, each by a uniform amount."""
    # imported here: takes a second, and only some methods need it
    from torchvision.transforms.v2 import functional as TF

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
    """Apply colour jitter, grey, blur and solarisation, each with its probability.

    The order is that of SimCLR and BYOL. What changes RGB alone must have the probability 0 for
    other channels (cnnjepa/rules.py); the blur treats each channel alike.
    """
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


def _reduction(specs: Sequence[ViewSpec], crops: Sequence[tuple[int, int, int, int]]) -> int:
    """Return the largest of 8, 4, 2 and 1 that leaves every crop at least as large as its view."""
    least = min(min(height, width) // spec.size for spec, (_, _, height, width) in zip(specs, crops))
    return next(f for f in (8, 4, 2, 1) if f <= max(least, 1))


def random_views(
    specs: Sequence[ViewSpec], picture: Picture, randoms: Sequence[np.random.Generator], dct_scaling: bool = False
) -> list[Tensor]:
    """Decode `picture` once and return one view per spec, uint8 [C, size, size].

    All randomness of a view comes from its own generator.
    """
    crops = [draw_crop(spec, picture.height, picture.width, random) for spec, random in zip(specs, randoms)]
    factor = _reduction(specs, crops) if dct_scaling else 1
    pixels = picture.pixels(max(top + height for top, _, height, _ in crops), factor)
    # crop edges move to the nearest pixel of the smaller image
    if pixels.shape[1] != picture.width:
        edges = np.round(np.array([(t, x, t + h, x + w) for t, x, h, w in crops]) / factor).astype(int)
        crops = [(t, x, min(b, pixels.shape[0]) - t, min(r, pixels.shape[1]) - x) for t, x, b, r in edges.tolist()]
    views = []
    for spec, random, (top, left, height, width) in zip(specs, randoms, crops):
        crop = _tensor(pixels[top : top + height, left : left + width])
        view = F.interpolate(crop, (spec.size, spec.size), mode="bicubic", antialias=True)
        if random.random() < spec.flip_probability:
            view = view.flip(-1)
        if spec.augment is not None:
            drawn = view[0].permute(1, 2, 0).contiguous().numpy()
            image = Image.fromarray(drawn[:, :, 0] if drawn.shape[2] == 1 else drawn)  # Pillow's L has no third axis
            changed = np.array(_augment(spec.augment, image, random))
            view = _tensor(changed.reshape(spec.size, spec.size, -1))
        views.append(view[0])
    return views


def probe_view(config: DataConfig, picture: Picture) -> Tensor:
    """Return the fixed view of a probe, uint8 [C, S, S].

    The short side is resized to S / eval_crop_fraction, then the centre is cropped (224 of 256).
    The pixels equal those of torchvision's `resize` and `center_crop`.
    """
    pixels, short = _tensor(picture.pixels()), round(config.image_size / config.eval_crop_fraction)
    height, width = (short * n // min(pixels.shape[2:]) for n in pixels.shape[2:])
    if (height, width) != pixels.shape[2:]:
        pixels = F.interpolate(pixels, (height, width), mode=config.probe_resize.value, antialias=True)
    top, left = (round((n - config.image_size) / 2) for n in (height, width))
    return pixels[0, :, top : top + config.image_size, left : left + config.image_size]
