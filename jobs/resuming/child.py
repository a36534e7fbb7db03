"""One process of a run that is watched: `python -m jobs.resuming.child FILE`, started by the drill."""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from jobs.resuming import conditions
from jobs.resuming.watch import Moment, Plan


def _moment(value: list[int] | None) -> Moment | None:
    return None if value is None else Moment(*value)


def plan_of(values: dict[str, Any]) -> Plan:
    """Return the plan that a file holds."""
    for name in ("kill", "stop", "look"):
        values[name] = _moment(values.get(name))
    return Plan(**{**values, "only": tuple(values.get("only", ()))})


def run(spec: dict[str, Any]) -> int:
    """Run a task as `spec` says; return the exit status."""
    sys.path[:0] = [p for p in spec["path"] if p not in sys.path]
    conditions.apply(spec["conditions"])
    import numpy  # noqa: F401, so that a program that is watched and one that is not have the same libraries

    from jobs.config import compose_job
    from jobs.resuming.watch import install
    from jobs.run import run_job

    with open(spec["events"], "a") as out:
        watch = install(plan_of(spec["plan"]), out)
        try:
            job = compose_job([f"task={spec['task']}", f"run_dir={spec['run']}", *spec["overrides"]])
            result = run_job(job, lambda: watch.stopped)
        except Exception as error:
            watch.end_lines()
            traceback.print_exc()
            watch.say(ended=f"{type(error).__name__}: {' '.join(str(error).split())}")
            return 1
        watch.end_lines()
        ended = "stopped" if result is None else result.cause or result.status.name
        watch.say(ended=ended)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(run(json.loads(Path(sys.argv[1]).read_text())))
