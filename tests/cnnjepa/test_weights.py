"""Weights that an encoder starts from: every way to give them, what does not match, and that their content is what counts."""

import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cnnjepa import task, weights
from cnnjepa.config import EncoderConfig, EncoderName, TrainConfig, method_module, method_names
from cnnjepa.methods._base import build_method
from cnnjepa.models.encoders import build_encoder
from cnnjepa.references import random_encoder, references
from cnnjepa.rules import validate
from cnnjepa.run.folder import RunError, RunFolder
from cnnjepa.run.identity import from_dict, signature, to_dict
from cnnjepa.run.ranks import Ranks
from tests.support.documented import ROOT
from tests.support.runs import final_state, run
from tests.support.tiny import tiny_config

HERE = Ranks(0, 1, torch.device("cpu"))
SMALL = EncoderConfig(width=8)


def state(seed: int = 5, encoder: EncoderConfig = SMALL) -> dict[str, Tensor]:
    """Weights that no run here begins with, their statistics too."""
    found = build_encoder(encoder, 32, seed, 3).state_dict()
    return {name: value + 0.01 if value.is_floating_point() else value + 3 for name, value in found.items()}


def starting(source: Path | str, keys: list[str] | None = None, **changes: object) -> TrainConfig:
    return tiny_config(encoder=replace(SMALL, weights=str(source), weights_keys=keys or []), **changes)


def equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def loaded(source: Path | str, keys: list[str] | None = None) -> tuple[dict[str, Tensor], str]:
    return weights.loaded(replace(SMALL, weights=str(source), weights_keys=keys or []), 32, 3)


def test_a_safetensors_file_and_a_torch_file_give_the_same_run(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "a.safetensors")
    torch.save(state(), tmp_path / "b.pt")
    configs, lines = task.identified([starting(tmp_path / "a.safetensors"), starting(tmp_path / "b.pt")])
    assert signature(configs[0]) == signature(configs[1]) != signature(tiny_config(encoder=SMALL))
    assert [line.endswith(f"{len(weights_of())} of {len(weights_of())} tensors of the encoder") for line in lines] == [True, True]
    torch.save(state(6), tmp_path / "b.pt")
    (other,), _ = task.identified([starting(tmp_path / "b.pt")])
    assert signature(other) != signature(configs[0]), "the content is part of the run ID"
    assert from_dict(to_dict(configs[0])) == configs[0]


def weights_of() -> list[str]:
    return [name for name in state() if not name.endswith("num_batches_tracked")]


@pytest.mark.parametrize(
    ("wrapped", "said"),
    [
        (lambda s: {"state_dict": {f"module.encoder_q.{k}": v for k, v in s.items()}}, "begin with state_dict.module.encoder_q."),
        (lambda s: {"model": s, "epoch": 3, "optimizer": {"lr": 0.1}}, "begin with model."),
        (lambda s: {**{f"backbone.{k}": v for k, v in s.items()}, "head.weight": torch.ones(2)}, "and not used: head.weight"),
        (lambda s: {**s, "fc.weight": torch.ones(2), "fc.bias": torch.ones(2)}, "not in the encoder, and not used: fc.weight, fc.bias"),
        (lambda s: {k: v for k, v in s.items() if "num_batches" not in k}, "counts of batches are not in it and begin at 0"),
    ],
)
def test_other_checkpoints_are_taken_and_what_did_not_match_is_listed(wrapped: object, said: str, tmp_path: Path) -> None:
    torch.save(wrapped(state()), tmp_path / "other.pth")  # type: ignore[operator]
    found, line = loaded(tmp_path / "other.pth")
    known = {name: value for name, value in state().items() if not name.endswith("num_batches_tracked")}
    assert equal({name: found[name] for name in known}, known)
    assert said in line


def test_names_are_mapped_as_the_user_says(tmp_path: Path) -> None:
    both = {f"q.{k}": v for k, v in state(5).items()} | {f"k.{k}": v for k, v in state(6).items()}
    torch.save(both, tmp_path / "both.pth")
    with pytest.raises(
        ValueError, match=r"must hold the encoder once; .* under k\. and q\.: choose one with encoder.weights_keys=\['k\.='\]"
    ):
        loaded(tmp_path / "both.pth")
    for start, seed in (("q.", 5), ("k.", 6)):
        found, line = loaded(tmp_path / "both.pth", [f"{start}="])
        assert equal(found, state(seed))
        assert f"not in the encoder, and not used: {'k' if start == 'q.' else 'q'}." in line
    torch.save({k.replace("layer1.", "stage_a."): v for k, v in state().items()}, tmp_path / "named.pth")
    assert equal(loaded(tmp_path / "named.pth", ["stage_a.=layer1."])[0], state())
    with pytest.raises(ValueError, match=r"encoder.weights_keys must hold entries OLD=NEW, the beginnings of names; got x"):
        validate(starting("a", ["x"]))
    with pytest.raises(ValueError, match=r"encoder.weights must be given with encoder.weights_keys; got none"):
        validate(starting("", ["a="]))
    with pytest.raises(ValueError, match=r"encoder.weights must be given with encoder.weights_digest, their digest; got none"):
        validate(tiny_config(encoder=replace(SMALL, weights_digest="ab")))


