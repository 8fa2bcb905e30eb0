"""When a partition is done: its shards and indices are there, and a marker, written last, names them.

The marker `commits/PARTITION.json` is an object that only one writer can create: of several jobs that made the same
partition at once, the first to commit wins, and the others remove what they made unless it is the same to the byte.
Objects carry a part of their hash in their name, so that two versions of a partition never overwrite each other. What
no marker names does not exist for anybody: a job may be killed at any point.
"""

import json
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

from nitscale.data.storage import Storage

COMMITS, SHARDS, INDICES = "commits", "shards", "index"
READERS = 16
"""Markers that are read at once: an object store answers slowly, but many at a time."""

Commit: TypeAlias = dict[str, Any]
"""A marker: partition, images, samples, tokens, counts of grids, labels and renditions, without_text, dropped_text,
failures, shards."""
ShardEntry: TypeAlias = dict[str, Any]
"""Of one shard: tar and index (object names), samples, bytes, sha256, index_bytes, index_sha256."""


def marker_name(partition: str) -> str:
    return f"{COMMITS}/{partition}.json"


def object_names(number: int, sha256: str) -> tuple[str, str]:
    """Names of a shard and of its index."""
    stem = f"{number:06d}-{sha256[:8]}"
    return f"{SHARDS}/{stem}.tar", f"{INDICES}/{stem}.npz"


def partition_number(name: str) -> int | None:
    """Number of the partition that an object belongs to; None if it is no shard and no index."""
    match = re.fullmatch(rf"(?:{SHARDS}/(\d{{6,}})-[0-9a-f]{{8}}\.tar|{INDICES}/(\d{{6,}})-[0-9a-f]{{8}}\.npz)", name)
    return int(match[1] or match[2]) if match else None


def read_commit(storage: Storage, partition: str) -> Commit | None:
    """The partition's marker; None if there is none, or none that can be read."""
    try:
        commit: Commit = json.loads(storage.read(marker_name(partition)))
        objects_of(commit)
        return commit if commit["partition"] == partition and isinstance(commit["failures"], list) else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def objects_of(commit: Commit) -> dict[str, int]:
    """Names of the objects that a marker names → their bytes."""
    entries = commit["shards"]
    return {entry["tar"]: entry["bytes"] for entry in entries} | {
        entry["index"]: entry["index_bytes"] for entry in entries
    }


def is_whole(storage: Storage, commit: Commit) -> bool:
    """Whether every object that the marker names is there with its size."""
    try:
        return all(storage.size(name) == size for name, size in objects_of(commit).items())
    except FileNotFoundError:
        return False


def read_commits(storage: Storage, partitions: Iterable[str]) -> tuple[dict[str, Commit], set[str]]:
    """The markers of those partitions that are whole: every object that the marker names is there with its size. And
    the names of partitions that have a marker which is not."""
    there = storage.list(COMMITS)
    names = [name for name in partitions if marker_name(name) in there]
    with ThreadPoolExecutor(READERS, thread_name_prefix="commits") as pool:
        commits = list(pool.map(lambda name: read_commit(storage, name), names))
    sizes = storage.list(SHARDS) | storage.list(INDICES)  # after the markers, whose objects come before them
    whole = {
        name: commit
        for name, commit in zip(names, commits, strict=True)
        if commit is not None and all(sizes.get(n) == size for n, size in objects_of(commit).items())
    }
    return whole, set(names) - set(whole)


def commit_partition(storage: Storage, commit: Commit, replace: bool) -> Commit:
    """Commit a partition whose objects are there: the marker that now holds, this one or another job's.

    With `replace`, the marker takes the place of one that was found damaged or is to be improved on.
    """
    name, data = marker_name(commit["partition"]), to_json(commit)
    if replace:
        storage.write(name, data)
        return commit
    if storage.put_if_absent(name, data):
        return commit
    winner = read_commit(storage, commit["partition"])
    if winner is None:  # damaged since this job looked
        storage.write(name, data)
        return commit
    delete_objects(storage, set(objects_of(commit)) - set(objects_of(winner)))
    return winner


def delete_objects(storage: Storage, names: Iterable[str]) -> int:
    """Remove objects; how many."""
    with ThreadPoolExecutor(READERS, thread_name_prefix="delete") as pool:
        return len(list(pool.map(storage.delete, sorted(names))))


def to_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=1, sort_keys=True) + "\n").encode()
