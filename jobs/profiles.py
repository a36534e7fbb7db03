"""Find cluster profiles by name: those shipped, those of the user's own folder, and those of other packages."""

import importlib.metadata
import importlib.util
from pathlib import Path

from cnnjepa.run.console import PROFILES  # entry points: the name of a profile, and the module beside its file

CONFIG_DIR = Path(__file__).resolve().parent.parent / "slurm"
OWN_FOLDER = Path("slurm") / "cluster"  # below the folder in which a command is typed


def shipped(folder: Path = CONFIG_DIR) -> dict[str, Path]:
    """Return the profiles that come with the launcher, in its folder slurm/, files by name."""
    return {path.stem: path for path in sorted((folder / "cluster").glob("*.yaml"))}


def own(folder: Path = CONFIG_DIR) -> dict[str, Path]:
    """Return the profiles of the user's folder and of other packages, files by name. `folder` is as for `shipped`.

    Raise ValueError at a name that two different files have.
    """
    ours = shipped(folder)
    files = [(path.stem, path.absolute()) for path in sorted(OWN_FOLDER.glob("*.yaml"))]
    files += [(point.name, _beside(point)) for point in importlib.metadata.entry_points(group=PROFILES)]
    found: dict[str, Path] = {}
    for name, path in files:
        known = ours.get(name) or found.get(name)
        if known is None:
            found[name] = path
        elif known.resolve() != path.resolve() and known.read_bytes() != path.read_bytes():
            raise ValueError(f"a cluster profile must have a name of its own; got {path} beside {known}: rename it, or give it by its path")
    return found


def _beside(point: importlib.metadata.EntryPoint) -> Path:
    """Return the file NAME.yaml in the folder of the module that an entry point names."""
    try:
        spec = importlib.util.find_spec(point.value)
    except (ImportError, ValueError):
        spec = None
    places = list(spec.submodule_search_locations or []) if spec else []
    folder = Path(places[0]) if places else Path(spec.origin).parent if spec and spec.origin else None
    if folder is None or not (folder / f"{point.name}.yaml").is_file():
        what = f"a package or module beside {point.name}.yaml"
        raise ValueError(
            f"the entry point {point.name} of {PROFILES} must name {what}; got {point.value}: correct it, or uninstall its package"
        )
    return folder / f"{point.name}.yaml"
