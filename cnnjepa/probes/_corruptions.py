"""Corrupt images as ImageNet-C does (Hendrycks and Dietterich 2019, arXiv 1903.12261), at severities 1 to 5.

These are seven of its fifteen kinds, those that need no other images and no weather model, with its
strengths. Blur scales with the view, since its strengths are for 224 pixels. What is random depends
on the image's number in its set alone.
"""

import io
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cnnjepa.data.pictures import Pixels
from cnnjepa.randomness import Stream, generator

_NOISE_STD = (0.08, 0.12, 0.18, 0.26, 0.38)  # of pixels in [0, 1]
_IMPULSE_SHARE = (0.03, 0.06, 0.09, 0.17, 0.27)  # of the values; half of them 0, half 1
_BLUR_SIGMA = (1.0, 2.0, 3.0, 4.0, 6.0)  # pixels at 224
_PIXELATE = (0.6, 0.5, 0.4, 0.3, 0.25)  # side of the small image over the side
_CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)  # factor of the distance from the mean
_BRIGHTNESS = (0.1, 0.2, 0.3, 0.4, 0.5)  # added to the V of HSV
_JPEG_QUALITY = (25, 18, 15, 10, 7)


def _random(positions: Sequence[int], kind: int, shape: torch.Size) -> list[np.random.Generator]:
    return [generator(0, Stream.probe, 2, kind, position) for position in positions[: shape[0]]]


def gaussian_noise(pixels_BCHW: Tensor, level: int, positions: Sequence[int]) -> Tensor:
    """Add independent noise to each value."""
    noise = [r.standard_normal(pixels_BCHW.shape[1:], np.float32) for r in _random(positions, 0, pixels_BCHW.shape)]
    return pixels_BCHW + _NOISE_STD[level] * torch.from_numpy(np.stack(noise))


def impulse_noise(pixels_BCHW: Tensor, level: int, positions: Sequence[int]) -> Tensor:
    """Set a share of the values to black or white (salt and pepper)."""
    drawn = torch.from_numpy(np.stack([r.random(pixels_BCHW.shape[1:], np.float32) for r in _random(positions, 1, pixels_BCHW.shape)]))
    share = _IMPULSE_SHARE[level]
    return torch.where(drawn < share / 2, 0.0, torch.where(drawn < share, 1.0, pixels_BCHW))


def gaussian_blur(pixels_BCHW: Tensor, level: int, positions: Sequence[int]) -> Tensor:
    """Blur each channel."""
    from torchvision.transforms.v2 import functional as TF

    side = min(pixels_BCHW.shape[2:])
    sigma = _BLUR_SIGMA[level] * side / 224
    reach = min(max(round(4 * sigma), 1), (side - 1) // 2)
    return TF.gaussian_blur(pixels_BCHW, [2 * reach + 1] * 2, [sigma, sigma])


def pixelate(pixels_BCHW: Tensor, level: int, positions: Sequence[int]) -> Tensor:
    """Shrink by the mean over areas, and enlarge by repetition."""
    height, width = pixels_BCHW.shape[2:]
    small = (max(round(height * _PIXELATE[level]), 1), max(round(width * _PIXELATE[level]), 1))
    shrunk = torch.nn.functional.interpolate(pixels_BCHW, small, mode="area")
    return torch.nn.functional.interpolate(shrunk, (height, width), mode="nearest-exact")


def contrast(pixels_BCHW: Tensor, level: int, positions: Sequence[int]) -> Tensor:
    """Move each value towards its channel's mean in the image."""
    mean = pixels_BCHW.mean((2, 3), keepdim=True)
    return (pixels_BCHW - mean) * _CONTRAST[level] + mean


def brightness(pixels_BCHW: Tensor, level: int, positions: Sequence[int]) -> Tensor:
    """Add to the brightest channel of each pixel, and raise the others by the same factor: the V of HSV."""
    value = pixels_BCHW.amax(1, keepdim=True)
    raised = (value + _BRIGHTNESS[level]).clamp(max=1)
    return torch.where(value > 0, pixels_BCHW * (raised / value.clamp_min(1e-6)), raised)


def jpeg(pixels_BCHW: Tensor, level: int, positions: Sequence[int]) -> Tensor:
    """Compress and decode; channels that are neither grey nor RGB are compressed one by one."""
    whole = to_uint8(pixels_BCHW)
    if whole.shape[1] != 3:
        whole = whole.reshape(-1, 1, *whole.shape[2:])
    decoded = torch.from_numpy(np.stack([_decoded(image.permute(1, 2, 0).numpy(), _JPEG_QUALITY[level]) for image in whole]))
    return decoded.permute(0, 3, 1, 2).reshape(pixels_BCHW.shape).float() / 255


def _decoded(pixels_HWC: Pixels, quality: int) -> Pixels:
    """Return an image after Pillow has written it as JPEG and read it again."""
    file = io.BytesIO()
    Image.fromarray(pixels_HWC if pixels_HWC.shape[2] == 3 else pixels_HWC[:, :, 0]).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file)).reshape(pixels_HWC.shape)


def to_uint8(pixels: Tensor) -> Tensor:
    """Return values of [0, 1], clipped to it, as pixels."""
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8)


_KINDS: dict[str, Callable[[Tensor, int, Sequence[int]], Tensor]] = {
    each.__name__: each for each in (gaussian_noise, impulse_noise, gaussian_blur, pixelate, contrast, brightness, jpeg)
}


def corrupted(pixels_BCHW: Tensor, kind: str, severity: int, positions: Sequence[int]) -> Tensor:
    """Return uint8 views [B, C, H, W] corrupted; `positions` are the numbers of the images in their set."""
    return to_uint8(_KINDS[kind](pixels_BCHW.contiguous().float() / 255, severity - 1, positions))
