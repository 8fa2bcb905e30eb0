"""What an encode did, in words: counts, failures by reason, and what each stage of the pipeline had to do."""

from collections.abc import Sequence
from dataclasses import dataclass

from data_prep.commits import Commit
from data_prep.finish import FAILURES, all_failures, kinds_of_failures, total
from data_prep.job import Outcome
from data_prep.prepare import Failure
from nitscale.data.manifest import Manifest

ENCODER = ("encode", "encoder waits", "encoder held up")
"""What the encoder's thread does: nothing else."""


@dataclass(frozen=True)
class EncodeReport:
    """What an encode did."""

    output: str
    partitions: int
    """Of this job; of the dataset, if it is finished."""
    all_partitions: int
    """Of the dataset."""
    reused_partitions: int
    """Those of them that an earlier run or another job had committed."""
    images: int
    """Images of committed partitions, those that failed too."""
    samples: int
    renditions: dict[str, int]
    """Samples of each resize rule."""
    tokens: int
    """Latent cells of all samples: tokens at patch size 1."""
    shards: int
    without_text: int
    """Samples whose caption is empty, where captions are stored."""
    dropped_text: int
    """Samples whose caption is not stored, because the first images had none, or none were wanted."""
    failures: tuple[Failure, ...]
    """Sorted by source."""
    ignored: dict[str, int]
    """Number of files that are no images, by their suffix."""
    seconds: float
    """Of the whole call."""
    worked_images: int
    """Images that this run encoded."""
    worked_seconds: float
    """That the pipeline of this run took."""
    stages: dict[str, float]
    """Seconds that each of its stages worked, over all threads."""
    workers: int
    """Threads that decoded."""
    digest: str | None
    """Of the manifest: the dataset's version. None if it is not finished."""

    @property
    def encoder_wait(self) -> float:
        """Share of the time that the encoder waited for a batch."""
        spent = sum(self.stages.get(name, 0.0) for name in ENCODER)
        return self.stages.get("encoder waits", 0.0) / spent if spent else 0.0

    def summary(self) -> str:
        """The report as a table, with the first skipped images."""
        speed = f", {self.worked_images / self.worked_seconds:,.1f} images/s" if self.worked_images else ""
        made = f"{self.shards:,} shards of {self.partitions:,} partitions, {self.reused_partitions:,} made before"
        head = f"{self.images:,} images → {self.samples:,} samples: {self.output}"
        rows = [
            *((f"samples {name}", f"{count:,}") for name, count in self.renditions.items()),
            ("latent cells", f"{self.tokens:,}"),
            ("shards", made),
            ("time", f"{self.seconds:,.1f} s{speed}"),
        ]
        if self.without_text:
            rows.append(("without caption", f"{self.without_text:,}"))
        if self.dropped_text:
            rows.append(("captions dropped", f"{self.dropped_text:,}; to store them: --text, and a new output"))
        if self.ignored:
            rows.append(("other files", ", ".join(f"{n:,} {suffix}" for suffix, n in self.ignored.items())))
        if self.worked_images:
            rows += self.stage_rows()
        kinds = kinds_of_failures(vars(failure) for failure in self.failures)
        rows += [("skipped", f"{count:,} x {reason}") for reason, count in kinds.most_common(10)]
        width = max(len(name) for name, _ in rows)
        lines = [head, *(f"  {name:<{width}}  {value}" for name, value in rows)]
        if self.digest is None:
            lines.append(f"not finished: when all {self.all_partitions:,} partitions are made, run --finish")
        if self.failures:
            skipped = len({failure.source for failure in self.failures})
            lines.append(f"{skipped:,} images skipped, all listed in {self.output}/{FAILURES}:")
            lines += [f"  {failure.source}: {failure.reason}" for failure in self.failures[:5]]
        return "\n".join(lines)

    def stage_rows(self) -> list[tuple[str, str]]:
        """How busy each stage's threads were."""
        total = max(self.worked_seconds, 1e-9)
        decoding = {name: self.stages.get(name, 0.0) / (total * self.workers) for name in DECODING}
        others = {name: self.stages.get(name, 0.0) / total for name in ("encode", "write", "publish")}
        parts = [f"{name} {share:.0%}" for name, share in decoding.items() if share]
        return [
            ("decode threads", f"{self.workers} x {sum(decoding.values()):.0%} busy: {', '.join(parts)}"),
            ("other threads", ", ".join(f"{name} {share:.0%} busy" for name, share in others.items())),
            ("encoder waits", f"{self.encoder_wait:.1%} of its time"),
        ]


DECODING = ("read", "decode", "resize", "jpeg")
"""Stages of the decoding threads."""


def make_report(
    output: str,
    partitions: int,
    all_partitions: int,
    commits: Sequence[Commit],
    manifest: Manifest | None,
    outcome: Outcome,
    ignored: dict[str, int],
    workers: int,
    seconds: float,
) -> EncodeReport:
    """The report of a job whose committed partitions are `commits`."""
    made = [commit for name, commit in outcome.commits.items() if name not in outcome.lost]
    return EncodeReport(
        output=output,
        partitions=partitions,
        all_partitions=all_partitions,
        reused_partitions=len(commits) - len(made),
        images=sum(commit["images"] for commit in commits),
        samples=sum(commit["samples"] for commit in commits),
        renditions=dict(total(commits, "renditions")),
        tokens=sum(commit["tokens"] for commit in commits),
        shards=sum(len(commit["shards"]) for commit in commits),
        without_text=sum(commit["without_text"] for commit in commits),
        dropped_text=sum(commit["dropped_text"] for commit in commits),
        failures=tuple(
            sorted((Failure(**f) for f in all_failures(commits)), key=lambda f: (f.source, f.rendition or ""))
        ),
        ignored=ignored,
        seconds=seconds,
        worked_images=sum(commit["images"] for commit in outcome.commits.values()),
        worked_seconds=outcome.seconds,
        stages=outcome.stages,
        workers=workers,
        digest=manifest.digest if manifest else None,
    )
