"""Write a sweep to Weights & Biases, any number of times: a run per trial, and one of the sweep that holds the tables."""

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cnnjepa.run.files import write_atomic
from jobs.cli import begun
from sweeps.report.exported import DIGEST, TAG, ExportedRun, exported_runs, sweep_tags, tables_of
from sweeps.state.trial_state import TrialState
from sweeps.state.view import View

_REFUSED = re.compile(r"[^\w-]")  # in the ID of a run
_LONGEST_ID = 64
_DONE = "sweep-export.txt"  # in the folder of an offline run, once it is whole
_FAILED = (TrialState.failed, TrialState.damaged)


def export(view: View, project: str, entity: str | None, offline: bool) -> list[str]:
    """Write all trials that have begun to a project; return lines about what was done.

    Offline, each trial has one folder below wandb/, which a later export replaces if anything has
    changed, and `wandb sync` sends. Online, a run that is there is resumed and completed.
    """
    import wandb
    from wandb.errors import Error

    runs, lines = exported_runs(view)
    target = _Target(project, entity, offline)
    try:
        begun()
        with _quiet():
            done = [target.write_trial(run) for run in runs]
            target.write_sweep(view, runs)
    except Error as error:
        raise RuntimeError(f"W&B must accept the runs; got, for project {project}: {' '.join(str(error).split())}") from error
    finally:
        wandb.teardown()
    said = ", ".join(f"{done.count(what)} {what}" for what in ("written", "updated", "unchanged") if done.count(what))
    where = f"project {project}" + (f" below {target.folder}; wandb sync {target.folder}/offline-run-* sends them" if offline else "")
    return [*lines, f"runs: {said or 'none'}; in {where}"]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep W&B from printing a summary of each run."""
    before = os.environ.get("WANDB_SILENT")
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        yield
    finally:
        if before is None:
            del os.environ["WANDB_SILENT"]


def identifier(key: str) -> str:
    """Return the ID of a run in its project: the sweep's name and the run ID."""
    name, _, run = key.rpartition("/")
    return "-".join(filter(None, [_REFUSED.sub("_", name)[: _LONGEST_ID - 1 - len(run)], run]))


def nested(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return values by full keys as nested ones, which W&B shows by their full keys again."""
    found: dict[str, Any] = {}
    for key, value in params.items():
        *path, last = key.split(".")
        inside = found
        for part in path:
            inside = inside.setdefault(part, {})
        inside[last] = value
    return found


class _Target:
    """A project, here or in a folder of offline runs."""

    def __init__(self, project: str, entity: str | None, offline: bool) -> None:
        self.project, self.entity, self.offline = project, entity, offline
        self.folder = Path(os.environ.get("WANDB_DIR") or ".").absolute() / "wandb"

    def write_trial(self, run: ExportedRun) -> str:
        """Write one trial; return written, updated or unchanged."""
        name, done = identifier(run.key), "written"
        if self.offline:
            if (before := self._before(name, self._said(run.digest))) == "unchanged":
                return before
            done = before or done
        state = run.state.name
        about = {"name": run.name, "group": run.configuration[:128], "job_type": "trial", "tags": [state]}
        config = {**nested(run.params), "sweep": {tag.removeprefix(TAG): text for tag, text in run.tags.items()}}
        opened = self._open(name, config, run.began, **about)
        if not self.offline:
            if opened.summary.get(DIGEST) == run.digest:
                opened.finish(exit_code=int(run.state in _FAILED))
                return "unchanged"
            done = "updated" if opened.step else done
            opened.config.update(config, allow_val_change=True)
        _log(opened, run)
        opened.summary.update({**run.scores, f"{TAG}state": state, f"{TAG}cause": run.tags.get(f"{TAG}cause", "")})
        self._files(opened, f"trial-{name}", "trial", run.files)
        opened.summary.update({DIGEST: run.digest})
        self._finish(opened, run.digest, exit_code=int(run.state in _FAILED))
        return done

    def write_sweep(self, view: View, runs: Sequence[ExportedRun]) -> None:
        """Write the sweep's own run, with its tables."""
        folder, tables = view.sweep.path.name, tables_of(view)
        name = identifier(folder)
        if self.offline:
            self._before(name, "")  # tables have few bytes: they are written anew
        about = {"name": folder, "job_type": "sweep", "tags": ["sweep"], "notes": view.sweep.question}
        config = {"sweep": {tag.removeprefix(TAG): text for tag, text in sweep_tags(view).items()}}
        opened = self._open(name, config, min([r.began for r in runs], default=0.0), **about)
        self._files(opened, f"tables-{name}", "tables", tables)
        self._finish(opened, "", exit_code=0)

    def _open(self, identity: str, config: dict[str, Any], began: float, **about: Any) -> Any:
        import wandb

        settings = wandb.Settings(console="off", disable_git=True, save_code=False, x_disable_stats=True, x_start_time=began or None)
        where: dict[str, Any] = {"project": self.project, "entity": self.entity, "id": identity}
        where |= {"mode": "offline"} if self.offline else {"resume": "allow"}
        self.folder.mkdir(parents=True, exist_ok=True)
        return wandb.init(**where, dir=str(self.folder.parent), config=config, settings=settings, **about)

    def _before(self, name: str, digest: str) -> str:
        """Remove the offline run of an earlier export; return "updated", "unchanged" if it is whole and the same, or ""."""
        found = sorted(self.folder.glob(f"offline-run-*-{name}"))
        if len(found) == 1 and (found[0] / _DONE).exists() and (found[0] / _DONE).read_text() == digest:
            return "unchanged"
        for path in found:
            shutil.rmtree(path)
        return "updated" if found else ""

    def _files(self, opened: Any, name: str, kind: str, files: Sequence[Path]) -> None:
        import wandb

        if not files:
            return
        made = wandb.Artifact(_REFUSED.sub("_", name)[:128], type=kind)
        for path in files:
            made.add_file(str(path), name=path.name)
        opened.log_artifact(made)

    def _finish(self, opened: Any, digest: str, exit_code: int) -> None:
        folder = Path(opened.dir).parent
        opened.finish(exit_code=exit_code)
        if self.offline:
            write_atomic(folder / _DONE, self._said(digest))

    def _said(self, digest: str) -> str:
        """Return what identifies all of an offline run: it names its project too."""
        return f"{digest} {self.entity or ''} {self.project}"


def _log(opened: Any, run: ExportedRun) -> None:
    """Log the curves, a row per step; of a run that is resumed, the steps that it lacks."""
    steps: dict[int, dict[str, float]] = {}
    for point in run.points:
        steps.setdefault(point.step, {})[point.name] = point.value
    for step, row in sorted(steps.items()):
        if step >= opened.step:
            opened.log(row, step=step)
