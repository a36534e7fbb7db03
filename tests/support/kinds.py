"""Kinds of image file, each with what its pixels must become, by a reference that reads no file, or why it is refused."""

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Array = npt.NDArray[Any]
H, W = 12, 16
_RANDOM = np.random.default_rng(20)
GREY = _RANDOM.integers(0, 256, (H, W), dtype=np.uint8)
RGB = _RANDOM.integers(0, 256, (H, W, 3), dtype=np.uint8)
ALPHA = _RANDOM.integers(0, 256, (H, W), dtype=np.uint8)
BITS = _RANDOM.integers(0, 2, (H, W), dtype=np.uint8) * 255
DEEP = _RANDOM.integers(0, 65536, (H, W), dtype=np.uint16)
DEEP_RGB = _RANDOM.integers(0, 65536, (H, W, 3), dtype=np.uint16)
INDICES = _RANDOM.integers(0, 256, (H, W), dtype=np.uint8)
PALETTE = _RANDOM.integers(0, 256, (256, 3), dtype=np.uint8)
SMOOTH = np.stack([np.add.outer(np.arange(H) * 9, np.arange(W) * 7) + 20 * c for c in range(3)], 2).astype(np.uint8)


@dataclass(frozen=True)
class Kind:
    """One kind: `expected` pixels within `off` grey levels, or a text of the refusal; `four` bands where data.channels=4 sees any."""

    name: str
    rule: str
    data: bytes
    expected: Array | None = None
    off: int = 0
    refused: str = ""
    four: Array | None = None
    rule_of_four: str = ""


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def grey(values: Array) -> Array:
    return np.repeat(values[:, :, None], 3, axis=2)


def palette_image() -> Image.Image:
    image = Image.fromarray(INDICES, "P")
    image.putpalette(PALETTE.tobytes())
    return image


