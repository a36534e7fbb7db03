import dataclasses

import pytest

from cnnjepa.config import EncoderConfig, EncoderName, TrainConfig, WarningConfig, method_module, method_names
from cnnjepa.data_config import DATA_PRESETS, DataConfig, DatasetName, Resize
from cnnjepa.mask_config import MaskStrategy
from cnnjepa.methods.cnn_jepa import Config
from cnnjepa.rules import validate
from cnnjepa.run.identity import differences, from_dict, identity, signature, to_dict
from tests.support.tiny import tiny_config


def leaves(config: object, path: tuple[str, ...] = (), neutral: bool = False) -> list[tuple[tuple[str, ...], bool]]:
    found = []
    for f in dataclasses.fields(config):  # type: ignore[arg-type]
        is_neutral = f.metadata.get("neutral")
        value, outside = getattr(config, f.name), neutral or bool(is_neutral(config) if callable(is_neutral) else is_neutral)
        if dataclasses.is_dataclass(value):
            found += leaves(value, (*path, f.name), outside)
        else:
            found.append(((*path, f.name), outside))
    return found


ALL_LEAVES = leaves(tiny_config())


@pytest.mark.parametrize(("path", "neutral"), ALL_LEAVES, ids=[".".join(p) for p, _ in ALL_LEAVES])
def test_the_signature_changes_exactly_with_what_can_change_the_result(path: tuple[str, ...], neutral: bool) -> None:
    config = tiny_config()
    before, holder = signature(config), config
    for key in path[:-1]:
        holder = getattr(holder, key)
    value = getattr(holder, path[-1])
    if isinstance(value, list):
        changed: object = value[:1] if value else [1]
    elif hasattr(value, "name"):
        changed = next(v for v in type(value) if v is not value)
    elif isinstance(value, str):
        changed = value + "x"
    else:
        changed = type(value)(not value) if isinstance(value, bool) else value + 1
    setattr(holder, path[-1], changed)
    assert (signature(config) == before) is neutral


def test_neutral_are_only_what_cannot_change_a_result() -> None:
    assert {".".join(p) for p, neutral in ALL_LEAVES if neutral} == {
        "data.root",
        "data.verify",
        "data.workers",
        "encoder.execution",
        "encoder.compile",
        "encoder.graphs",
        "device",
        "threads",
        "checkpoint.every_minutes",
        "checkpoint.keep",
        "log.every_steps",
        "log.images_every_epochs",
        "log.tensorboard",
        "hang_minutes",
        "probes.at_epochs",
        "probes.collapsed_std",
        "probes.collapsed_rankme",
        *(f"warnings.{f.name}" for f in dataclasses.fields(WarningConfig)),
    }


def test_an_image_folder_is_distinguished_from_another_by_where_it_lies() -> None:
    cars, pets = (tiny_config(data=DataConfig(DatasetName.imagefolder, root=root)) for root in ("/cars", "/pets"))
    assert signature(cars) != signature(pets)
    assert differences(identity(cars), identity(pets)) == ["data.root: /cars -> /pets"]
    moved = [tiny_config(data=DataConfig(DatasetName.imagenet1k, root=root)) for root in ("/a", "/b")]
    assert signature(moved[0]) == signature(moved[1])


def test_a_configuration_survives_its_dictionary() -> None:
    config = tiny_config(seed=7)
    assert isinstance(config.method, Config)
    config.method.mask.strategy = MaskStrategy.random
    again = from_dict(to_dict(config))
    assert again == config
    assert type(again.method) is Config


def test_an_unknown_key_of_a_stored_configuration_is_named() -> None:
    values = to_dict(tiny_config())
    values["data"]["colour"] = 1
    with pytest.raises(ValueError, match=r"data\.colour must be a key of DataConfig"):
        from_dict(values)


def test_differences_name_the_leaves() -> None:
    old, new = to_dict(tiny_config()), to_dict(tiny_config(seed=1))
    new["method"]["ema"]["momentum_start"] = 0.5
    assert differences(old, new) == ["method.ema.momentum_start: 0.996 -> 0.5", "seed: 42 -> 1"]


def test_methods_are_found_by_file_name() -> None:
    assert "cnn_jepa" in method_names()


def test_the_papers_setting_is_the_default() -> None:
    config = TrainConfig(method=Config(), data=DATA_PRESETS["imagenet100_kaggle"])
    assert (config.global_batch_size, config.micro_batch_size, config.epochs) == (512, 128, 200)
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.optimizer.warmup_epochs) == (0.01, 0.01, 10)
    assert (config.method.ema.momentum_start, config.method.ema.momentum_end) == (0.996, 1.0)  # type: ignore[attr-defined]
    probes = config.probes
    assert (probes.linear_paper_epochs, probes.linear_paper_batch_size, probes.linear_paper_lr, probes.knn_k, probes.knn_temperature) == (
        90,
        512,
        1e-3,
        200,
        0.1,
    )
    assert config.data.probe_resize is Resize.bilinear


def test_four_ranks_of_the_papers_batch_fit_and_three_do_not() -> None:
    config = tiny_config(global_batch_size=512, micro_batch_size=128)
    validate(config, 4)
    with pytest.raises(ValueError, match="multiple of micro_batch_size x ranks, 128 x 3; got 512"):
        validate(config, 3)


GOLDEN_NAMES = {
    "cnn_jepa": "65cd1840ff9739d6",
    "byol": "9add9933f1cf40cf",
    "simclr": "60daaf623414e373",
    "vicreg": "62786b1cc34e5b95",
    "ijepa": "4f0962d3008cdc53",
    "supervised": "e8f7fc7ef3fff463",
    "random": "c7fda7725d1c4816",
    "spark": "8f9d576d90bca7e0",
    "lejepa": "c370633c5f8dafab",
    "digits": "200501355a081c54",
}


def test_runs_made_so_far_keep_their_names() -> None:
    """A default that changes, or a setting that comes without ADDED, renames each run there is: none would be found again."""
    names = {
        method: signature(TrainConfig(method=method_module(method).Config(), data=DATA_PRESETS["imagenet1k"], encoder=encoder))
        for method, encoder in (
            ("cnn_jepa", EncoderConfig(EncoderName.resnet50)),
            ("byol", EncoderConfig(EncoderName.resnet50)),
            ("simclr", EncoderConfig(EncoderName.resnet50)),
            ("vicreg", EncoderConfig(EncoderName.resnet50)),
            ("ijepa", EncoderConfig(EncoderName.vit_base)),
            ("supervised", EncoderConfig(EncoderName.resnet50)),
            ("random", EncoderConfig(EncoderName.resnet50)),
            ("spark", EncoderConfig(EncoderName.resnet50)),
            ("lejepa", EncoderConfig(EncoderName.resnet50)),
        )
    }
    names["digits"] = signature(TrainConfig(method=Config(), data=DATA_PRESETS["digits"]))
    assert names == GOLDEN_NAMES
