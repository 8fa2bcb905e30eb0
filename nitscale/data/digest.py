"""Data digests: a hash of sample ids, flips and noise keys, by which two runs, or two clusters, prove that they see the
same data. `data_digest` in a run's metrics.jsonl is `chain_digest`; `digests` computes it without a training."""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from tqdm import tqdm

from nitscale.data.manifest import load_dataset
from nitscale.data.plan import Pack, Plan, PlanConfig, PlanState
from nitscale.errors import UserError


def digests(plan: Plan, state: PlanState, steps: int, chained: str = "") -> Iterator[tuple[int, str, str]]:
    """(step, digest of its data, data digest after it) of `steps` steps from `state` on; `chained` is the data digest
    before them, "" at the start of a run. Steps are counted from 0; after step s, a run's log says step s + 1."""
    for _ in range(steps):
        packs, after = plan.step(state)
        chained = chain_digest(chained, packs)
        yield state.step, step_digest(packs).hex(), chained
        state = after


def step_digest(packs: Sequence[Pack]) -> bytes:
    """sha256 of a whole step's sample ids, flips and noise keys, in the order of the packs' positions."""
    digest = hashlib.sha256()
    for pack in sorted(packs, key=lambda pack: pack.pack):
        digest.update(np.array([pack.step, pack.pack, len(pack.sample_ids), pack.noise_key], "<i8").tobytes())
        digest.update(pack.sample_ids.astype("<i8").tobytes() + pack.flips.astype("u1").tobytes())
    return digest.digest()


def print_digests(prefix: str, config: PlanConfig, steps: str) -> None:
    """One line a step of `steps` ("first..last", without the last): the step's own digest, and the data digest that a
    run's log has after it. UserError for steps that cannot be."""
    first, dots, last = steps.partition("..")
    if not (dots and first.isdigit() and last.isdigit() and int(first) < int(last)):
        raise UserError(f"data digest: --steps {steps!r} must be two numbers, e.g. 0..1000")
    plan = Plan(load_dataset(prefix), config)
    found = digests(plan, plan.start(), int(last))
    print(f"{'step':>8}  {'the step':16}  data digest (step + 1 in the log)")
    for step, alone, chained in tqdm(found, total=int(last), desc="digest", unit="step", disable=None):
        if step >= int(first):
            tqdm.write(f"{step:8d}  {alone[:16]}  {chained}")


def chain_digest(previous: str, packs: Sequence[Pack]) -> str:
    """The data digest after a step, from the one before it ("" at the start): two runs saw the same data if equal."""
    return hashlib.sha256(previous.encode() + step_digest(packs)).hexdigest()
