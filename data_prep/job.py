"""One job of an encode: which partitions are its own, and the pipeline that makes those that are missing.

Jobs know nothing of each other but what lies in the prefix. Each may be run on any machine, at any time, several times,
or twice at once.
"""

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from tqdm import tqdm

from data_prep.commits import Commit, marker_name
from data_prep.encoder import Encoder, cpu_threads
from data_prep.items import Partition
from data_prep.pipeline import RESULT_BYTES, Message, encode_batches, start_pipeline
from data_prep.prepare import Preparation, quiet_pillow
from data_prep.sources import Source
from data_prep.stages import Channel, Stages
from data_prep.writer import SHARDS_AHEAD, Finished, Layout, Publisher, Scratch, write_shards
from nitscale.data.storage import Storage
from nitscale.errors import UserError


@dataclass(frozen=True)
class Share:
    """The partitions of one job: number p belongs to job p mod `of`."""

    job: int
    of: int

    def __post_init__(self) -> None:
        if not 0 <= self.job < self.of:
            raise UserError(
                f"encode: there is no job {self.job} of {self.of}; jobs are counted from 0 to {self.of - 1}"
                f" (a SLURM array of {self.of}: --array=0-{self.of - 1})"
            )

    def mine(self, number: int) -> bool:
        return number % self.of == self.job


def parse_share(job: str | None, of: int | None, environment: Mapping[str, str] = os.environ) -> Share | None:
    """The share that `--job I --of N` names, or None without them. `--job slurm` takes I from SLURM_ARRAY_TASK_ID, and
    N, if it is not given, from the size of the array. UserError for anything else."""
    if job is None:
        if of is not None:
            raise UserError(f"encode: --of {of} needs --job, which counts from 0")
        return None
    if job != "slurm":
        if of is None:
            raise UserError(f"encode: --job {job} needs --of, the number of jobs")
        if not re.fullmatch(r"-?\d+", job):
            raise UserError(f"encode: --job {job!r} is neither a number, counted from 0, nor slurm")
        return Share(int(job), of)
    try:
        task = int(environment["SLURM_ARRAY_TASK_ID"])
        if of is not None:
            return Share(task, of)
        first, last, count = (int(environment[f"SLURM_ARRAY_TASK_{name}"]) for name in ("MIN", "MAX", "COUNT"))
    except KeyError as missing:
        raise UserError(
            f"encode: --job slurm needs {missing}, which SLURM sets in jobs of an array (sbatch --array=0-15); "
            "give --job I --of N elsewhere"
        ) from None
    if last - first + 1 != count:
        raise UserError(
            f"encode: the array has {count} tasks from {first} to {last}, so that their number tells nothing; "
            "give --of, the number of jobs"
        )
    return Share(task - first, count)


@dataclass(frozen=True, eq=False)
class Job:
    """What a job needs to make partitions."""

    storage: Storage
    source: Source
    layout: Layout
    encoder: Encoder
    prepare: Preparation
    workers: int
    """Threads that decode."""
    torch_threads: int
    """Of the codec, on a CPU."""


@dataclass(frozen=True)
class Outcome:
    """What a job made."""

    commits: dict[str, Commit] = field(default_factory=dict)
    """The markers that hold now, of the partitions that it worked on."""
    lost: Sequence[str] = ()
    """Those of them that another job committed first."""
    given_up: Sequence[UserError] = ()
    """Why partitions could not be read."""
    stages: dict[str, float] = field(default_factory=dict)
    """Seconds that each stage worked, over all its threads."""
    seconds: float = 0.0
    """That the pipeline ran."""


def run_job(
    job: Job,
    partitions: Iterable[tuple[int, Partition]],
    replaced: frozenset[str],
    progress: Callable[[int, int], None],
    committed: Callable[[Commit], None],
) -> Outcome:
    """Make `partitions`, and commit each. Those in `replaced` have a marker already, which gives way. `progress` is
    told of images and failures as they come, `committed` of every marker; it may raise to end the job.

    On an error or Ctrl-C, partitions that were committed stay, and nothing of the others is left but objects without a
    marker. UserError for what a user has to mend.
    """
    clock, scratch, started = job.prepare.clock, Scratch(job.storage), time.perf_counter()
    publisher = Publisher(job.storage, scratch, clock, replaced, committed)
    try:
        with cpu_threads(job.torch_threads), quiet_pillow(), Stages() as stages:
            results: Channel[Message] = stages.add(Channel(RESULT_BYTES))
            finished: Channel[Finished] = stages.add(Channel(SHARDS_AHEAD))
            batches = start_pipeline(
                stages, missing(job.storage, partitions, replaced), job.source, job.prepare, job.encoder, job.workers
            )
            stages.start("write", partial(write_shards, results, job.layout, scratch, finished, clock, progress))
            stages.start("publish", partial(publisher.run, finished))
            encode_batches(batches, job.encoder, results, clock)
    finally:
        scratch.remove()
    seconds = time.perf_counter() - started
    return Outcome(publisher.commits, publisher.lost, publisher.given_up, clock.seconds(), seconds)


def missing(
    storage: Storage, partitions: Iterable[tuple[int, Partition]], replaced: frozenset[str]
) -> Iterator[tuple[int, Partition]]:
    """The partitions, one by one, that no other job has committed meanwhile."""
    for number, partition in partitions:
        if partition.name in replaced or not storage.exists(marker_name(partition.name)):
            yield number, partition


def progress_bar(images: int | None, done: int, show: bool) -> tqdm:
    """A bar of images. There is none where the output is no terminal."""
    return tqdm(total=images, initial=done, desc="encode", unit="image", disable=None if show else True)
