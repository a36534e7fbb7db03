"""Encoders for images of another size are pointed out, in one line, by the command of a single run and of a sweep."""

import pytest

from cnnjepa.suited import size_line
from cnnjepa.task import identified
from jobs.config import compose_job


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["encoder.name=resnet_small", "data.image_size=224"],
            "encoder.name=resnet_small has cells of 8 pixels, for images of up to 96 pixels: at data.image_size=224 its map has 28x28, "
            "16 times as many as that of resnet18, which is made for them",
        ),
        (["encoder.name=resnet_small", "data.image_size=96"], ""),
        (
            ["encoder.name=resnet50", "method=byol", "data.image_size=32"],
            "encoder.name=resnet50 has cells of 32 pixels: of data.image_size=32 its map keeps 1x1; "
            "resnet_small is made for images so small",
        ),
        (
            ["encoder.name=convnext_tiny", "method=byol", "data.image_size=64"],
            "encoder.name=convnext_tiny has cells of 32 pixels: of "
            "data.image_size=64 its map keeps 2x2; resnet_small is made for images so small",
        ),
        (["encoder.name=resnet50", "data.image_size=96"], ""),
        (["encoder.name=resnet18", "data.image_size=224"], ""),
        (["encoder.name=vit_tiny", "method=byol", "data.image_size=28"], ""),
    ],
)
def test_an_encoder_for_other_sizes_is_pointed_out(words: list[str], line: str) -> None:
    config = compose_job(words).train
    assert size_line(config) == line
    assert identified([config, config])[1] == ([line] if line else [])


def test_what_the_presets_give_needs_no_warning() -> None:
    for words in ([], ["data=imagenet100", "encoder.name=resnet50"], ["data=fashion_mnist"]):
        config = compose_job(words).train
        assert size_line(config) == "", config.encoder.name
