"""Hydra composes once for all configurations of a command that choose the same groups; the result is what it would compose for each."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from cnnjepa.run.identity import DEFAULT_TASK
from jobs import config
from jobs.task import task_named
from sweeps.cli.plan import parse, plan
from sweeps.method_comparison import SWEEP as METHODS
from sweeps.predictor_ablation import SWEEP as PREDICTORS
from sweeps.spec.sweep import SweepSpec
from tests.support.sample import SEED

TASK = task_named(DEFAULT_TASK)
OVERRIDES = [
    "method=byol",
    "method=cnn_jepa",
    "method=ijepa",
    "optimizer=simclr",
    "data=digits",
    "data=imagenet100",
    "cluster=local",
    "cluster=komondor",
    "cluster.account=a",
    "cluster.sbatch.constraint=x",
    "cluster.setup=[module load python]",
    "encoder.name=resnet18",
    "encoder={name: resnet18, sync_bn: true}",
    "epochs=3",
    "epochs=${seed}",
    "epochs=x",
    "optimizer.lr=0.1",
    "optimizer.lr=1",
    "optimizer.rate=1",
    "method.ema.momentum_start=0.9",
    "probes.at_epochs=[1,2]",
    "data.root='/a b'",
    "run_dir=a",
]


def by_hydra_alone(overrides: list[str]) -> object:
    """Return what Hydra composes from all `overrides`."""
    config.register_schemas(TASK)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config.CONFIG_DIR), version_base="1.3"):
        return compose(config.CONFIG_NAME, [f"++{o}" if o.startswith("cluster.sbatch.") else o for o in overrides])


def composed_or_error(by: Callable[[list[str]], object], overrides: list[str]) -> object:
    """Return what is composed, or the type and the text of the error."""
    try:
        return by(overrides)
    except (HydraException, OmegaConfBaseException) as error:
        return type(error), str(error.__cause__)


@pytest.mark.slow
def test_keys_set_after_the_groups_give_what_hydra_composes() -> None:
    draw = random.Random(SEED)
    refused = 0
    for _ in range(25):
        overrides = draw.sample(OVERRIDES, draw.randint(1, 7))
        wanted = composed_or_error(by_hydra_alone, overrides)
        assert composed_or_error(lambda of: config._compose(of, TASK), overrides) == wanted, overrides
        refused += isinstance(wanted, tuple)
    assert 0 < refused < 25


@pytest.mark.parametrize(
    ("sweep", "most"), [(PREDICTORS, 2), (METHODS, 2 + len(METHODS.configurations_at(METHODS.smoke)))], ids=lambda x: getattr(x, "name", x)
)
def test_a_sweep_is_planned_with_one_composition_a_choice_of_groups(sweep: SweepSpec, most: int, tmp_path: Path) -> None:
    config._chosen.cache_clear()
    with patch.object(config, "compose", wraps=compose) as by_hydra:
        plan(sweep, parse(sweep, ["--dry-run", "--runs-dir", str(tmp_path)]))
    assert 0 < by_hydra.call_count <= most


def test_a_profile_that_changes_while_the_process_lives_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(config.CONFIG_DIR, tmp_path / "slurm")
    monkeypatch.setattr(config, "CONFIG_DIR", tmp_path / "slurm")
    profile = tmp_path / "slurm" / "cluster" / "mine.yaml"
    for minutes in (10, 20):
        profile.write_text(f"name: mine\nscheduler: slurm\ntime_limit_minutes: {minutes}\n")
        os.utime(profile, ns=(minutes, minutes))  # two writes within one tick of the clock would look alike
        assert config.compose_job(["cluster=mine"]).cluster.time_limit_minutes == minutes
