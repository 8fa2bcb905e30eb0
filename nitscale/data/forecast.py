"""`nitscale data plan`: what a plan will be like, before the money is spent: one epoch of it, measured.

Fill, balance and mixture are taken from the steps that the trainer will take, with the packs that it will see.
"""

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from nitscale.data.manifest import Dataset
from nitscale.data.packing import work
from nitscale.data.plan import Plan, PlanConfig, PlanState, Round, share_out
from nitscale.randomness import permutation


def forecast(dataset: Dataset, config: PlanConfig, world_size: int, ranks_per_node: int = 8) -> dict[str, Any]:
    """One epoch of the plan, rounded up to whole rounds, in numbers:

    `fill`: tokens over token budget; `packs` and `steps` of an epoch; `imbalance`: mean over steps of the work of the
    busiest rank over the mean rank's; `entropy`: mean over steps of the Shannon entropy of the image sizes in the step,
    over that of the same images dealt to steps at random; `carried`: most images of a lane that waited for the next
    round; `seconds` of planning. For a dataset with shards also `gets`, which all nodes together fetch from an object
    store in these steps, one a shard, and `cache_gb`, what a node holds at a time.

    UserError as `Plan` and `share_out`.
    """
    share_out([0] * config.packs_per_step, config.lanes, world_size)
    began = time.perf_counter()
    plan = Plan(dataset, config)
    seconds = time.perf_counter() - began
    tokens = int(plan.lengths(np.arange(dataset.index.num_samples)).sum())
    capacity = config.packs_per_step * config.token_budget
    rounds = max(1, round(tokens / capacity / plan.round_steps))
    sizes = np.array([shard.get("bytes", 0) for shard in dataset.manifest.shards])
    nodes = lanes_of_nodes(plan, world_size, ranks_per_node)
    traffic = ShardTraffic(plan, sizes, nodes) if sizes.any() else None
    state, packed, carried = plan.start(), 0, 0
    imbalance: list[float] = []
    entropy: list[tuple[float, float]] = []
    for number in range(rounds):
        began = time.perf_counter()
        packs = plan.round(state)
        seconds += time.perf_counter() - began
        carried = max(carried, *(len(cursor.carried) for cursor in packs.next_cursors))
        costs, round_tokens = pack_costs(plan, packs)
        packed += round_tokens
        for step_costs in costs.tolist():
            loads = [sum(step_costs[i] for i in rank) for rank in share_out(step_costs, config.lanes, world_size)]
            imbalance.append(max(loads) / (sum(loads) / world_size))
        entropy.append(size_entropy(plan, packs, number))
        if traffic:
            traffic.add(state)
        state = plan.next_round(state)
    fill = packed / (rounds * plan.round_steps * capacity)
    num_packs = math.ceil(tokens / (fill * config.token_budget))
    found, at_random = np.mean(entropy, axis=0)
    report = {
        "packer": config.packer,
        "images": dataset.index.num_samples,
        "tokens": tokens,
        "token_budget": config.token_budget,
        "packs_per_step": config.packs_per_step,
        "lanes": config.lanes,
        "world_size": world_size,
        "fill": round(fill, 5),
        "packs": num_packs,
        "steps": math.ceil(num_packs / config.packs_per_step),
        "imbalance": round(float(np.mean(imbalance)), 5),
        "entropy": round(float(found / at_random), 4),
        "carried": carried,
        "seconds": round(seconds, 3),
    }
    return report | (traffic.describe() if traffic else {})


