"""Folders for what is code to whoever reads it, such as submitit's pickles: this user's own, and nobody else may look or write there."""

import os
import shlex
import stat
from pathlib import Path


def make_private(folder: Path, key: str) -> None:
    """Create `folder` with mode 0700, or take one of ours that nobody else could write to; raises ValueError at any other."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        found = folder.lstat()  # not what a link points to
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            said = f"{stat.filemode(found.st_mode)} of user {found.st_uid}"
            raise ValueError(f"{key} must be a folder of this user that nobody else can write; got {folder}, {said}: remove it") from None
    folder.chmod(0o700)  # whatever the umask


def refuse_unless_private(folder: Path) -> str:
    """A line of shell that ends a job whose `folder` is not as `make_private` left it, before anything in it is read."""
    quoted = shlex.quote(str(folder))
    test = f'[ ! -L {quoted} ] && [ -O {quoted} ] && [ "$(stat -c %a {quoted})" = 700 ]'
    return f"{test} || {{ echo 'error: the folder of the pickles must be private' >&2; exit 1; }}"
