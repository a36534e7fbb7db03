"""What scores are compared with: an encoder before any training, and guessing."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cnnjepa import references
from cnnjepa.config import EncoderConfig, EncoderName, TrainConfig, method_module
from cnnjepa.data_config import DATA_PRESETS
from cnnjepa.probe_config import ProbeConfig
from cnnjepa.run.folder import RunFolder, RunResult
from cnnjepa.train import train
from tests.support.tiny import tiny_config

FAST = ProbeConfig(linear_paper_epochs=1)


def small(method: str = "cnn_jepa", seed: int = 42, **changes: object) -> TrainConfig:
    return tiny_config(method=method_module(method).Config(), epochs=1, probes=FAST, seed=seed, **changes)


def trained(path: Path, config: TrainConfig) -> RunResult:
    folder = RunFolder(path)
    folder.prepare(config)
    result = train(config, folder)
    assert result is not None
    return result


def scores(result: RunResult) -> dict[str, float]:
    return {metric: result.metrics[metric] for metric in result.images}


def test_a_random_encoder_has_the_scores_of_the_method_random(tmp_path: Path) -> None:
    alone = trained(tmp_path / "alone", small("random"))
    assert alone.references.keys() == {"chance level"}, "nothing more is computed outside of a sweep"
    inside = trained(tmp_path / "sweep" / "trials" / "one", small())
    name = f"random {small().encoder.name.name}"
    assert inside.references[name] == scores(alone) != scores(inside)
    assert inside.references["chance level"] == dict.fromkeys(scores(inside), 10.0) | {m: 50.0 for m in inside.images if m.endswith("top5")}
    assert trained(tmp_path / "sweep" / "trials" / "two", small("random")).references[name] == scores(alone)


@pytest.mark.slow
def test_runs_of_a_sweep_compute_a_random_encoder_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    honest = references.random_encoder
    monkeypatch.setattr(references, "random_encoder", lambda config, *rest: built.append(config.seed) or honest(config, *rest))
    faster = small()
    faster.optimizer = replace(faster.optimizer, lr=0.01)
    first = trained(tmp_path / "trials" / "first", small())
    second = trained(tmp_path / "trials" / "second", faster)
    assert built == [42]
    assert first.references == second.references
    trained(tmp_path / "trials" / "third", small(seed=43))
    wider = small("supervised", encoder=EncoderConfig(EncoderName.vit_tiny, patch_size=8, vit_depth=1))
    assert "random vit_tiny" in trained(tmp_path / "trials" / "fourth", wider).references
    fewer = small(data=replace(DATA_PRESETS["digits"], train_limit=100, test_limit=60))
    trained(tmp_path / "trials" / "fifth", fewer)
    assert built == [42, 43, 42, 42]
    assert len(list((tmp_path / "references").iterdir())) == 4


def test_a_torn_file_of_references_is_computed_again(tmp_path: Path) -> None:
    first = trained(tmp_path / "trials" / "first", small())
    (file,) = (tmp_path / "references").iterdir()
    file.write_text(json.dumps(first.references)[:20])
    again = small()
    again.optimizer = replace(again.optimizer, lr=0.01)
    assert trained(tmp_path / "trials" / "second", again).references == first.references


def test_a_random_encoder_without_a_score_leaves_the_run_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError("no such image")

    monkeypatch.setattr(references, "random_encoder", broken)
    result = trained(tmp_path / "trials" / "first", small())
    assert result.references.keys() == {"chance level"}
    assert scores(result)
