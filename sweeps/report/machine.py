"""Know the machines that runs were on, so that no advice asks for more than they have."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

from cnnjepa.run.files import read_json, reading
from sweeps.spec.sweep import Trial
from sweeps.state.view import View


@dataclass(frozen=True)
class Machine:
    """What one trial can be given at most; None if unknown."""

    cores: int | None = None
    memory_gb: float | None = None

    def cores_at_most(self, wanted: int) -> int:
        """Return `wanted`, or as many cores as there are."""
        return wanted if self.cores is None else min(wanted, self.cores)

    def memory_at_most(self, wanted: int) -> int:
        """Return `wanted` GB, or the whole ones that there are."""
        return wanted if self.memory_gb is None else min(wanted, math.floor(self.memory_gb))

    def workers_at_most(self, wanted: int, ranks: int) -> int:
        """Return `wanted` loader processes of a rank, or as many as leave each of `ranks` a core of its own."""
        return wanted if self.cores is None else max(min(wanted, self.cores // ranks - 1), 0)


def machine_of(view: View, trials: Sequence[Trial], nodes: int = 1) -> Machine:
    """Return the least that `nodes` of the machines of these trials have, as their provenance says."""
    cores, memory = [], []
    for trial in trials:
        path = view.sweep.trial_dir(trial) / "provenance.json"
        try:
            with reading(path):
                known = read_json(path)
        except (ValueError, OSError):  # a damaged file costs its own line of the report
            continue
        if isinstance(found := known.get("cores"), int):
            here = [c for c in view.claims(trial)[-1:] if c.slurm is None and c.owner.is_local]
            # A container, or taskset, may leave this user fewer than the machine has.
            cores.append(min(found, len(os.sched_getaffinity(0))) if here and hasattr(os, "sched_getaffinity") else found)
        if isinstance(size := known.get("memory_gb"), (int, float)):
            memory.append(float(size))
    return Machine(nodes * min(cores) if cores else None, nodes * min(memory) if memory else None)
