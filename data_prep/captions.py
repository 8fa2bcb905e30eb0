"""Captions by image id, from a JSONL or Parquet file.

SA-1B has eleven million images, whose captions would fill the memory of every job: they are kept in an unnamed
temporary file, and only their ids and places in memory (16 bytes each).
"""

import json
import os
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.folders import readable
from nitscale.errors import UserError


class Captions:
    """Captions by image id; may be asked from several threads."""

    def __init__(self, rows: Iterable[tuple[int, str]]) -> None:
        """OSError if there is no room for them, OverflowError for an id of more than 64 bits."""
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (closed, and thereby removed, with the captions)
        ids, ends = array("q"), array("q", [0])
        for image_id, caption in rows:
            ids.append(image_id)
            ends.append(ends[-1] + self._file.write(readable(caption).encode()))
        self._file.flush()
        self._order = np.argsort(np.asarray(ids), kind="stable")
        self._ids = np.asarray(ids)[self._order]
        self._ends = np.asarray(ends)

    def __len__(self) -> int:
        return len(self._ids)

    def get(self, image_id: int) -> str | None:
        """The image's caption, the last one if it has several; None if it has none."""
        place = int(np.searchsorted(self._ids, image_id, side="right")) - 1
        if place < 0 or self._ids[place] != image_id:
            return None
        row = self._order[place]
        begin, end = self._ends[row : row + 2].tolist()
        return os.pread(self._file.fileno(), end - begin, begin).decode()


def read_captions(path: str | Path) -> Captions:
    """Captions from JSONL or Parquet (needs pyarrow) with columns image_id (or id) and caption (or text).

    UserError if the file cannot be read or a row has no such columns."""
    if "://" in str(path):
        raise UserError(f"captions: {path} is no local file; bring it to the machine first")
    path = Path(path)
    try:
        return Captions(parse_rows(path, parquet_rows(path) if path.suffix == ".parquet" else jsonl_rows(path)))
    except UserError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"captions: {path} cannot be read: {error}") from error


def parse_rows(path: Path, rows: Iterable[Any]) -> Iterator[tuple[int, str]]:
    """Image id and caption of each row."""
    for number, row in enumerate(rows, 1):
        try:
            image_id = int(row["image_id"] if "image_id" in row else row["id"])
            if not -(2**63) <= image_id < 2**63:
                raise ValueError(f"{image_id} has more than 64 bits")
            caption = row["caption"] if "caption" in row else row["text"]
            if caption is None:
                continue
            if not isinstance(caption, str):
                raise TypeError(f"caption {caption!r} is no text")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"captions: row {number} of {path} has no image_id and caption ({error!r}); give JSONL lines like "
                '{"image_id": 17, "caption": "a dog"}, or Parquet with these columns'
            ) from error
        yield image_id, caption


def jsonl_rows(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


def parquet_rows(path: Path) -> Iterator[Any]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"captions: {path} needs pyarrow ({error}); pip install 'nitscale[parquet]'") from None
    with pyarrow.parquet.ParquetFile(path) as file:
        wanted = [name for name in file.schema_arrow.names if name in ("image_id", "id", "caption", "text")]
        for batch in file.iter_batches(columns=wanted):
            yield from batch.to_pylist()
