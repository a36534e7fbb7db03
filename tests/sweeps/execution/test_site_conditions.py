"""What users' shells and sites do to a sweep, on a real Slurm: no trial is lost, nothing runs twice, and hardly an allocation idles.

docs/reference/site-conditions.md has its table; tests/sites_table.py writes it.
"""

import json
import os
from pathlib import Path

import pytest

from tests.support.conditions import Condition
from tests.support.conditions_of_sites import CONDITIONS
from tests.support.sample import sampled
from tests.support.site_bench import Site
from tests.support.slurm_bench import needs_slurm
from tests.support.slurm_cluster import SlurmCluster

MOST_IDLE_SECONDS = 60


_LONG = [pytest.param(c, id=c.name, marks=pytest.mark.nightly) for c in CONDITIONS if c.long]
_SHORT = sampled([pytest.param(c, id=c.name) for c in CONDITIONS if not c.long], 1, "site conditions")


@needs_slurm
@pytest.mark.slow
@pytest.mark.xdist_group("slurm-2")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("condition", _SHORT + _LONG)
def test_a_condition(condition: Condition, cluster: SlurmCluster, tmp_path: Path) -> None:
    site = Site(cluster, tmp_path)
    condition.play(site)
    figures = site.figures()
    row = figures.as_row(condition.name, condition.happened)
    print(json.dumps(row))
    if os.environ.get("SITES_JSON"):
        with open(os.environ["SITES_JSON"], "a") as file:
            file.write(json.dumps(row) + "\n")
    assert figures.completed > 0
    assert figures.lost == 0
    assert figures.doubled == []
    # The time that programs take to load is the machine's, which other tests keep busy here.
    assert figures.idle - figures.loading <= MOST_IDLE_SECONDS
