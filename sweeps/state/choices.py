"""Read the choices of a search: points/<number>.json, one per trial after the first."""

from pathlib import Path

from cnnjepa.run.files import DamagedError, read_json, reading
from cnnjepa.run.typed import checked
from sweeps.spec.space import Params, applied
from sweeps.spec.sweep import Search, Trial


def folder_of(sweep: Path) -> Path:
    """Return the folder of the choices; raise ValueError if something else is in its place."""
    folder = sweep / "points"  # the folder's name since 0.1
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"points must be a folder; got {folder}, which is not one")
    return folder


def file_of(sweep: Path, number: int) -> Path:
    """Return the file that records the choice of trial `number`."""
    return sweep / "points" / f"{number:06d}.json"


def read(file: Path, search: Search) -> Trial | None:
    """Return the trial of a choice, or None if it is of another search; raise DamagedError."""
    with reading(file):
        values = read_json(file)
        if checked(str, values.pop("search"), "search") != search.digest:
            return None
        params, seed = checked(Params, values["params"], "params"), checked(int, values["seed"], "seed")
        trial = Trial.from_dict({**values, "values": applied(search.base, params, seed)})
        if f"{trial.number:06d}" != file.stem:
            raise TypeError(f"number must be that of the file; got {trial.number}")
        if not 0 <= trial.configuration_number <= trial.number:
            raise TypeError(f"point must be the number of an earlier trial, or its own; got {trial.configuration_number}")
        return trial


def require_no_gap(sweep: Path, number: int) -> None:
    """Raise DamagedError if a choice after `number`, of which there is no file, exists."""
    later = sorted(int(p.stem) for p in folder_of(sweep).glob("[0-9]*.json") if p.stem.isdecimal() and int(p.stem) > number)
    if later:
        said = f"it is missing, while {file_of(sweep, later[0]).name} is there"
        raise DamagedError(file_of(sweep, number), said, remedy="restore it from a copy")
