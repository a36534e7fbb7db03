"""What two runs are compared by: their states, records, losses and pace."""

import math
from typing import Any

import torch
from _same_run import compare_records, compare_states, relative, verdict

# What is held to be different.


def test_only_the_same_bits_have_no_difference() -> None:
    a = torch.tensor([1.0, -4.0])
    assert relative(a, a.clone()) == 0
    assert relative(torch.tensor([1.0, -3.0]), a) == 0.25  # 1 of 4
    assert relative(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0])) == math.ulp(0.0)
    assert relative(torch.tensor([math.nan]), torch.tensor([math.nan])) == 0
    for other in (torch.tensor([1.0]), a.double(), torch.tensor([1.0, math.nan])):
        assert relative(other, a) == math.inf
    assert relative(torch.tensor(7), torch.tensor(8)) == 0.125


def test_the_tensor_that_is_furthest_apart_is_named_and_a_missing_one_is_infinitely_far() -> None:
    state = {"encoder": {"w": torch.tensor([2.0]), "b": torch.tensor([1.0])}, "state": [torch.tensor([8.0])], "step": 3}
    assert compare_states(state, state) == (0.0, "")
    other = {"encoder": {"w": torch.tensor([4.0]), "b": torch.tensor([1.0])}, "state": [torch.tensor([10.0])], "step": 3}
    assert compare_states(state, other) == (0.5, "encoder.w")
    assert compare_states(state, {**state, "state": []}) == (math.inf, "state.0")


def step_record(step: int, loss: float, **more: Any) -> dict[str, Any]:
    return {"kind": "step", "step": step, "loss": loss, "images_per_second": 10.0, "data_wait_share": 0.5, **more}


def test_records_are_compared_with_each_other_step_by_step_without_their_timing() -> None:
    theirs = [step_record(1, 4.0, lr=0.1), step_record(2, 2.0, lr=0.2), {"kind": "final", "step": 2, "epoch": 1, "knn": 50.0}]
    ours = [{**r, "images_per_second": 99.0, "gpu_utilisation": 1.0} for r in theirs]
    assert compare_records(ours, theirs) == {"first_different_step": None, "first_difference": "", "loss_apart": 0.0, "twice": []}
    ours[1] |= {"loss": 2.5, "lr": 0.3}
    found = compare_records(ours, theirs)
    assert (found["first_different_step"], found["first_difference"]) == (2, "loss 2.5 instead of 2.0")
    assert found["loss_apart"] == 0.25
    found = compare_records([theirs[0], theirs[0], theirs[2]], theirs)
    assert (found["first_different_step"], found["first_difference"]) == (2, "the step record is not in both")
    assert (found["loss_apart"], found["twice"]) == (math.inf, ["step record of step 1"])
    assert compare_records(theirs, [*theirs[:2], {**theirs[2], "knn": 51.0}])["first_difference"] == "knn 50.0 instead of 51.0"


def different(first: int | None, apart: float, loss: float = 0.0) -> dict[str, Any]:
    reported = {"first_different_step": first, "first_difference": "loss 1 instead of 2" if first else "", "loss_apart": loss, "twice": []}
    return {"same_bits": False, "largest_relative": apart, "where": "encoder.w", **reported}


def test_a_difference_that_begins_after_the_resume_is_the_resumes_fault() -> None:
    assert verdict({**different(None, 0.0), "same_bits": True}, 10) == ([], "same bits")
    for found in (different(11, 1e-7, 1e-7), different(None, 1e-7)):  # of which the second shows in weights alone
        (wrong,), said = verdict(found, 10)
        assert "it was resumed at step 10" in wrong
        assert "1.0e-07 of the largest value in encoder.w" in said
    assert "from step 11 on (loss 1 instead of 2)" in verdict(different(11, 1e-7), 10)[1]


def test_a_device_that_does_not_repeat_a_run_is_allowed_small_differences_of_losses_and_no_others() -> None:
    wrong, said = verdict(different(10, 0.3, 0.05), 10)  # step 10 was made before the kill
    assert wrong == []
    assert said.startswith("the device does not repeat a run: different: 3.0e-01")
    for found in (different(3, 0.3, 0.0501), different(3, math.inf, 0.01), different(3, 0.3, math.inf)):
        assert len(verdict(found, 10)[0]) == 1
    assert verdict({**different(3, 0.3), "twice": ["step record of step 12"]}, 10)[0] == ["recorded twice: step record of step 12"]