def png16(values: Array, colour_type: int) -> bytes:
    """A PNG of 16 bits, which Pillow writes only for grey."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def with_alpha(colour: Array, alpha: Array) -> Array:
    return np.concatenate([colour if colour.ndim == 3 else colour[:, :, None], alpha[:, :, None]], 2)


def oriented(form: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(Image.fromarray(RGB), form, exif=exif)


def jpeg(image: Image.Image, **options: Any) -> tuple[bytes, Array]:
    """A JPEG, and what Pillow decodes: no reference without a decoder."""
    data = saved(image, "JPEG", **options)
    return data, np.array(Image.open(io.BytesIO(data)).convert("RGB"))


def tiff(values: Array, photometric: int, meanings: tuple[int, ...] = (), by_band: bool = False, deflated: bool = False) -> bytes:
    """A TIFF of [H, W, N] numbers whose further bands have these meanings: 0 none, 1 and 2 transparency; 1 is premultiplied."""
    height, width, bands = values.shape
    deep = 8 * values.dtype.itemsize
    planes = [values[:, :, i] for i in range(bands)] if by_band else [values]
    stored = [zlib.compress(data) if deflated else data for data in (p.astype(p.dtype.newbyteorder("<")).tobytes() for p in planes)]
    starts = [8 + sum(map(len, stored[:i])) for i in range(len(stored))]
    tags: list[tuple[int, str, list[int]]] = [
        (256, "H", [width]),
        (257, "H", [height]),
        (258, "H", [deep] * bands),
        (259, "H", [8 if deflated else 1]),
        (262, "H", [photometric]),
        (273, "I", starts),
        (277, "H", [bands]),
        (278, "H", [height]),
        (279, "I", [len(part) for part in stored]),
        (284, "H", [2 if by_band else 1]),
        *([(338, "H", list(meanings))] if meanings else []),
    ]
    at = 8 + sum(map(len, stored))
    after = at + 2 + 12 * len(tags) + 4
    entries = far = b""
    for number, kind, numbers in tags:
        packed = struct.pack(f"<{len(numbers)}{kind}", *numbers)
        if len(packed) > 4:
            place, far = struct.pack("<I", after + len(far)), far + packed
        else:
            place = packed.ljust(4, b"\0")
        entries += struct.pack("<HHI", number, {"H": 3, "I": 4}[kind], len(numbers)) + place
    return b"II*\0" + struct.pack("<I", at) + b"".join(stored) + struct.pack("<H", len(tags)) + entries + bytes(4) + far


def luma(rgb: Array) -> Array:
    """What Pillow calls L: the weights of ITU-R 601, rounded to the nearest."""
    return ((rgb.astype(int) @ [19595, 38470, 7471] + 32768) >> 16)[:, :, None]


def cmyk_as_rgb(values: Array) -> Array:
    colour, black = values[:, :, :3].astype(int), values[:, :, 3:].astype(int)
    return ((255 - colour) * (255 - black) / 255).round().astype(np.uint8)


def _lossless() -> list[Kind]:
    made: list[Kind] = []

    def add(name: str, rule: str, data: bytes, expected: Array, off: int = 0, four: Array | None = None, rule_of_four: str = "") -> None:
        made.append(Kind(name, rule, data, expected, off, four=four, rule_of_four=rule_of_four or "as stored"))

    def upper(values: Array) -> Array:
        return (values >> 8).astype(np.uint8)

    rgba, deep_rgba = with_alpha(RGB, ALPHA), with_alpha(DEEP_RGB, DEEP)
    one, keep, drop = "black and white", "as stored", "the transparency is ignored"
    cmyk = np.concatenate([RGB, GREY[:, :, None]], 2)
    for form, ending in (("PNG", "png"), ("TIFF", "tiff"), ("BMP", "bmp")):
        add(f"{ending}, 1 bit", one, saved(Image.fromarray(BITS).convert("1"), form), grey(BITS))
        add(f"{ending}, grey", "grey in all three channels", saved(Image.fromarray(GREY), form), grey(GREY))
        add(f"{ending}, palette", "the palette's colours", saved(palette_image(), form), PALETTE[INDICES])
        add(f"{ending}, RGB", keep, saved(Image.fromarray(RGB), form), RGB)
        add(f"{ending}, RGBA", drop, saved(Image.fromarray(rgba), form), RGB, four=None if form == "BMP" else rgba)
    for form, ending in (("PNG", "png"), ("TIFF", "tiff")):
        add(f"{ending}, grey with alpha", drop, saved(Image.fromarray(with_alpha(GREY, ALPHA)), form), grey(GREY))
        add(f"{ending}, grey of 16 bits", "the upper 8 bits", saved(Image.fromarray(DEEP), form), grey((DEEP >> 8).astype(np.uint8)))
    add("png, palette with a transparent colour", drop, saved(palette_image(), "PNG", transparency=7), PALETTE[INDICES])
    add("png, RGB of 16 bits", "the upper 8 bits", png16(DEEP_RGB, 2), (DEEP_RGB >> 8).astype(np.uint8))
    of_16 = (upper(DEEP_RGB), 0, upper(deep_rgba), "the upper 8 bits")
    add("png, RGBA of 16 bits", f"the upper 8 bits; {drop}", png16(deep_rgba, 6), *of_16)
    add("png, EXIF orientation", "not turned, as torchvision reads it", oriented("PNG"), RGB)
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits"):
        add(f"tiff, {compression.removeprefix('tiff_')}", keep, saved(Image.fromarray(RGB), "TIFF", compression=compression), RGB)
    add("tiff, CMYK", "light that both ink and black leave", saved(Image.fromarray(cmyk, "CMYK"), "TIFF"), cmyk_as_rgb(cmyk), 1, cmyk)
    fourth = "the fourth band is ignored"
    add("tiff, RGB and a band without a meaning", fourth, tiff(rgba, 2, (0,)), RGB, four=rgba)
    add("tiff, the same of 16 bits", f"the upper 8 bits; {fourth}", tiff(deep_rgba, 2, (0,)), *of_16)
    colours = (RGB.astype(int) * ALPHA[:, :, None] // 255).astype(np.uint8)
    back = np.where(ALPHA[:, :, None] > 0, colours * 255.0 / np.maximum(ALPHA[:, :, None], 1), colours).astype(np.uint8)
    divided = "the colors divided by the transparency"
    add("tiff, RGBA, premultiplied", divided, tiff(with_alpha(colours, ALPHA), 2, (1,)), back, 1, with_alpha(back, ALPHA), divided)
    add("tiff, grey and a band without a meaning", "the second band is ignored", tiff(with_alpha(GREY, ALPHA), 1, (0,)), grey(GREY))
    add("tiff, RGB, one band after the other", keep, tiff(RGB, 2, by_band=True), RGB)
    add("tiff, RGBA, one band after the other", drop, tiff(rgba, 2, (2,), by_band=True), RGB, four=rgba)
    frames = [Image.fromarray(np.roll(RGB, n, 0)) for n in (1, 2)]
    add("tiff, several pages", "the first page", saved(Image.fromarray(RGB), "TIFF", save_all=True, append_images=frames), RGB)
    add("webp, lossless", keep, saved(Image.fromarray(RGB), "WEBP", lossless=True), RGB)
    opaque = with_alpha(RGB, np.maximum(ALPHA, 1))
    add("webp, lossless with alpha", drop, saved(Image.fromarray(opaque), "WEBP", lossless=True, exact=True), RGB, four=opaque)
    add(
        "webp, animated",
        "the first frame",
        saved(Image.fromarray(RGB), "WEBP", lossless=True, save_all=True, append_images=frames),
        RGB,
    )
    add("ppm", keep, saved(Image.fromarray(RGB), "PPM"), RGB)
    add("ppm, with a comment", keep, b"P6\n# made by hand\n%d %d\n255\n" % (W, H) + RGB.tobytes(), RGB)
    add("pgm", "grey in all three channels", saved(Image.fromarray(GREY), "PPM"), grey(GREY))
    deep = b"P5\n%d %d\n65535\n" % (W, H) + DEEP.astype(">u2").tobytes()
    add("pgm of 16 bits", "the upper 8 bits", deep, grey((DEEP >> 8).astype(np.uint8)))
    return made


def _by_a_decoder() -> list[Kind]:
    smooth, rule = Image.fromarray(SMOOTH), "the pixels of Pillow's decoder"
    shapes: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "jpeg, grey": (Image.fromarray(SMOOTH[:, :, 0]), {}),
        "jpeg, 4:4:4": (smooth, {"subsampling": 0}),
        "jpeg, 4:2:0": (smooth, {"subsampling": 2}),
        "jpeg, progressive": (smooth, {"progressive": True}),
        "jpeg, CMYK": (smooth.convert("CMYK"), {}),
    }
    made = [Kind(name, rule, *jpeg(image, **options)) for name, (image, options) in shapes.items()]
    inks = made.pop()
    made.append(replace(inks, four=np.array(Image.open(io.BytesIO(inks.data))), rule_of_four="the inks of Pillow's decoder"))
    turned = oriented("JPEG")
    plain = np.array(Image.open(io.BytesIO(turned)).convert("RGB"))
    made.append(Kind("jpeg, EXIF orientation", "not turned, as torchvision reads it", turned, plain))
    lossy = saved(smooth, "WEBP")
    return [*made, Kind("webp, lossy", rule, lossy, np.array(Image.open(io.BytesIO(lossy)).convert("RGB")))]


def _refused() -> list[Kind]:
    def cut(image: Image.Image, form: str, **options: Any) -> bytes:
        data = saved(image, form, **options)
        return data[: len(data) * 2 // 3]

    known = "refused: the range is not known"
    whole = "refused: damaged"
    five = with_alpha(with_alpha(RGB, ALPHA), GREY)
    large = Image.fromarray(_RANDOM.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    return [
        Kind("tiff, integers of 32 bits", known, saved(Image.fromarray(DEEP.astype(np.int32)), "TIFF"), refused="32-bit integers"),
        Kind("tiff, floating-point numbers", known, saved(Image.fromarray(GREY.astype(np.float32)), "TIFF"), refused="floating-point"),
        Kind("tiff, five bands", "refused: more than four bands", tiff(five, 2, (0, 0)), refused="it has 5 bands"),
        Kind("tiff, CMYK and a fifth band", "refused: more than four bands", tiff(five, 5, (0,)), refused="it has 5 bands"),
        Kind(
            "tiff, three grey bands, one after the other",
            "refused: Pillow reads only the first",
            tiff(RGB, 1, (0, 0), by_band=True, deflated=True),
            refused="3 bands, of which Pillow reads 1",
        ),
        Kind(
            "tiff, RGB of 16 bits, one band after the other",
            "refused: Pillow misreads it",
            tiff(DEEP_RGB, 2, by_band=True),
            refused="stored one after the other",
        ),
        Kind("jpeg, cut short", whole, cut(large, "JPEG"), refused="truncated"),
        Kind("png, cut short", whole, cut(large, "PNG"), refused="truncated"),
        Kind("tiff, cut short", whole, cut(large, "TIFF"), refused=""),
        Kind("webp, cut short", whole, cut(large, "WEBP", lossless=True), refused=""),
        Kind("an empty file", "refused: no image", b"", refused="no image"),
        Kind("text with an image's ending", "refused: no image", b"<html>404</html>", refused="no image"),
    ]


def kinds() -> list[Kind]:
    """All of them."""
    return [*_lossless(), *_by_a_decoder(), *_refused()]


Made = Callable[[], list[Kind]]


def table() -> str:
    """The kinds and their rules, in Markdown."""
    lines = ["| file | what a run sees |", "|---|---|"]
    return "\n".join([*lines, *(f"| {kind.name} | {kind.rule} |" for kind in kinds())])


def table_of_four() -> str:
    """The kinds that data.channels=4 reads, in Markdown."""
    lines = ["| file | what a run with `data.channels=4` sees |", "|---|---|"]
    return "\n".join([*lines, *(f"| {kind.name} | {kind.rule_of_four} |" for kind in kinds() if kind.four is not None)])
