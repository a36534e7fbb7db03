"""Create private folders for files that are executed when read, such as submitit's pickles."""

import os
import shlex
import stat
from pathlib import Path


def make_private(folder: Path, key: str) -> None:
    """Create `folder` with mode 0700; raise ValueError if others own it or could write to it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        found = folder.lstat()  # of the link, not of its target
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            said = f"{stat.filemode(found.st_mode)} of user {found.st_uid}"
            raise ValueError(f"{key} must be a folder of this user that nobody else can write; got {folder}, {said}: remove it") from None
    folder.chmod(0o700)  # despite the umask


def refuse_unless_private(folder: Path) -> str:
    """Return a shell line that ends a job unless `folder` is as `make_private` left it."""
    quoted = shlex.quote(str(folder))
    test = f'[ ! -L {quoted} ] && [ -O {quoted} ] && [ "$(stat -c %a {quoted})" = 700 ]'
    return f"{test} || {{ echo 'error: the folder of the pickles must be private' >&2; exit 1; }}"
