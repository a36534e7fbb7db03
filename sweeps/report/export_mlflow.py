"""Write a sweep to MLflow, any number of times: a run per trial, nested in one run of the sweep that holds the tables."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.cli import begun
from sweeps.report.exported import DIGEST, KEY, TAG, ExportedRun, Point, exported_runs, sweep_tags, tables_of
from sweeps.state.trial_state import TrialState
from sweeps.state.view import View

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_PAGE = 1000  # runs of one answer, and numbers of one request: what a server takes
_PARAMS = 100  # of one request
_LONGEST = 6000  # characters of a parameter's value that MLflow takes
_LONGEST_TAG = 8000
_REFUSED = re.compile(r"[^\w.\- :/]")  # in the name of a number or parameter
_PARENT = "mlflow.parentRunId"
# MLflow has no state for a run that was stopped early on purpose: the tag sweep.state says pruned.
STATUS = {
    TrialState.completed: "FINISHED",
    TrialState.pruned: "KILLED",
    TrialState.cancelled: "KILLED",
    TrialState.failed: "FAILED",
    TrialState.damaged: "FAILED",
    TrialState.running: "RUNNING",
    TrialState.requeued: "SCHEDULED",
    TrialState.interrupted: "SCHEDULED",
}


@dataclass(frozen=True)
class Counts:
    """What an export did with the runs."""

    added: int = 0
    updated: int = 0
    replaced: int = 0
    unchanged: int = 0

    def line(self, where: str) -> str:
        """Return '3 runs added, 19 unchanged in WHERE'."""
        said = [f"{n} {what}" for what, n in vars(self).items() if n]
        return f"runs: {', '.join(said) or 'none'}; in {where}"


def export(view: View, uri: str, experiment: str) -> list[str]:
    """Write all trials that have begun to `experiment` of the store at `uri`; return lines about what was done.

    What is there already is completed. Of a run that holds other numbers than the trial, which
    MLflow cannot change, a new one takes the place; MLflow keeps the old one among its deleted runs.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    where = f"experiment {experiment} of {uri}"
    runs, lines = exported_runs(view)
    try:
        client = MlflowClient(uri)
        target = _Target(client, _experiment(client, experiment))
        begun()
        counts = target.write(view, [accepted(run, lines) for run in runs])
    except MlflowException as error:
        said = " ".join(str(error).split())
        raise RuntimeError(f"MLflow must accept the runs; got, from {uri}: {said}: check --tracking-uri and its server") from error
    return [*dict.fromkeys(lines), counts.line(where)]


def _experiment(client: "MlflowClient", name: str) -> str:
    """Return the ID of an experiment; create it if it is new. Raise ValueError if it was deleted."""
    found = client.get_experiment_by_name(name)
    if found is not None and found.lifecycle_stage == "deleted":
        raise ValueError(f"--experiment must name no deleted experiment; got {name}: restore it in MLflow, or name another")
    return str(found.experiment_id if found is not None else client.create_experiment(name))


def accepted(run: ExportedRun, lines: list[str]) -> ExportedRun:
    """Return a run whose names and texts MLflow takes; say in `lines` what was changed."""
    names = {**dict.fromkeys(run.params), **dict.fromkeys(p.name for p in run.points), **dict.fromkeys(run.scores)}
    new = {name: _REFUSED.sub("_", name) for name in names}
    if changed := [name for name in names if new[name] != name]:
        if len(set(new.values())) < len(new):
            raise ValueError(f"names of metrics must differ in letters, digits and ._-/ for MLflow; got {', '.join(changed)}: rename one")
        lines.append(f"MLflow takes letters, digits and ._-/: in a name: {', '.join(f'{name} is called {new[name]}' for name in changed)}")
    params = {new[key]: str(value) for key, value in run.params.items()}
    if long := [key for key, text in params.items() if len(text) > _LONGEST]:
        lines.append(f"MLflow takes {_LONGEST} characters of a parameter: of {', '.join(long)} the rest is in config.yaml of the run")
    return replace(
        run,
        params={key: text[:_LONGEST] for key, text in params.items()},
        points=[replace(p, name=new[p.name]) for p in run.points],
        scores={new[name]: value for name, value in run.scores.items()},
    )


