"""The end of an encode: from the markers of all partitions to a dataset with a manifest.

Everything here is a function of what lies in the prefix, and may be done again at any time: after failed images were
tried again, or when a shard was lost and made anew.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from data_prep.commits import INDICES, SHARDS, Commit, delete_objects, objects_of, partition_number, read_commits
from nitscale.data.manifest import MANIFEST, Manifest
from nitscale.data.storage import Storage
from nitscale.errors import UserError

FAILURES = "failures.jsonl"
"""One line an image that was skipped, with the reason."""
MOST_CLASSES = 2**20
"""Of a source whose labels are mere numbers."""
TOLERATED = 20
"""Images that may always fail, whatever their share."""


def finish(
    storage: Storage, recipe: dict[str, Any], partitions: Sequence[str], max_failures: float
) -> tuple[Manifest, list[Commit]]:
    """Write failures.jsonl and the manifest, and remove what no marker names.

    UserError if partitions are missing, which are listed; if more than the share `max_failures` of the images failed;
    or if no image of some class can be used. There is no new manifest then.
    """
    whole, _ = read_commits(storage, partitions)
    if lacking := [name for name in partitions if name not in whole]:
        some = ", ".join(lacking[:10]) + (", …" if len(lacking) > 10 else "")
        raise UserError(
            f"encode: {storage.prefix} is not complete: {len(lacking):,} of {len(partitions):,} partitions are missing "
            f"({some}); run their jobs again, or this command without --finish, which makes what is missing"
        )
    commits = [whole[name] for name in partitions]
    failures = sorted(all_failures(commits), key=lambda failure: (failure["source"], failure["rendition"] or ""))
    write_failures(storage, failures)
    check_failures(commits, None, max_failures, storage)
    check_classes(recipe["classes"], commits, failures)
    manifest = build_manifest(commits, recipe)
    data = manifest.to_json().encode()
    if not (storage.exists(MANIFEST) and storage.read(MANIFEST) == data):
        storage.write(MANIFEST, data)
    remove_strays(storage, commits)
    return manifest, commits


def all_failures(commits: Iterable[Commit]) -> list[dict[str, Any]]:
    return [failure for commit in commits for failure in commit["failures"]]


def write_failures(storage: Storage, failures: Sequence[dict[str, Any]]) -> None:
    """Write failures.jsonl; no failures, no file."""
    if failures:
        lines = (json.dumps(failure, ensure_ascii=False, sort_keys=True) + "\n" for failure in failures)
        storage.write(FAILURES, "".join(lines).encode())
    else:
        storage.delete(FAILURES)


def check_failures(commits: Iterable[Commit], images: int | None, max_failures: float, storage: Storage) -> None:
    """UserError if too many images failed: more than the share `max_failures` of `images` (default: of those that the
    markers tell of), and more than TOLERATED."""
    commits = list(commits)
    images = images or sum(commit["images"] for commit in commits)
    failures = all_failures(commits)
    failed = len({failure["source"] for failure in failures})
    if failed <= max(TOLERATED, max_failures * images):
        return
    reasons = ", ".join(f"{count:,} x {reason}" for reason, count in kinds_of_failures(failures).most_common(3))
    raise UserError(
        f"encode: {failed:,} of {images:,} images cannot be used ({reasons}), more than the {max_failures:.2%} of "
        f"--max-failures; the markers in {storage.prefix}/commits list them. Mend them and run again with "
        "--retry-failed, or raise --max-failures"
    )


def kinds_of_failures(failures: Iterable[dict[str, Any]]) -> Counter[str]:
    """How many failures there are of each kind: reasons without their numbers."""
    return Counter(re.sub(r"\d[\d,.]*", "…", failure["reason"]) for failure in failures)


def check_classes(classes: Sequence[str] | None, commits: Iterable[Commit], failures: Iterable[dict[str, Any]]) -> None:
    """UserError if no image of some class could be used."""
    labels = count_labels(commits)
    lost = {failure["label"]: failure for failure in reversed(list(failures)) if failure["label"] not in labels}
    if not labels:
        reasons = "; ".join(f"{failure['source']}: {failure['reason']}" for failure in list(lost.values())[:3])
        raise UserError(f"encode: none of the images can be used ({reasons}); mend them, then run with --retry-failed")
    for label, name in enumerate(classes or ()):
        if label not in labels:
            example = f" ({lost[label]['source']}: {lost[label]['reason']})" if label in lost else ""
            raise UserError(
                f"encode: no image of class {name!r} can be used{example}; mend its images and run again with "
                "--retry-failed, or remove the class and encode into a new output"
            )


def count_labels(commits: Iterable[Commit]) -> Counter[int]:
    """Samples of each label."""
    return Counter({int(label): n for label, n in total(commits, "labels").items()})


def total(commits: Iterable[Commit], name: str) -> Counter[str]:
    """The sum of a count that every marker has."""
    counts: Counter[str] = Counter()
    for commit in commits:
        counts.update(commit[name])
    return counts


def build_manifest(commits: Sequence[Commit], recipe: dict[str, Any]) -> Manifest:
    """The manifest of committed partitions."""
    config = recipe["config"]
    members = {"image": config["jpeg"], "text": recipe["text"]}
    classes = recipe["classes"]
    if classes is None:
        largest = max(count_labels(commits))
        if largest >= MOST_CLASSES:
            raise UserError(
                f"encode: label {largest:,} stands for more than {MOST_CLASSES:,} classes, which are no classes; "
                "give --classes with their names, and samples that name theirs"
            )
        classes = [str(label) for label in range(largest + 1)]
    return Manifest(
        codec=recipe["codec"],
        dtype=config["dtype"],
        flips=config["flips"],
        classes=list(classes),
        samples=sum(commit["samples"] for commit in commits),
        tokens=sum(commit["tokens"] for commit in commits),
        grids=dict(sorted(total(commits, "grids").items())),
        shards=[
            {name: shard[name] for name in ("tar", "index", "samples", "bytes", "sha256", "index_sha256")}
            for commit in commits
            for shard in commit["shards"]
        ],
        renditions=list(config["resize"]),
        members=[member for member, there in members.items() if there],
    )


def remove_strays(storage: Storage, commits: Sequence[Commit]) -> int:
    """Remove shards and indices of these partitions that no marker names: of jobs that were killed, or came second."""
    named = {name for commit in commits for name in objects_of(commit)}
    there = [*storage.list(SHARDS), *storage.list(INDICES)]
    strays = {name for name in there if (number := partition_number(name)) is not None and number < len(commits)}
    return delete_objects(storage, strays - named)
