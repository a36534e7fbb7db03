"""Mirror a sweep as an Optuna study for figures and optuna-dashboard. It is never read back."""

import tempfile
from dataclasses import replace
from pathlib import Path

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend

from cnnjepa.run.files import write_atomic
from sweeps.report.aggregate import distinct
from sweeps.search.sampler import COMPLETE, FAIL, PRUNED, RUNNING, WAITING, Outcome, directions, distribution, frozen, reports
from sweeps.spec.space import Params
from sweeps.state.trial_state import TrialState
from sweeps.state.view import View


def study_of(view: View, storage: BaseStorage | None = None) -> optuna.Study:
    """Return the sweep as a study with one trial per run, in `storage` or in memory."""
    sweep, search = view.sweep, view.sweep.search
    if search is not None:
        space = {d.key: distribution(d) for d in search.space}
    else:
        # The names are those of version 0.1.
        labels = {t.configuration: t.label for t in sweep.trials}
        names = dict(zip(labels, distinct(list(labels.values())), strict=True))
        space = {"setting": CategoricalDistribution(list(names.values()))}
    costs = search is not None and search.costs
    frozen_trials = []
    for trial in sweep.trials:
        params: Params = trial.params if search is not None else {"setting": names[trial.configuration]}
        state, result = view.state(trial), view.result(trial)
        one = outcome_of_a_run(params, state, view.objective(trial))
        if one.state is COMPLETE and costs and result is not None:
            one = replace(one, values=[*one.values, result.device_hours])
        about = {"setting": trial.label, "seed": str(trial.seed), "signature": trial.signature, "state": state.name}
        if result is not None:
            causes = [result.cause, *(f"{name}: {cause}" for name, cause in result.missing.items())]
            about["cause"] = "; ".join(filter(None, causes))
        frozen_trials.append(frozen(replace(one, reports=reports(view, trial)), space, about))
    study = optuna.create_study(storage=storage, study_name=sweep.path.name, directions=directions(costs, sweep.sign))
    study.set_metric_names([sweep.objective, "device-hours"][: 1 + costs])
    study.set_user_attr("question", sweep.question)
    study.add_trials(frozen_trials)
    return study


def mirror(view: View) -> Path:
    """Write the study as optuna.journal into the sweep folder, for optuna-dashboard."""
    path = view.sweep.path / "optuna.journal"
    # In a private folder the journal's locks work. A killed mirror leaves no half-written journal.
    with tempfile.TemporaryDirectory() as private:
        made = Path(private) / path.name
        study_of(view, JournalStorage(JournalFileBackend(str(made))))
        write_atomic(path, made.read_bytes())
    return path


def outcome_of_a_run(params: Params, state: TrialState, value: float | None) -> Outcome:
    """Return one run as a study records it. A completed run without a value is a failure."""
    if state is TrialState.waiting:
        return Outcome(params, WAITING)
    if not state.ended:
        return Outcome(params, RUNNING)
    if state is TrialState.completed and value is not None:
        return Outcome(params, COMPLETE, [value])
    if state is TrialState.pruned:
        return Outcome(params, PRUNED)
    return Outcome(params, FAIL)
