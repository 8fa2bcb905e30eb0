"""The ledger of images that could not be read: they train with weight 0, and too many of them end the run."""

import json
from pathlib import Path

from nitscale.data.index import DatasetIndex
from nitscale.errors import UserError
from nitscale.files import atomic_write, disk_errors
from nitscale.layout import PackedBatch

MOST_UNREADABLE = 0.01
"""Share of the images since the last log line above which a run stops …"""
FEWEST_UNREADABLE = 10
"""… if there are more than this."""


class Quarantine:
    """quarantine.jsonl of a run: a line for each image, when it was met."""

    def __init__(self, path: Path, index: DatasetIndex) -> None:
        self.path, self.index = path, index

    def note(self, batch: PackedBatch) -> None:
        """Write down the images of a pack that could not be read."""
        if not batch.unreadable:
            return
        with disk_errors(self.path), self.path.open("a") as ledger:
            for sample_id, reason in batch.unreadable:
                line = {"step": batch.step, "sample": sample_id, "key": self.index.key(sample_id), "reason": reason}
                ledger.write(json.dumps(line) + "\n")

    def before(self, step: int) -> str:
        """The lines of earlier steps: for a checkpoint."""
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        return "".join(line for line in lines if json.loads(line)["step"] < step)

    def set_back(self, lines: bytes) -> None:
        """Those of a checkpoint, after which the steps come again."""
        atomic_write(self.path, lines)

    def refuse(self, unreadable: int, images: int, dataset: str) -> None:
        """UserError if too many of the last `images` were unreadable."""
        if unreadable > max(MOST_UNREADABLE * images, FEWEST_UNREADABLE):
            raise UserError(
                f"train: {unreadable} of the last {images:,} images could not be read, see {self.path}; mend the data "
                f"set at {dataset}, then run again"
            )
