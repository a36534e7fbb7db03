"""`step.py --bytes`: what an op is counted as, by hand; a step's ops against torch's own record; the sums of the tables."""

import sys

import _bytes
import pytest
import torch
from _bytes import Step
from _turns import real_masks
from torch import nn

from cnnjepa.monitoring.traffic import LAYERS, Moved, Traffic


def counted(do: "object") -> list[Moved]:
    with Traffic() as traffic:
        do()  # type: ignore[operator]
    return traffic.found


def test_each_rule_by_hand() -> None:
    a, b = torch.ones(4, 6), torch.ones(4, 6)
    of = {
        "read both, write one": (lambda: a + b, 288),
        "in place reads and writes": (lambda: a.add_(b), 288),
        "a view moves nothing": (lambda: a.t()[1:].unsqueeze(0), 0),
        "an allocation moves nothing": (lambda: a.new_empty(5), 0),
        "zeros are written alone": (lambda: a.new_zeros(5), 20),
        "a copy does not read what it writes": (lambda: a.copy_(b), 192),
        "a cast": (lambda: a.to(torch.bfloat16), 144),
        "no cast where there is nothing to do": (lambda: a.to(torch.float32), 0),
        "a gather reads what it writes, and its indices": (lambda: a.index_select(0, torch.tensor([1])), 24 + 24 + 8),
        "an expanded tensor has the elements that exist": (lambda: torch.ones(1, 6).expand(4, 6).clone(), 24 + 24 + 96),
        "out= is written alone": (lambda: torch.mm(a, b.t(), out=torch.empty(4, 4)), 96 + 96 + 64),
    }
    for what, (do, size) in of.items():
        found = [m for m in counted(do) if m.op not in ("ones", "lift_fresh")] if "expanded" not in what else counted(do)
        assert sum(m.bytes for m in found) == size, what


def test_batch_norm_reads_twice_and_its_gradient_reads_both_twice() -> None:
    x, norm = torch.ones(2, 3, 4, 4, requires_grad=True), nn.BatchNorm2d(3)
    size = x.numel() * 4
    found = counted(lambda: norm(x).square().sum().backward())
    forward, backward = (next(m for m in found if m.op.endswith(name)) for name in ("norm", "norm_backward"))
    assert size * 3 < forward.bytes < size * 3 + 200
    assert size * 5 < backward.bytes < size * 5 + 200
    assert (forward.launches, backward.launches) == (2, 2)


pytestmark = pytest.mark.slow  # torch's compiler is imported


@pytest.fixture(scope="module")
def small() -> list[Moved]:
    return Step("resnet_small", 32, 2, True, real=True, mask=real_masks(0, 2, 4)).count()


def test_the_ops_counted_are_those_of_a_recorded_step(small: list[Moved]) -> None:
    real = Step("resnet_small", 32, 2, True, real=True, mask=real_masks(0, 2, 4))
    ops, lacking = _bytes.against_trace(small, real)
    assert ops > 400
    assert lacking == []
    planted = Moved("mm", "", "", False, 1, 1, 1, ((3, 5), (5, 3)))
    assert _bytes.against_trace([*small, planted], real)[1] == ["1 x mm of ((3, 5), (5, 3))"]


def test_each_op_stands_in_its_part_forward_and_backward(small: list[Moved]) -> None:
    places = {(m.part, m.layer, m.backward) for m in small}
    for layer in ("stem", "layer1", "layer3"):
        assert ("context encoder", layer, False) in places
        assert ("context encoder", layer, True) in places
        assert ("target encoder", layer, True) not in places, "it has no gradient"
    assert {m.part for m in small if m.op == "_fused_adamw_"} == {"AdamW"}
    assert {m.part for m in small if m.op == "smooth_l1_loss_backward"} == {"loss"}
    convolved = [m for m in small if m.part == "predictor" and m.op == "convolution_backward"]
    assert len(convolved) == 3
    assert all(m.backward for m in convolved)


def test_the_tables_add_up_and_fusing_takes_only_relu_and_sums(small: list[Moved]) -> None:
    figures = _bytes.figures_of(small, 2, 0.5)
    kinds = figures["kinds_mb"]
    total = sum(sum(v for k, v in row.items() if k in (*LAYERS, "beside")) for row in figures["rows"])
    assert total == pytest.approx(figures["step_mb"]) == pytest.approx(sum(kinds.values()))
    assert figures["layers_mb"] == pytest.approx(sum(kinds[k] for k in LAYERS))
    saved = figures["layers_mb"] - figures["layers_fused_mb"]
    assert 0.5 * kinds["ReLU and sums"] < saved < kinds["ReLU and sums"]
    assert sum(row["launches"] for row in figures["rows"]) == figures["launches"]


@pytest.mark.nightly
def test_a_resnet_50_moves_428_mb_per_image_in_its_layers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    import step

    monkeypatch.setattr(sys, "argv", ["step.py", "--bytes", "--json"])
    assert step.main() == 0
    figures = json.loads(capsys.readouterr().out)["figures"]
    (row,) = figures["rows"]
    assert row["layers_mb"] == pytest.approx(428, rel=0.05)
    assert row["layers_fused_mb"] == pytest.approx(312, rel=0.05)
    assert figures["trace"]["lacking"] == []
