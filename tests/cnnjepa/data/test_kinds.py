"""Each kind of image file becomes the pixels of its stated rule, or is refused by name: loose, packed, and as the docs say."""

import re
import struct
from pathlib import Path

import numpy as np
import pytest

from cnnjepa.data.datasets import FolderImages
from cnnjepa.data.opened import damaged
from cnnjepa.data.pictures import EncodedPicture
from tests.support.documented import ROOT
from tests.support.kinds import GREY, Kind, kinds, luma, saved, table, table_of_four

KINDS = kinds()
PAGE = ROOT / "docs" / "reference" / "image-files.md"


def folder_of(kind: Kind, folder: Path, channels: int = 3) -> FolderImages:
    (folder / "class").mkdir()
    (folder / "class" / "0.png").write_bytes(kind.data)  # readers go by the content
    return FolderImages.of(folder, ["class"], channels)


def test_there_are_forty_kinds() -> None:
    assert len({kind.name for kind in KINDS}) == len(KINDS) >= 40


@pytest.mark.parametrize("kind", [k for k in KINDS if k.expected is not None], ids=lambda k: k.name)
def test_a_file_becomes_the_pixels_of_its_rule(kind: Kind, tmp_path: Path) -> None:
    images = folder_of(kind, tmp_path)
    found = images.pictures([0])[0].pixels()
    assert (found.dtype, found.shape) == (np.uint8, kind.expected.shape)  # type: ignore[union-attr]
    assert int(np.abs(found.astype(int) - kind.expected).max()) <= kind.off
    assert damaged(images, [0]) == []


@pytest.mark.parametrize("kind", [k for k in KINDS if k.expected is not None], ids=lambda k: k.name)
def test_one_channel_is_the_luma_of_the_colours(kind: Kind, tmp_path: Path) -> None:
    images = folder_of(kind, tmp_path, channels=1)
    found = images.pictures([0])[0].pixels()
    assert kind.expected is not None
    assert (found.dtype, found.shape) == (np.uint8, (*kind.expected.shape[:2], 1))
    assert int(np.abs(found.astype(int) - luma(kind.expected)).max()) <= kind.off
    assert damaged(images, [0]) == []


@pytest.mark.parametrize("kind", [k for k in KINDS if k.four is not None], ids=lambda k: k.name)
def test_four_channels_are_the_bands_of_a_file_that_has_four(kind: Kind, tmp_path: Path) -> None:
    images = folder_of(kind, tmp_path, channels=4)
    found = images.pictures([0])[0].pixels()
    assert kind.four is not None
    assert (found.dtype, found.shape) == (np.uint8, kind.four.shape)
    assert int(np.abs(found.astype(int) - kind.four).max()) <= kind.off * (kind.rule_of_four != "as stored")
    assert damaged(images, [0]) == []


@pytest.mark.parametrize("kind", [k for k in KINDS if k.four is None], ids=lambda k: k.name)
def test_a_file_without_four_bands_is_refused_by_name(kind: Kind, tmp_path: Path) -> None:
    (found,) = damaged(folder_of(kind, tmp_path, channels=4), [0])
    assert found.place == str(tmp_path / "class" / "0.png")
    assert re.fullmatch(r"it has [123] bands?, and data.channels is 4", found.cause) or (
        kind.expected is None and kind.refused in found.cause
    )


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("kind", [k for k in KINDS if k.expected is None], ids=lambda k: k.name)
def test_a_file_that_is_refused_is_named_with_its_cause(kind: Kind, channels: int, tmp_path: Path) -> None:
    (found,) = damaged(folder_of(kind, tmp_path, channels), [0])
    assert found.place == str(tmp_path / "class" / "0.png")
    assert kind.refused in found.cause
    assert found.cause.isprintable()


def test_no_deep_image_is_clipped() -> None:
    """A grey ramp of 16 bits keeps its order: clipping would make almost all of it white."""
    from PIL import Image

    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(1, 256).repeat(8, 0)
    found = EncodedPicture(saved(Image.fromarray(ramp), "PNG")).pixels()
    assert len(np.unique(found)) == 256
    assert (np.diff(found[0, :, 0].astype(int)) >= 0).all()
    assert GREY.dtype == np.uint8


def test_the_page_lists_the_kinds_and_their_rules() -> None:
    assert table() in PAGE.read_text()
    assert table_of_four() in PAGE.read_text()


@pytest.mark.parametrize(
    ("bits", "meaning", "said"),
    [(12, 1, "its numbers have 12 bits, which Pillow does not scale"), (16, 0, "its zero means white in more than 8 bits")],
)
def test_grey_tiffs_that_would_be_dark_or_negative_are_refused(bits: int, meaning: int, said: str, tmp_path: Path) -> None:
    width, height, bytes_a_row = 8, 4, 12 if bits == 12 else 16
    entries = [
        (256, 3, width),
        (257, 3, height),
        (258, 3, bits),
        (259, 3, 1),
        (262, 3, meaning),
        (273, 4, 8),
        (277, 3, 1),
        (278, 3, height),
    ]
    entries.append((279, 4, bytes_a_row * height))
    body = bytes(bytes_a_row * height)
    table = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries) + bytes(4)
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "0.tif").write_bytes(struct.pack("<2sHI", b"II", 42, 8 + len(body)) + body + table)
    (found,) = damaged(FolderImages.of(tmp_path, ["class"]), [0])
    assert found.cause.startswith(said)
