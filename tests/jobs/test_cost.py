"""What a sweep will cost, and the cap on it."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from cnnjepa.run.identity import to_dict
from jobs.config import compose_job
from jobs.cost import Estimate, combined, estimate
from jobs.slurm.queue import site_tool
from sweeps.cli.estimate import check_cap

PAPER = ["cluster=komondor", "account=abc", "data=imagenet100_kaggle", "encoder.name=resnet50", "precision=bf16"]
JOB = compose_job(PAPER)
CONFIG = to_dict(JOB.train)


def of_33(config: dict[str, object] = CONFIG, measured: tuple[float, ...] = ()) -> Estimate:
    return estimate(JOB.cluster, config, [200.0] * 33, 200.0, measured)


def test_the_papers_shape_is_priced_by_the_paper() -> None:
    price = of_33()
    assert price.device_hours == pytest.approx(33 * 200 * 0.0644 * 4)
    assert price.wall_hours == pytest.approx(math.ceil(33 / 8) * 200 * 0.0644)
    assert "= 1,700 GPU-hours" in price.lines()[0]
    assert "the paper's 0.0644 h on 4 A100" in price.source


def test_own_runs_are_believed_before_the_paper() -> None:
    price = of_33(measured=(0.1, 0.3, 0.2))
    assert price.device_hours == pytest.approx(6600 * 0.2)
    assert "median of 3 runs" in price.source


def test_another_shape_has_no_price_until_it_was_measured() -> None:
    other = to_dict(compose_job([*PAPER, "data.image_size=160"]).train)
    assert of_33(other).device_hours is None
    assert "cost unknown" in of_33(other).lines()[1]
    assert of_33(other, (1.0,)).device_hours == 6600


def test_each_published_method_has_its_own_price() -> None:
    """GPU-hours of 200 epochs on 4 A100."""
    for name, hours in {"cnn_jepa": 51.5, "simclr": 62.0, "byol": 79.3, "vicreg": 67.6}.items():
        config = to_dict(compose_job([*PAPER, f"method={name}", "encoder.sync_bn=true"]).train)
        assert estimate(JOB.cluster, config, [200.0], 200.0, []).device_hours == pytest.approx(hours, rel=1e-3)
    other = to_dict(compose_job([*PAPER, "method=supervised"]).train)
    assert estimate(JOB.cluster, other, [200.0], 200.0, []).device_hours is None


def test_kinds_of_runs_are_priced_each_by_itself_and_added_up() -> None:
    configs = [
        to_dict(compose_job([*PAPER, f"method={name}", "encoder.sync_bn=true"]).train) for name in ("cnn_jepa", "byol", "supervised")
    ]
    estimates = [estimate(JOB.cluster, config, [200.0] * 3, 200.0, []) for config in configs]
    both = combined(estimates[:2], JOB.cluster)
    assert (both.trials, both.epochs) == (6, 1200)
    assert both.device_hours == pytest.approx(3 * 51.5 + 3 * 79.3, rel=1e-3)
    assert both.wall_hours == pytest.approx(79.3 / 4, rel=1e-3)  # all six at once: the longest run
    everything = combined(estimates, JOB.cluster)
    assert everything.device_hours is None
    assert "3 of the runs: no run of this kind" in everything.source
    assert "the others come to 392 GPU-hours" in everything.source
    nothing_left = estimate(JOB.cluster, configs[2], [], 200.0, [])
    assert combined([estimates[0], nothing_left], JOB.cluster) == estimates[0]


def test_a_short_limit_chains_jobs() -> None:
    hour = compose_job([*PAPER, "cluster=komondor_test"]).cluster
    price = estimate(hour, CONFIG, [200.0], 200.0, [])
    assert price.chunks == math.ceil(200 * 0.0644 / (57 / 60))
    assert f"each in {price.chunks} consecutive jobs" in price.lines()[2]


def test_the_papers_gpu_hours_are_the_same_on_a_worker_of_any_size() -> None:
    """The paper's were 4; a worker of 8 takes half the time for the same GPU-hours."""
    for gpus in (1, 2, 8):
        price = estimate(replace(JOB.cluster, gpus_per_trial=gpus), CONFIG, [200.0] * 3, 200.0, [])
        assert price.device_hours_per_epoch == pytest.approx(0.2576)
        assert price.device_hours == pytest.approx(154.56)
        assert price.wall_hours == pytest.approx(51.52 / gpus)


def test_cores_are_the_devices_of_a_worker_without_gpus() -> None:
    cpu = replace(JOB.cluster, gpus_per_trial=0, cores_per_trial=16, max_parallel=2, time_limit_minutes=60, stop_signal_seconds=720)
    price = estimate(cpu, CONFIG, [10.0, 10.0, 4.0], 10.0, [8.0])
    assert (price.unit, price.trials, price.epochs, price.device_hours, price.parallel) == ("core-hours", 3, 24.0, 192.0, 2)
    assert price.wall_hours == pytest.approx(8.0)  # 5, 5 and 2 hours: two rounds of the mean, 4, are more than 12 in two
    assert price.chunks == 7  # 5 hours, of which 0.8 can be used in each job of an hour
    assert estimate(cpu, CONFIG, [10.0, 1.0], 10.0, [8.0]).wall_hours == pytest.approx(5.0)  # the longest run
    assert estimate(cpu, CONFIG, [1.0] * 6, 10.0, [8.0]).wall_hours == pytest.approx(1.5)  # three rounds of half an hour
    assert estimate(cpu, CONFIG, [], 10.0, [8.0]).wall_hours == 0.0
    assert estimate(cpu, CONFIG, [1.0], 10.0, []).device_hours is None  # the paper's hours are a GPU's


def test_the_cap_holds_where_a_search_has_a_budget_too() -> None:
    """A budget at or below the cap keeps to it; one above it does not."""
    check_cap(1000, of_33(), budget=1000)
    check_cap(1000, of_33(), budget=10)
    with pytest.raises(ValueError, match="--max-gpu-hours must be at least the cost estimate of 1,700 GPU-hours; got 1000"):
        check_cap(1000, of_33(), budget=1001)
    price = of_33(measured=(0.25,))
    assert price.device_hours == 1650.0
    check_cap(1650, price)  # exactly
    with pytest.raises(ValueError, match="got 1649"):
        check_cap(1649, price)
    check_cap(1, replace(price, unit="core-hours"))
    check_cap(1, replace(price, trials=0))


def test_the_cap_refuses_what_is_above_it_or_unknown() -> None:
    check_cap(None, of_33())
    check_cap(1701, of_33())
    with pytest.raises(ValueError, match="--max-gpu-hours must be at least the cost estimate of 1,700 GPU-hours; got 1000"):
        check_cap(1000, of_33())
    other = to_dict(compose_job([*PAPER, "data.image_size=160"]).train)
    with pytest.raises(ValueError, match="--max-gpu-hours must be left out while the cost is unknown; got 1000"):
        check_cap(1000, of_33(other))


def test_the_sites_balance_is_shown_where_it_can_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake sbalance: the site's own cannot be had here."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert site_tool("sbalance") == ""
    (tmp_path / "sbalance").write_text("#!/bin/sh\necho 'abc  GPU 3200/5000 h'\n")
    (tmp_path / "sbalance").chmod(0o755)
    assert site_tool("sbalance") == "abc  GPU 3200/5000 h"