def test_two_names_that_become_one_are_refused(tmp_path: Path) -> None:
    torch.save({**state(), "q.conv1.weight": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"weights_keys must give each tensor a name of its own; got conv1.weight for two of them"):
        loaded(tmp_path / "w.pth", ["q.="])


def test_what_cannot_be_the_encoder_is_refused_in_one_line(tmp_path: Path) -> None:
    lacking = {k: v for k, v in state().items() if not k.startswith("layer2.0.conv1")}
    other = {**state(), "conv1.weight": torch.ones(16, 3, 3, 3)}
    torch.save(lacking, tmp_path / "lacking.pth")
    torch.save(other, tmp_path / "other.pth")
    torch.save(nn.Linear(2, 2), tmp_path / "code.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"\x40")
    (tmp_path / "text.pth").write_text("weights")
    (tmp_path / "pointer.pth").write_text("version https://git-lfs.github.com/spec/v1")
    (tmp_path / "a.pth").write_text("a list of things")
    (tmp_path / "folder").mkdir()
    for name, said in {
        "lacking.pth": r"hold every tensor of the encoder; got .*, which lacks layer2.0.conv1.weight of the encoder's \d+ tensors",
        "other.pth": r"of the encoder's shapes; .* where conv1.weight is 16x3x3x3 and the encoder's is 8x3x3x3: choose the encoder",
        "code.pth": "be a torch file of tensors, which is read without running code; got .*, which holds Python objects beside tensors",
        "list.pth": "hold tensors by name; got .*, a list without any",
        "cut.safetensors": "be a whole .safetensors file; got .*, which cannot be read",
        **dict.fromkeys(("text.pth", "pointer.pth", "a.pth"), "be a torch file of tensors, .*; got .*, which cannot be read"),
        "gone.pth": r"name a run folder, SWEEP_FOLDER/TRIAL, a .safetensors or torch file, torchvision:NAME or .*does not exist",
        "folder": "a run folder must hold config.yaml",
    }.items():
        with pytest.raises(ValueError, match=said) as raised:
            loaded(tmp_path / name)
        assert "\n" not in str(raised.value)
        assert "\x1b" not in str(raised.value)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    class Touches:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"conv1.weight": Touches()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="holds Python objects"):
        loaded(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_weights_of_torchvision_come_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import ResNet18_Weights, resnet18

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub" / "checkpoints" / ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    model = resnet18(weights=None)
    torch.save(model.state_dict(), cached)
    encoder = EncoderConfig(EncoderName.resnet18)
    for name in ("resnet18", "ResNet18_Weights.IMAGENET1K_V1"):
        found, line = weights.loaded(replace(encoder, weights=f"torchvision:{name}"), 96, 3)
        assert torch.equal(found["layer4.1.conv2.weight"], model.layer4[1].conv2.weight)
        assert line.endswith("not in the encoder, and not used: fc.weight, fc.bias")
    with pytest.raises(ValueError, match=r"must name weights that torchvision can load here; got torchvision:nothing, ValueError: Unknown"):
        weights.loaded(replace(encoder, weights="torchvision:nothing"), 96, 3)


@pytest.mark.slow
def test_weights_of_timm_come_from_its_cache(tmp_path: Path) -> None:
    """In a process of its own: the hub's library reads its variables when it is imported."""
    import timm

    model = timm.create_model("resnet18.a1_in1k", pretrained=False)
    snapshot = tmp_path / "models--timm--resnet18.a1_in1k" / "snapshots" / ("1" * 40)
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("1" * 40)
    save_file(model.state_dict(), snapshot / "model.safetensors")
    code = (
        "from cnnjepa import weights; from cnnjepa.config import EncoderConfig, EncoderName\n"
        "print(weights.loaded(EncoderConfig(EncoderName.resnet18, weights='timm:resnet18.a1_in1k'), 96, 3)[1])\n"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "encoder.weights timm:resnet18.a1_in1k: 100 of 100 tensors of the encoder; not in the encoder, and not used: fc" in done.stdout


@pytest.mark.parametrize("name", [name for name in method_names() if name != "ijepa"])
def test_every_method_starts_from_them_with_each_copy_of_its_encoder(name: str, tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "w.pt")
    config = starting(tmp_path / "w.pt", method=method_module(name).Config())
    method = build_method(config, 10, HERE.device)
    method.start_from(weights.planned(config))
    copies = [module for module in method.modules() if type(module) is type(method.encoder)]
    assert len(copies) == 1 + (name in ("byol", "cnn_jepa"))
    assert all(equal(copy.state_dict(), state()) for copy in copies)


def test_a_vit_starts_from_weights_too(tmp_path: Path) -> None:
    encoder = EncoderConfig(EncoderName.vit_tiny, patch_size=8, vit_depth=2)
    save_file({k: v.contiguous() for k, v in state(5, encoder).items()}, tmp_path / "vit.safetensors")
    config = tiny_config(encoder=replace(encoder, weights=str(tmp_path / "vit.safetensors")), method=method_module("ijepa").Config())
    method = build_method(config, 10, HERE.device)
    method.start_from(weights.planned(config))
    assert equal(method.encoder.state_dict(), state(5, encoder))
    assert equal(method.target_encoder.state_dict(), state(5, encoder))


def test_a_run_begins_with_them_resumes_without_them_and_refuses_others(tmp_path: Path) -> None:
    file = tmp_path / "w.pt"
    torch.save(state(), file)
    (config,), _ = task.identified([starting(file, epochs=1)])
    looks = iter(range(100))
    assert run(config, tmp_path / "run", should_stop=lambda: next(looks) == 1) is None
    torch.save(state(6), file)
    with pytest.raises(RunError) as raised:
        run(config, tmp_path / "other")
    assert "encoder.weights must hold the weights that the run was planned with, " in str(raised.value)
    with pytest.raises(ValueError, match=r"restore them, or begin a new run without encoder\.weights_digest"):
        task.identified([config])
    file.unlink()
    result = run(config, tmp_path / "run")
    assert result is not None
    assert result.resumes == 1
    with pytest.raises(RunError) as raised:
        run(config, tmp_path / "third")
    assert "does not exist" in str(raised.value)


def test_its_first_step_is_taken_from_the_weights(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "w.pt")
    config = starting(tmp_path / "w.pt", epochs=1)
    config.optimizer.lr, config.optimizer.weight_decay = 1e-12, 0.0
    run(config, tmp_path / "run")
    assert torch.allclose(final_state(tmp_path / "run")["method"]["encoder.conv1.weight"], state()["conv1.weight"], atol=1e-6)


def test_the_weights_of_a_run_are_those_that_it_exports(tmp_path: Path) -> None:
    config = tiny_config(encoder=SMALL, epochs=1)
    run(config, tmp_path / "run")
    found, line = loaded(tmp_path / "run")
    assert equal(found, task.encoder(config, final_state(tmp_path / "run")).state_dict())
    assert f"encoder.weights {tmp_path / 'run'}: " in line


def test_probed_without_training_they_keep_their_own_statistics_and_are_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(state(), tmp_path / "w.pt")
    config = starting(tmp_path / "w.pt", epochs=1, method=method_module("random").Config())
    config.probes.names = ["knn"]
    sweep = tmp_path / "sweep" / "trials"
    with caplog.at_level(logging.WARNING):
        result = run(config, sweep / "run")
    assert result is not None
    method = final_state(sweep / "run")["method"]
    assert torch.equal(method["encoder.bn1.running_mean"], state()["bn1.running_mean"])
    assert set(result.references) == {"the weights it starts from", "chance level"}
    trained = starting(tmp_path / "w.pt", epochs=1)
    trained.probes.names = ["knn"]
    splits = task_splits(trained)
    assert equal(random_encoder(trained, splits, HERE).state_dict(), state())
    from cnnjepa.probes import run_probes

    found = run_probes(random_encoder(trained, splits, HERE), trained, splits, HERE, final=True)
    compared = references(trained, RunFolder(sweep / "other"), splits, HERE, found)
    assert compared["the weights it starts from"] == {name: result.metrics[name] for name in found.images}


def task_splits(config: TrainConfig):
    from cnnjepa.data.datasets import load_splits

    return load_splits(config.data)
