"""CNN-JEPA with a frozen teacher: the target stays the encoder of the start, and what is probed is the encoder that learns."""

from pathlib import Path

import pytest
import torch

from cnnjepa.methods.cnn_jepa import Config, Teacher
from cnnjepa.rules import validate
from cnnjepa.run.identity import from_dict, signature, to_dict
from jobs.task import task_of
from tests.cnnjepa.methods.test_methods import batch_for, build, small
from tests.support.runs import final_state, run
from tests.support.tiny import tiny_config


def frozen(**changes: object):  # type: ignore[no-untyped-def]
    config = small("cnn_jepa", **changes)
    config.method.teacher = Teacher.frozen  # type: ignore[attr-defined]
    validate(config)
    return config


def test_a_run_leaves_the_target_at_the_start_and_moves_the_encoder(tmp_path: Path) -> None:
    config = frozen(epochs=1)
    start = build(config).state_dict()
    run(config, tmp_path)
    end = final_state(tmp_path)["method"]
    weights = [k.removeprefix("encoder.") for k, _ in build(config).named_parameters() if k.startswith("encoder.")]
    assert len(weights) > 10
    assert all(torch.equal(end[f"target_encoder.{k}"], start[f"target_encoder.{k}"]) for k in weights)
    assert any(not torch.equal(end[f"encoder.{k}"], start[f"encoder.{k}"]) for k in weights)


def test_it_starts_as_the_encoder_and_no_gradient_reaches_it() -> None:
    method = build(frozen())
    pairs = list(zip(method.encoder.parameters(), method.target_encoder.parameters(), strict=True))  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in pairs)
    method(batch_for(frozen(), method))["loss"].backward()
    assert all(b.grad is None and not b.requires_grad for _, b in pairs)
    assert method.after_step(3) == {}  # type: ignore[operator]


def test_what_is_probed_and_exported_is_the_encoder() -> None:
    config = frozen()
    method = build(config)
    assert method.probe_encoder is method.encoder
    for parameter in method.encoder.parameters():  # type: ignore[union-attr]
        parameter.data += 1
    exported, _ = task_of({}).export(config, {"method": method.state_dict()})
    assert torch.equal(exported["conv1.weight"], method.encoder.conv1.weight)  # type: ignore[union-attr, arg-type]


def test_the_run_id_knows_a_frozen_teacher_and_older_ids_stay() -> None:
    config = tiny_config()
    before, values = signature(config), to_dict(config, neutral=False)
    assert "teacher" not in values["method"]
    config.method.teacher = Teacher.frozen  # type: ignore[attr-defined]
    assert signature(config) != before
    assert from_dict(to_dict(config)).method.teacher is Teacher.frozen
    assert Config().teacher is Teacher.ema


@pytest.mark.parametrize(("key", "value"), [("momentum_start", 0.97), ("momentum_end", 0.999)])
def test_a_momentum_of_a_target_that_never_moves_is_refused(key: str, value: float) -> None:
    config = frozen()
    setattr(config.method.ema, key, value)
    with pytest.raises(ValueError, match=rf"method.ema.{key} must keep its default with method.teacher=frozen, .*; got {value}$"):
        validate(config)
