"""Find cluster profiles by name: those shipped, those of the user's own folder, and those of other packages."""

import importlib.util
from importlib.metadata import EntryPoint
from pathlib import Path

from cnnjepa.run.console import PROFILES, offered

CONFIG_DIR = Path(__file__).resolve().parent.parent / "slurm"
OWN_FOLDER = Path("slurm") / "cluster"  # below the folder in which a command is typed


def shipped(folder: Path = CONFIG_DIR) -> dict[str, Path]:
    """Return the profiles that come with the launcher, in its folder slurm/, files by name."""
    return {path.stem: path for path in sorted((folder / "cluster").glob("*.yaml"))}


def names(folder: Path = CONFIG_DIR) -> list[str]:
    """Return the names of all profiles: those shipped in `folder`, the user's, and those that packages offer."""
    own = [path.stem for path in OWN_FOLDER.glob("*.yaml")]
    return sorted({*shipped(folder), *own, *(point.name for point in offered(PROFILES))})


def find(name: str, folder: Path = CONFIG_DIR) -> Path | None:
    """Return the file of the user's or of a package's profile of that name, or None if it is a shipped one or none.

    Raise ValueError if different files have the name.
    """
    ours = shipped(folder).get(name)
    mine = OWN_FOLDER.absolute() / f"{name}.yaml"
    files = [*([ours] if ours else []), *([mine] if mine.is_file() else [])]
    files += [_beside(point) for point in offered(PROFILES) if point.name == name]
    for path in files[1:]:
        if path.resolve() != files[0].resolve() and path.read_bytes() != files[0].read_bytes():
            raise ValueError(f"cluster {name} must be one file; got {path} and {files[0]}: rename one, or give it by its path")
    return files[0] if files and ours is None else None


def _beside(point: EntryPoint) -> Path:
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
