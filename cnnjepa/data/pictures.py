"""Decode pictures lazily, only as far down as their crops reach; the pixels are Pillow's."""

import io
import re
import struct
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

Pixels = npt.NDArray[np.uint8]  # [H, W, C]: grey, RGB, or the four bands of a file

# Raised at damaged bytes. SyntaxError comes from Pillow's PNG reader; headers give the others too.
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, struct.error, Image.DecompressionBombError)

_JPEG = b"\xff\xd8\xff"
_PPM = re.compile(rb"P6\n(\d+) (\d+)\n255\n")  # as `as_ppm` writes it
# Frame headers of JPEGs that decode from top to bottom (baseline, extended), and all others.
_SEQUENTIAL, _OTHER_FRAMES = (0xC0, 0xC1), (0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
_SCAN = 0xDA
# Tags of a TIFF.
_BITS, _COMPRESSION, _MEANING, _SAMPLES, _PLANES = 258, 259, 262, 277, 284
_MOST_BANDS = 4


class Picture(Protocol):
    """One image of known size."""

    height: int
    width: int

    def pixels(self, rows: int = 0, factor: int = 1) -> Pixels:
        """Return at least the top `rows` rows, 0 for all.

        With a `factor` of 2, 4 or 8, the decoder may divide both sides by it.
        """
        ...


@dataclass
class Drawn:
    """A picture that is already decoded."""

    whole: Pixels

    def __post_init__(self) -> None:
        self.height, self.width = self.whole.shape[:2]

    def pixels(self, rows: int = 0, factor: int = 1) -> Pixels:
        """Return all pixels."""
        return self.whole


class EncodedPicture:
    """A picture that is decoded from the bytes of its file.

    libjpeg-turbo decodes JPEG, and PPM needs no decoding. Pillow decodes all other formats, and
    JPEGs that libjpeg-turbo refuses. `sound` bytes have been decoded before without a fault:
    nothing below their last crop is decoded. Raise OSError if Pillow cannot read the bytes either.
    The pixels are RGB; with 1 of `channels` their grey, with 4 the four bands of the file.
    """

    def __init__(self, data: bytes | memoryview, sound: bool = False, channels: int = 3) -> None:
        self.data, self.sound, self.channels = data, sound, channels
        self._pillow: Image.Image | None = None
        self._raw_from = 0
        few = channels < _MOST_BANDS  # neither PPM nor what simplejpeg decodes has so many
        if few and (header := _PPM.match(bytes(data[:32]))) and len(data) == header.end() + 3 * int(header[1]) * int(header[2]):
            self.width, self.height, self._raw_from = int(header[1]), int(header[2]), header.end()
            return
        if few and bytes(data[:3]) == _JPEG:
            try:
                height, width, colours, _ = simplejpeg.decode_jpeg_header(data, strict=False)
                self.height, self.width = int(height), int(width)
                if colours in ("YCbCr", "Gray", "RGB"):
                    return
            except (ValueError, KeyError):  # KeyError: a header without a frame
                pass  # Pillow reports the error
        self._pillow = Image.open(io.BytesIO(data))
        self.width, self.height = self._pillow.size

    def pixels(self, rows: int = 0, factor: int = 1) -> Pixels:
        """Return the pixels, a read-only view for PPM; raise OSError if the bytes are damaged.

        Raise it also for an image that no rule of docs/reference/image-files.md turns into so many
        channels.
        """
        decoded = self._decoded(rows, factor)
        return as_grey(decoded) if self.channels == 1 else decoded

    def _decoded(self, rows: int, factor: int) -> Pixels:
        if self._raw_from:
            return np.frombuffer(self.data, np.uint8, offset=self._raw_from).reshape(self.height, self.width, 3)
        if self._pillow is None:
            try:
                if factor > 1:
                    least = {"min_height": -(-self.height // factor), "min_width": -(-self.width // factor), "min_factor": factor}
                    return simplejpeg.decode_jpeg(self.data, strict=not self.sound, **least)
                if self.sound and 0 < rows < self.height and (shorter := _of_height(self.data, rows)):
                    return simplejpeg.decode_jpeg(shorter, strict=False)
                return simplejpeg.decode_jpeg(self.data, strict=not self.sound)
            except ValueError:
                self._pillow = Image.open(io.BytesIO(self.data))
        return four_bands(self._pillow) if self.channels == _MOST_BANDS else as_rgb(self._pillow)


def as_grey(rgb: Pixels) -> Pixels:
    """Return the luma of RGB, [H, W, 1]: Pillow's L. Grey stays as it is.

    It is computed from the decoded colours also for JPEG, whose own luma differs by up to 10 where
    the chroma is subsampled: a file has the same pixels however it is decoded.
    """
    return np.array(Image.fromarray(rgb).convert("L"))[:, :, None]


def as_rgb(image: Image.Image) -> Pixels:
    """Return the image as RGB of 8 bits, by the rules of docs/reference/image-files.md.

    Grey of 16 bits keeps its upper 8, as Pillow keeps those of 16-bit RGB. The rest is Pillow's
    conversion: without transparency, EXIF orientation, or the frames after the first. Raise OSError
    for numbers of no known range, which a conversion would clip, and for further bands.
    """
    bands, read = _bands(image), len(image.getbands())
    if bands > read + 1:  # one more may be transparency, which is ignored in any file
        raise OSError(f"it has {bands} bands, of which Pillow reads {read}: save it with those to train on")
    # Pillow scales what it reads from a PGM of more than 8 bits to 16, and calls it I.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        upper = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(upper[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        kind = "integers" if image.mode == "I" else "floating-point numbers"
        raise OSError(f"its pixels are 32-bit {kind}, whose range is not known: save it with 8 or 16 bits")
    return np.array(image.convert("RGB"))


def four_bands(image: Image.Image) -> Pixels:
    """Return the bands of 8 bits as stored, [H, W, 4]; raise OSError for an image without four."""
    if (bands := _bands(image)) != _MOST_BANDS:
        raise OSError(f"it has {bands} band{'s' * (bands > 1)}, and data.channels is {_MOST_BANDS}")
    if image.mode == "RGB" and all(str(tile.args[0]).startswith("RGBX") for tile in image.tile):  # type: ignore[attr-defined]
        image._mode = "RGBX"  # otherwise Pillow leaves out a fourth band whose meaning is not stated
    if len(image.getbands()) != _MOST_BANDS:
        raise OSError(f"it has {bands} bands, of which Pillow reads {len(image.getbands())}")
    return np.array(image)


def _bands(image: Image.Image) -> int:
    """Return the bands that the file holds; raise OSError if it holds more than any reader here knows.

    Raise it also for a TIFF whose bands Pillow confuses.
    """
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    bands = int(tags.get(_SAMPLES, len(image.getbands())))
    if bands > _MOST_BANDS:
        raise OSError(f"it has {bands} bands: save it with at most {_MOST_BANDS}")
    if 12 in tags.get(_BITS, ()):
        raise OSError("its numbers have 12 bits, which Pillow does not scale: save it with 8 or 16 bits")
    if tags.get(_MEANING) == 0 and max(tags.get(_BITS, (8,))) > 8:
        raise OSError("its zero means white in more than 8 bits, which Pillow does not invert: save it with zero for black")
    # each band for itself, not compressed: Pillow takes the bytes of one for those of the next
    if bands > 1 and tags.get(_PLANES) == 2 and tags.get(_COMPRESSION) == 1 and max(tags.get(_BITS, (8,))) > 8:
        raise OSError("its bands of 16 bits are stored one after the other, which Pillow misreads: save them pixel by pixel")
    return bands


def as_ppm(pixels: Pixels) -> bytes:
    """Encode pixels as PPM: the simplest widely readable format, which needs no decoding."""
    return b"P6\n%d %d\n255\n" % (pixels.shape[1], pixels.shape[0]) + pixels.tobytes()


def _of_height(data: bytes | memoryview, rows: int) -> bytearray | None:
    """Return the JPEG with a header that declares fewer rows, so that a decoder stops early.

    The first `rows` rows keep their pixels; one more is kept because chroma is interpolated across
    rows. Return None if the JPEG cannot be cut.
    """
    at = 2
    while at + 9 < len(data) and data[at] == 0xFF:
        kind, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        if kind in _SEQUENTIAL:
            height, components = data[at + 5] << 8 | data[at + 6], data[at + 9]
            block = 8 * max(data[at + 11 + 3 * c] & 15 for c in range(components))
            kept = -(-(rows + 1) // block) * block
            if kept >= height or not _one_scan(data, at + 2 + length, components):
                return None
            shorter = bytearray(data)
            shorter[at + 5 : at + 7] = kept.to_bytes(2, "big")
            return shorter
        if kind in _OTHER_FRAMES or kind == _SCAN:
            return None
        at += 2 + length
    return None


def _one_scan(data: bytes | memoryview, at: int, components: int) -> bool:
    """Return whether one scan holds all components.

    Otherwise all rows of the first component precede those of the second.
    """
    while at + 4 < len(data) and data[at] == 0xFF:
        if data[at + 1] == _SCAN:
            return data[at + 4] == components
        at += 2 + (data[at + 2] << 8 | data[at + 3])
    return False
