"""Follow the losses of a run in progress, in a fixed number of parts; read each line once."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from cnnjepa.run.attempts import newest
from cnnjepa.run.records import record_of

_PARTS = 400  # parts of a whole run; long runs need no more memory than short ones
_LAST_RECORD_BYTES = 4096
_MARGIN = 1.25  # lines differ in length


class LossCurve:
    """Sums of the losses in each part of a run, and the learning rate of its last record."""

    def __init__(self, epochs: int) -> None:
        """Start an empty curve for a run of `epochs` epochs in total."""
        self.epochs = epochs
        self._inode = 0
        self._forget()

    def _forget(self) -> None:
        self.epoch = self.lr = 0.0  # of the last record
        self._end = 0  # how far the file was read
        self._from = 0  # the first part that was read
        # part -> number of records, sum of losses, sum of their squares
        self._sums: dict[int, tuple[int, float, float]] = {}

    @staticmethod
    def of(records: Iterable[dict[str, Any]], epochs: int) -> "LossCurve":
        """Build the curve from `records` of metrics.jsonl."""
        curve = LossCurve(epochs)
        for record in records:
            curve.add(record)
        return curve

    def add(self, record: dict[str, Any]) -> None:
        """Add a record; records that are not steps or have no loss are ignored."""
        loss, lr = record.get("loss"), record.get("lr")
        if record["kind"] != "step" or loss is None or lr is None:
            return
        self.epoch, self.lr = float(record["epoch"]), float(lr)
        count, total, squares = self._sums.get(self._part(self.epoch), (0, 0.0, 0.0))
        self._sums[self._part(self.epoch)] = count + 1, total + loss, squares + loss * loss

    def _part(self, epoch: float) -> int:
        return min(int(_PARTS * epoch / self.epochs), _PARTS - 1)

    def read(self, path: Path, share: float) -> None:
        """Read what a metrics file gained; at first, only what the last `share` needs."""
        try:
            file = open(path, "rb")  # noqa: SIM115, the next block closes it
        except FileNotFoundError:
            if (own := newest(path)) != path:
                self.read(own, share)
            return
        with file:
            status = os.fstat(file.fileno())
            # a resumed run begins a new file
            if status.st_ino != self._inode or status.st_size < self._end:
                self._forget()
                self._inode = status.st_ino
                self._end = self._start(file, status.st_size, share)
            file.seek(self._end)
            *lines, rest = file.read().split(b"\n")
            self._end = file.tell() - len(rest)
        for line in lines:
            if line.startswith(b'{"kind": "step"') and (record := record_of(line)):
                if not self._sums:
                    self._from = self._part(float(record["epoch"])) if self._from else 0
                self.add(record)

    def _start(self, file: BinaryIO, size: int, share: float) -> int:
        """Return the byte at which the last `share` of the run begins, minus a margin."""
        file.seek(max(size - _LAST_RECORD_BYTES, 0))
        found = [record for line in file.read().split(b"\n")[:-1] if (record := record_of(line))]
        reached, needed = float(found[-1]["epoch"]) if found else 0.0, _MARGIN * share * self.epochs
        if reached <= needed:
            return 0
        file.seek(int(size * (1 - needed / reached)))
        file.readline()
        self._from = 1
        return file.tell()

    def halves(self, share: float, not_before: float) -> tuple[float, float, float] | None:
        """Return the mean losses of the two halves of the last `share` of the run.

        The third value is the standard error of their difference. Return None too soon after epoch
        `not_before`, or if a half has fewer than two records.
        """
        half = max(round(_PARTS * share / 2), 1)
        end = self._part(self.epoch) + 1
        first = end - 2 * half
        if first < max(self._from, _PARTS * not_before / self.epochs):
            return None
        means, variances = [], []
        for start in (first, first + half):
            found = [self._sums[part] for part in range(start, start + half) if part in self._sums]
            count, total, squares = (sum(column) for column in zip(*found, strict=True)) if found else (0, 0.0, 0.0)
            if count < 2:
                return None
            means.append(total / count)
            variances.append(max(squares - total * total / count, 0.0) / (count - 1) / count)
        return means[0], means[1], sum(variances) ** 0.5