def describe_forecast(report: dict[str, Any]) -> str:
    """The report as lines for people."""
    lines = [
        ("images", f"{report['images']:,} of {report['tokens'] / report['images']:,.1f} tokens on average"),
        ("packs", f"{report['packs']:,} of at most {report['token_budget']:,} tokens, {report['fill']:.2%} full"),
        ("steps", f"{report['steps']:,} of {report['packs_per_step']:,} packs on {report['world_size']:,} ranks"),
        ("imbalance", f"{report['imbalance']:.4f}: work of the busiest rank over the mean, mean over the steps"),
        ("entropy", f"{report['entropy']:.4f} of that of random steps: the mixture of sizes in a step"),
        ("planned in", f"{report['seconds']:.2f} s"),
    ]
    if "nodes" in report:
        reads = f"{report['gets']:,} shards fetched an epoch by {report['nodes']} nodes, one GET each"
        lines.append(("object store", f"{reads}; a node's cache holds up to {report['cache_gb']:,.2f} GB"))
    return "\n".join(f"{name:>12}  {text}" for name, text in lines)


def pack_costs(plan: Plan, packs: Round) -> tuple[np.ndarray, int]:
    """Work of each pack of a round, (steps, packs a step) int64 in the order of the packs, and the tokens of all."""
    costs, tokens = [], 0
    for share in packs.shares:
        lengths = plan.lengths(share.sample_ids)[share.starts[0] :]
        costs.append(np.add.reduceat(work(lengths), share.starts[:-1] - share.starts[0]))
        tokens += int(lengths.sum())
    return np.concatenate([part.reshape(plan.round_steps, -1) for part in costs], axis=1), tokens


def size_entropy(plan: Plan, packs: Round, number: int) -> tuple[float, float]:
    """Mean over a round's steps of the entropy of image sizes, in nats: as packed, and dealt to steps at random."""
    steps = [np.diff(share.starts).reshape(plan.round_steps, -1).sum(axis=1) for share in packs.shares]
    step_of = np.concatenate([np.arange(plan.round_steps).repeat(counts) for counts in steps])
    grids = plan.grids(np.concatenate([share.sample_ids[share.starts[0] :] for share in packs.shares]))
    size_of = np.unique(grids[:, 0] << 32 | grids[:, 1], return_inverse=True)[1]
    shuffled = step_of[permutation(len(step_of), "entropy", number)]
    return mean_entropy(step_of, size_of), mean_entropy(shuffled, size_of)


def mean_entropy(group_of: np.ndarray, value_of: np.ndarray) -> float:
    """Mean over the groups of the Shannon entropy of the values in each, in nats."""
    counts = np.bincount(group_of * (int(value_of.max()) + 1) + value_of)
    counts = np.pad(counts, (0, -len(counts) % (int(value_of.max()) + 1))).reshape(-1, int(value_of.max()) + 1)
    shares = counts / counts.sum(axis=1, keepdims=True)
    return float(-(shares * np.log(np.where(shares > 0, shares, 1))).sum(axis=1).mean())


@dataclass
class ShardTraffic:
    """What nodes that keep the shards of the current round and the next read and hold, counted round by round."""

    plan: Plan
    sizes: np.ndarray
    """Bytes of each shard."""
    nodes: list[list[int]]
    """Lanes of each node."""

    def __post_init__(self) -> None:
        self.held: list[set[int]] = [set() for _ in self.nodes]
        self.reads = self.most_bytes = 0

    def add(self, state: PlanState) -> None:
        """Count the round of `state`."""
        for node, lanes in enumerate(self.nodes):
            needed = set(self.plan.shards_of(state, lanes))
            self.reads += len(needed - self.held[node])
            self.most_bytes = max(self.most_bytes, int(self.sizes[list(needed | self.held[node])].sum()))
            self.held[node] = needed

    def describe(self) -> dict[str, Any]:
        return {"nodes": len(self.nodes), "gets": self.reads, "cache_gb": round(self.most_bytes / 1e9, 3)}


def lanes_of_nodes(plan: Plan, world_size: int, ranks_per_node: int) -> list[list[int]]:
    """The lanes that each node's ranks read from."""
    ranks = [range(first, min(first + ranks_per_node, world_size)) for first in range(0, world_size, ranks_per_node)]
    return [sorted({lane for rank in node for lane in plan.lanes_of(rank, world_size)}) for node in ranks]
