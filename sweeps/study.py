"""The brain: an Optuna study that is built in memory from the run folders and asked what to run next; nothing of it is kept."""

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import TrialState as OptunaState
from optuna.trial import create_trial

from sweeps.folder import TrialState, View
from sweeps.spec import Trial

optuna.logging.set_verbosity(optuna.logging.WARNING)


def replay(view: View) -> optuna.Study:
    """The study as the folders tell it: trial i of the study is trial i of the sweep; those not begun are enqueued in order."""
    sweep = view.sweep
    settings = list(dict.fromkeys(t.setting for t in sweep.trials))
    seeds = sorted({t.seed for t in sweep.trials})
    distributions: dict[str, BaseDistribution] = {"setting": CategoricalDistribution(settings), "seed": CategoricalDistribution(seeds)}
    study = optuna.create_study(direction="maximize", study_name=sweep.name)
    for trial in sweep.trials:
        params = {"setting": trial.setting, "seed": trial.seed}
        state, value = view.state(trial), view.objective(trial)
        if state is TrialState.waiting:
            study.enqueue_trial(params, user_attrs={"signature": trial.signature})
            continue
        # A completed run whose probe failed has no value; to Optuna that is a failure, never a number.
        told = OptunaState.RUNNING if not state.ended else OptunaState.COMPLETE if value is not None else OptunaState.FAIL
        frozen = create_trial(
            state=told,
            params=params,
            distributions=distributions,
            value=value if told is OptunaState.COMPLETE else None,
            user_attrs={"signature": trial.signature},
        )
        study.add_trial(frozen)
    return study


def ask(view: View, study: optuna.Study) -> Trial | None:
    """The next trial that nobody has begun; None when the study has none left."""
    if not any(t.state is OptunaState.WAITING for t in study.get_trials(deepcopy=False)):
        return None
    asked = study.ask()
    return view.sweep.trials[asked.number]
