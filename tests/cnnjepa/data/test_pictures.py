"""What is decoded is what Pillow decodes, whole or in part, and nothing damaged passes for an image."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from cnnjepa.data import pictures
from cnnjepa.data.pictures import Drawn, EncodedPicture
from cnnjepa.data.views import ViewSpec, _reduction, random_views
from tests.support.images import picture

SPEC = ViewSpec(64, 0.2, 0.5)


def encoded(kind: str = "JPEG", image: Image.Image | None = None, **options: object) -> bytes:
    file = io.BytesIO()
    (image or picture(150, 203)).save(file, kind, **options)
    return file.getvalue()


FILES = {
    "420": encoded(quality=90),
    "422": encoded(quality=90, subsampling="4:2:2"),
    "444": encoded(quality=95, subsampling="4:4:4"),
    "restarts": encoded(restart_marker_rows=1),
    "progressive": encoded(progressive=True),
    "grey": encoded(image=picture(150, 203).convert("L")),
    "cmyk": encoded(image=picture(150, 203).convert("CMYK")),
    "rgb": encoded(keep_rgb=True),
    "png": encoded("PNG"),
    "palette": encoded("PNG", picture(150, 203).convert("P")),
    "exif": encoded(exif=Image.Exif().tobytes() + bytes(300)),
}


@pytest.mark.parametrize("name", FILES)
def test_pixels_are_pillows_whole_and_down_to_any_row(name: str) -> None:
    expected = np.array(Image.open(io.BytesIO(FILES[name])).convert("RGB"))
    for sound in (False, True):
        one = EncodedPicture(memoryview(FILES[name]), sound)
        assert (one.height, one.width) == (203, 150)
        assert np.array_equal(one.pixels(), expected)
        for rows in (1, 15, 16, 17, 100, 186, 202, 203):
            assert np.array_equal(one.pixels(rows)[:rows], expected[:rows]), rows


@pytest.mark.parametrize("name", ["420", "444", "422", "restarts", "grey"])
def test_rows_below_the_crop_are_not_decoded(name: str) -> None:
    assert EncodedPicture(FILES[name], sound=True).pixels(60).shape[0] == 64
    assert EncodedPicture(FILES[name], sound=False).pixels(60).shape[0] == 203  # it may be damaged further down


@pytest.mark.parametrize("sound", [True, False])
def test_views_of_part_of_the_image_are_those_of_the_whole(sound: bool) -> None:
    whole = Drawn(np.array(Image.open(io.BytesIO(FILES["420"])).convert("RGB")))
    for seed in range(30):
        a, b = (
            random_views([SPEC, SPEC], p, [np.random.default_rng(seed), np.random.default_rng(99 + seed)])
            for p in (whole, EncodedPicture(FILES["420"], sound))
        )
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", ["420", "progressive", "png"])
def test_bytes_that_end_too_early_are_an_error(name: str) -> None:
    with pytest.raises(OSError, match="truncated"):
        EncodedPicture(FILES[name][: len(FILES[name]) * 2 // 3]).pixels()


def test_bytes_that_are_no_image_are_an_error() -> None:
    for data in (b"", b"\xff\xd8\xff", b"not an image"):
        with pytest.raises(OSError, match="cannot identify image file"):
            EncodedPicture(data)


def test_scaled_decoding_is_close_and_leaves_crops_alone_that_are_too_small_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = []
    pixels = pictures.EncodedPicture.pixels
    monkeypatch.setattr(
        pictures.EncodedPicture, "pixels", lambda self, rows, factor: (factors.append(factor), pixels(self, rows, factor))[1]
    )
    large = encoded(image=picture(1000, 750), quality=95)
    for seed in range(40):
        exact, scaled = (random_views([SPEC], EncodedPicture(large), [np.random.default_rng(seed)], dct)[0] for dct in (False, True))
        assert (exact.int() - scaled.int()).abs().float().mean() < 4
    assert set(factors[0::2]) == {1}
    assert set(factors[1::2]) <= {4, 8}
    small = random_views([SPEC], EncodedPicture(encoded(image=picture(120, 100))), [np.random.default_rng(0)], True)[0]
    assert torch.equal(small, random_views([SPEC], EncodedPicture(encoded(image=picture(120, 100))), [np.random.default_rng(0)])[0])


@pytest.mark.parametrize(
    ("crops", "factor"),
    [
        ([(64, 64)], 1),
        ([(128, 127)], 1),
        ([(128, 128)], 2),
        ([(255, 300)], 2),
        ([(256, 300)], 4),
        ([(600, 512)], 8),
        ([(5000, 5000)], 8),
        ([(600, 600), (300, 300)], 4),
        ([(40, 40)], 1),
    ],
)
def test_a_picture_is_reduced_no_further_than_each_view_needs(crops: list[tuple[int, int]], factor: int) -> None:
    assert _reduction([SPEC] * len(crops), [(3, 5, height, width) for height, width in crops]) == factor
