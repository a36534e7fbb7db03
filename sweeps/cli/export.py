"""Command `python -m sweeps export`: write a sweep to MLflow or W&B, where people keep their runs."""

import argparse
import importlib
import os

from sweeps.report import tables
from sweeps.state.view import View

TRACKERS = ("mlflow", "wandb")
_OF = {"--tracking-uri": "mlflow", "--experiment": "mlflow", "--project": "wandb", "--entity": "wandb", "--offline": "wandb"}


def add_options(group: "argparse._ArgumentGroup") -> None:
    """Add the options of the command to its parser."""
    group.add_argument("--to", choices=TRACKERS, required=True, help="the tracker, MLflow or Weights & Biases")
    uri = "MLflow: server or database, such as http://host:5000 or sqlite:///mlflow.db (default: MLFLOW_TRACKING_URI, else MLflow's own)"
    group.add_argument("--tracking-uri", metavar="URI", help=uri)
    group.add_argument("--experiment", metavar="NAME", help="MLflow (default: MLFLOW_EXPERIMENT_NAME, else the sweep folder's name)")
    group.add_argument("--project", metavar="NAME", help="W&B (default: WANDB_PROJECT, else the sweep folder's name)")
    group.add_argument("--entity", metavar="NAME", help="W&B: user or team (default: WANDB_ENTITY, else your own)")
    offline = "W&B: write below wandb/ of this folder, or of WANDB_DIR, for `wandb sync` to send (default: as WANDB_MODE says)"
    group.add_argument("--offline", action="store_true", help=offline)


def export(view: View, asked: argparse.Namespace) -> int:
    """Export the sweep; return the exit status. Raise ValueError at wrong usage."""
    for flag, tracker in _OF.items():
        if getattr(asked, flag[2:].replace("-", "_")) and tracker != asked.to:
            raise ValueError(f"{flag} must come with --to {tracker}; got --to {asked.to}: leave it out")
    mode = os.environ.get("WANDB_MODE", "online")
    if asked.to == "wandb" and mode not in ("online", "offline"):
        raise ValueError(f"WANDB_MODE must be online or offline to export; got {mode}: unset it")
    require_library(asked.to)
    tables.write_all(view)
    folder = view.sweep.path.name
    if asked.to == "mlflow":
        lines = _to_mlflow(view, asked.tracking_uri, asked.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or folder)
    else:
        from sweeps.report import export_wandb

        project = asked.project or os.environ.get("WANDB_PROJECT") or folder
        lines = export_wandb.export(view, project, asked.entity, asked.offline or mode == "offline")
    print("\n".join(lines))
    return 0


def _to_mlflow(view: View, uri: str | None, experiment: str) -> list[str]:
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # MLflow's own 7 wait for minutes on a server that is not there
    import mlflow

    from sweeps.report import export_mlflow

    return export_mlflow.export(view, uri or mlflow.get_tracking_uri(), experiment)


def require_library(tracker: str) -> None:
    """Raise ValueError, with the command that installs it, if the tracker's library is missing."""
    try:
        importlib.import_module(tracker)
    except ModuleNotFoundError as error:
        if error.name != tracker:
            raise
        rule = f"--to {tracker} must find the library {tracker}; got none"
        raise ValueError(f"{rule}: in a clone of this project, pip install '.[{tracker}]'") from error
