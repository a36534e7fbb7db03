"""File systems without hard links: a fake, whose os.link and os.symlink are refused, and a real one, exFAT in a file."""

import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

_IMAGE_BYTES = 32 * 2**20
_PROGRAMS = ("mkfs.exfat", "mount.exfat-fuse", "losetup", "umount")


def refuse_links(patch: pytest.MonkeyPatch, number: int = errno.EPERM, symbolic: int = 0) -> None:
    """Let os.link fail with an errno from now on, and os.symlink with `symbolic` if that is given. A fake, in this process alone."""

    def refuse(with_errno: int) -> object:
        def call(source: object, target: object, **_: object) -> None:
            raise OSError(with_errno, os.strerror(with_errno), source, None, target)

        return call

    patch.setattr(os, "link", refuse(number))
    if symbolic:
        patch.setattr(os, "symlink", refuse(symbolic))


@contextlib.contextmanager
def exfat(folder: Path) -> Iterator[Path]:
    """Yield the root of a new exFAT file system, which has neither hard nor symbolic links; skip the test where none can be mounted."""
    if os.geteuid() or not all(map(shutil.which, _PROGRAMS)):
        pytest.skip(f"needs root and {', '.join(_PROGRAMS)}")
    image, root = folder / "exfat.img", folder / "exfat"
    with open(image, "wb") as file:
        file.truncate(_IMAGE_BYTES)
    subprocess.run(["mkfs.exfat", str(image)], check=True, capture_output=True)
    device = ""
    try:
        device = subprocess.run(["losetup", "-f", "--show", str(image)], check=True, capture_output=True, text=True).stdout.strip()
        root.mkdir()
        subprocess.run(["mount.exfat-fuse", device, str(root)], check=True, capture_output=True, timeout=20)
    except (subprocess.SubprocessError, OSError) as error:
        if device:
            subprocess.run(["losetup", "-d", device], check=False)
        pytest.skip(f"exFAT cannot be mounted here: {error}")
    try:
        yield root
    finally:
        subprocess.run(["umount", str(root)], check=True)
        subprocess.run(["losetup", "-d", device], check=False)
