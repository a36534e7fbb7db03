"""A full disk, as far as this process can see."""

import resource


class FullDisk:
    """The kernel refuses this process each byte beyond a file size, EFBIG, as it refuses it on a full disk."""

    def __init__(self, at_bytes: int) -> None:
        self.at_bytes, self.before = at_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)

    def __enter__(self) -> "FullDisk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.at_bytes, self.before[1]))
        return self

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)
