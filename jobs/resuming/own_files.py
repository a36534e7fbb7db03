"""Tell the files of a program from those of libraries and of the launcher."""

import functools
import os
import sysconfig
from pathlib import Path

from cnnjepa.run import checkpoint

ROOT = Path(__file__).resolve().parents[2]
_LIBRARIES = tuple({str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
# Of this project, only the trainer is watched.
_OURS = (f"{ROOT / 'jobs'}/", f"{ROOT / 'sweeps'}/", f"{Path(checkpoint.__file__).resolve().parent}/")


@functools.cache
def is_own(file: str) -> bool:
    """Return whether a file is the program's, and not a library's or the launcher's."""
    path = os.path.realpath(file)
    return file[:1] != "<" and "site-packages" not in path and "dist-packages" not in path and not path.startswith((*_LIBRARIES, *_OURS))