class _Target:
    """An experiment, and the runs of the sweep that it holds."""

    def __init__(self, client: "MlflowClient", experiment: str) -> None:
        self.client, self.experiment = client, experiment

    def _found(self) -> dict[str, list["Run"]]:
        """Return the runs of all sweeps by key, the oldest first."""
        found: dict[str, list[Run]] = {}
        token = None
        while True:
            page = self.client.search_runs([self.experiment], max_results=_PAGE, order_by=["attributes.start_time ASC"], page_token=token)
            for run in page:
                if KEY in run.data.tags:
                    found.setdefault(run.data.tags[KEY], []).append(run)
            token = page.token
            if not token:
                return found

    def write(self, view: View, runs: Sequence[ExportedRun]) -> Counts:
        """Write the sweep's run and those of its trials."""
        found = self._found()
        parent = self._write_sweep(view, found.get(view.sweep.path.name, []), [r.began for r in runs], [r.ended for r in runs])
        done = {"added": 0, "updated": 0, "replaced": 0, "unchanged": 0}
        for run in runs:
            known = found.get(run.key, [])
            for twice in known[1:]:  # two exports at once
                self.client.delete_run(twice.info.run_id)
            done[self._write_trial(run, known[0] if known else None, parent)] += 1
        return Counts(**done)

    def _write_sweep(self, view: View, known: Sequence["Run"], began: Sequence[float], ended: Sequence[float]) -> str:
        name = view.sweep.path.name
        run = known[0].info.run_id if known else self._create(name, name, min(began, default=0.0), {})
        for tag, value in sweep_tags(view).items():
            self.client.set_tag(run, tag, value[:_LONGEST_TAG])
        self._artifacts(run, tables_of(view))
        over = all(state.ended for state in view.states().values())
        self._end(run, "FINISHED" if over else "RUNNING", max(ended, default=0.0))
        return run

    def _write_trial(self, run: ExportedRun, known: "Run | None", parent: str) -> str:
        """Write one trial; return what that did, by the names of Counts."""
        digest = f"{run.digest}-{parent}"
        if known is not None and known.data.tags.get(DIGEST) == digest:
            return "unchanged"
        done = "added" if known is None else "updated"
        held = {} if known is None else self._held(known)
        tags = {_PARENT: parent}
        if known is not None and self._contradicts(run, known, held):
            self.client.delete_run(known.info.run_id)
            tags |= {name: value for name, value in known.data.tags.items() if _is_own(name)}
            known, held, done = None, {}, "replaced"
        made = known.info.run_id if known is not None else self._create(run.key, run.name, run.began, tags)
        self._complete(made, run, held, {} if known is None else known.data.params)
        self.client.set_tag(made, _PARENT, parent)
        self._artifacts(made, run.files)
        self._end(made, STATUS[run.state], run.ended)
        self.client.set_tag(made, DIGEST, digest)  # last: without it the next export looks at everything again
        return done

    def _create(self, key: str, name: str, began: float, tags: dict[str, str]) -> str:
        made = self.client.create_run(self.experiment, int(began * 1000), {KEY: key, **tags}, name)
        return str(made.info.run_id)

    def _held(self, run: "Run") -> dict[str, dict[int, float]]:
        """Return the numbers that MLflow has of a run: name -> step -> value."""
        found = {}
        for name in run.data.metrics:
            found[name] = {m.step: m.value for m in self.client.get_metric_history(run.info.run_id, name)}
        return found

    def _contradicts(self, run: ExportedRun, known: "Run", held: dict[str, dict[int, float]]) -> bool:
        """Return whether MLflow holds a number or parameter that the trial has otherwise; it changes neither."""
        if any(run.params.get(key) != value for key, value in known.data.params.items()):
            return True
        now = _numbers(run)
        return any(not _same(now.get((name, step)), value) for name, values in held.items() for step, value in values.items())

    def _complete(self, made: str, run: ExportedRun, held: dict[str, dict[int, float]], params: dict[str, str]) -> None:
        """Add the numbers, parameters and tags that MLflow lacks."""
        from mlflow.entities import Metric, Param, RunTag

        last = max(run.last_step, 1)

        def when(step: int) -> int:  # records hold no times, and MLflow wants one: evenly over the run
            return int(1000 * (run.began + (run.ended - run.began) * step / last))

        missing = [(n, s, v) for (n, s), v in _numbers(run).items() if s not in held.get(n, {})]
        tags = [RunTag(name, value[:_LONGEST_TAG]) for name, value in run.tags.items()]
        gone = [name for name in self.client.get_run(made).data.tags if name.startswith(TAG) and name not in (*run.tags, KEY)]
        for name in gone:  # such as the cause of a failure that a retry has mended
            self.client.delete_tag(made, name)
        self.client.log_batch(made, tags=[*tags, RunTag("mlflow.runName", run.name)])
        for batch in _batches([Param(key, value) for key, value in run.params.items() if key not in params], _PARAMS):
            self.client.log_batch(made, params=batch)
        for batch in _batches([Metric(name, value, when(step), step) for name, step, value in missing], _PAGE):
            self.client.log_batch(made, metrics=batch)

    def _artifacts(self, run: str, files: Sequence[Path]) -> None:
        for path in files:
            self.client.log_artifact(run, str(path))

    def _end(self, run: str, status: str, ended: float) -> None:
        if status in ("RUNNING", "SCHEDULED"):
            self.client.update_run(run, status)
        else:
            self.client.set_terminated(run, status, int(ended * 1000))


def _numbers(run: ExportedRun) -> dict[tuple[str, int], float]:
    """Return the value of each number by name and step; a score has the last step."""
    points = [*run.points, *(Point(name, run.last_step, value) for name, value in run.scores.items())]
    return {(p.name, p.step): float(p.value) for p in points}


def _same(a: float | None, b: float) -> bool:
    return a == b or (a is not None and math.isnan(a) and math.isnan(b))


def _is_own(tag: str) -> bool:
    """Return whether a tag was given by a person in MLflow."""
    return tag == "mlflow.note.content" or not tag.startswith((TAG, "mlflow."))


def _batches(items: Sequence[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
