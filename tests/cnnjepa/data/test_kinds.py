"""Each kind of image file becomes the pixels of its stated rule, or is refused by name: loose, packed, and as the docs say."""

from pathlib import Path

import numpy as np
import pytest

from cnnjepa.data.datasets import FolderImages
from cnnjepa.data.opened import damaged
from cnnjepa.data.pictures import EncodedPicture
from tests.support.documented import ROOT
from tests.support.kinds import GREY, Kind, kinds, saved, table

KINDS = kinds()
PAGE = ROOT / "docs" / "reference" / "image-files.md"


def folder_of(kind: Kind, folder: Path) -> FolderImages:
    (folder / "class").mkdir()
    (folder / "class" / "0.png").write_bytes(kind.data)  # readers go by the content
    return FolderImages.of(folder, ["class"])


def test_there_are_forty_kinds() -> None:
    assert len({kind.name for kind in KINDS}) == len(KINDS) >= 40


@pytest.mark.parametrize("kind", [k for k in KINDS if k.expected is not None], ids=lambda k: k.name)
def test_a_file_becomes_the_pixels_of_its_rule(kind: Kind, tmp_path: Path) -> None:
    images = folder_of(kind, tmp_path)
    found = images.pictures([0])[0].pixels()
    assert (found.dtype, found.shape) == (np.uint8, kind.expected.shape)  # type: ignore[union-attr]
    assert int(np.abs(found.astype(int) - kind.expected).max()) <= kind.off
    assert damaged(images, [0]) == []


@pytest.mark.parametrize("kind", [k for k in KINDS if k.expected is None], ids=lambda k: k.name)
def test_a_file_that_is_refused_is_named_with_its_cause(kind: Kind, tmp_path: Path) -> None:
    (line,) = damaged(folder_of(kind, tmp_path), [0])
    place, _, cause = line.partition(": ")
    assert place == str(tmp_path / "class" / "0.png")
    assert kind.refused in cause
    assert cause.isprintable()


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
