"""A sweep as an Optuna study, to look at: for figures and for optuna-dashboard. Nothing reads it back."""

import tempfile
from dataclasses import replace
from pathlib import Path

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend

from cnnjepa.run.files import write_atomic
from sweeps.search.sampler import COMPLETE, FAIL, PRUNED, RUNNING, WAITING, Told, directions, distribution, frozen, reports
from sweeps.spec.space import Params
from sweeps.state.folder import TrialState, View


def study_of(view: View, storage: BaseStorage | None = None) -> optuna.Study:
    """The sweep as a study in which a trial is a run, in `storage` or in memory; it is for looking at, and asked nothing.

    What has no value is a failed trial with its cause, never a number.
    """
    sweep, search = view.sweep, view.sweep.search
    if search is not None:
        space = {d.key: distribution(d) for d in search.space}
    else:
        space = {"setting": CategoricalDistribution(list(dict.fromkeys(t.setting for t in sweep.trials)))}
    costs = search is not None and search.costs
    told = []
    for trial in sweep.trials:
        params: Params = trial.params if search is not None else {"setting": trial.setting}
        state, result = view.state(trial), view.result(trial)
        one = told_alone(params, state, view.objective(trial))
        if one.state is COMPLETE and costs and result is not None:
            one = replace(one, values=[*one.values, result.device_hours])
        about = {"setting": trial.setting, "seed": str(trial.seed), "signature": trial.signature, "state": state.name}
        if result is not None:
            causes = [result.cause, *(f"{name}: {cause}" for name, cause in result.missing.items())]
            about["cause"] = "; ".join(filter(None, causes))
        told.append(frozen(replace(one, reports=reports(view, trial)), space, about))
    study = optuna.create_study(storage=storage, study_name=sweep.path.name, directions=directions(costs))
    study.set_metric_names([sweep.objective, "device-hours"][: 1 + costs])
    study.set_user_attr("question", sweep.question)
    study.add_trials(told)
    return study


def mirror(view: View) -> Path:
    """Write optuna.journal into the sweep's folder, a study for optuna-dashboard; it is never read back, and replaced whole."""
    path = view.sweep.path / "optuna.journal"
    # Made where nobody else writes and locks work: a mirror that is killed on its way leaves nothing here but a file of another name.
    with tempfile.TemporaryDirectory() as private:
        made = Path(private) / path.name
        study_of(view, JournalStorage(JournalFileBackend(str(made))))
        write_atomic(path, made.read_bytes())
    return path


def told_alone(params: Params, state: TrialState, value: float | None) -> Told:
    """One run as a study is told of it. A completed run whose probe failed has no value; to Optuna that is a failure, never a number."""
    if state is TrialState.waiting:
        return Told(params, WAITING)
    if not state.ended:
        return Told(params, RUNNING)
    if state is TrialState.completed and value is not None:
        return Told(params, COMPLETE, [value])
    if state is TrialState.pruned:
        return Told(params, PRUNED)
    return Told(params, FAIL)
