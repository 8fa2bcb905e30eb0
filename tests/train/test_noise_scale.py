"""The gradient noise scale: its truth where it is known, unequal packs, ranks, and what DeepSpeed lets a hook see."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from nitscale.layout import PackLayout
from nitscale.models.transformer import ModelConfig
from nitscale.train import noise_scale
from nitscale.train.engine import EngineConfig, OptimizerConfig, build_engine
from nitscale.train.noise_scale import NoiseScale
from nitscale.train.process import Process, start_process

ALONE = Process(0, 1, torch.device("cpu"))
SIZES = (3, 40, 11, 26)
"""Tokens of the packs of a step."""
WIDTH = 10


def regression(weight: Tensor, seed: int, sizes: tuple[int, ...]) -> list[Tensor]:
    """Every pack's share of a step's loss ½ (w·x - e)², averaged over tokens; x and e are standard normal.

    The gradient of a token is x (x·w - e): its mean is w, and tr Σ = (width + 1) |w|² + width.
    """
    generator = torch.Generator().manual_seed(seed)
    packs = [(torch.randn(n, WIDTH, generator=generator), torch.randn(n, generator=generator)) for n in sizes]
    return [0.5 * (x @ weight - e).square().sum() / sum(sizes) for x, e in packs]


class Regression:
    """A rank with its packs, whose weights have norm 1 and are never moved."""

    def __init__(self, process: Process = ALONE) -> None:
        self.weight = nn.Parameter(torch.full((WIDTH,), WIDTH**-0.5))
        self.noise = NoiseScale([self.weight], process, gradient_scale=process.data_size)
        self.process = process

    def step(self, seed: int, sizes: tuple[int, ...] = SIZES) -> None:
        """The backwards of this rank's packs, each larger by the number of data ranks, as the engine's are."""
        losses = regression(self.weight, seed, sizes)
        for pack in range(self.process.data_rank, len(sizes), self.process.data_size):
            with self.noise.watch(sizes[pack] / sum(sizes)):
                (losses[pack] * self.process.data_size).backward()

    def measure(self, seed: int, sizes: tuple[int, ...] = SIZES) -> float | None:
        self.weight.grad = None
        self.step(seed, sizes)
        assert self.weight.grad is not None
        return self.noise.read(self.weight.grad.norm(), len(sizes), sum(sizes))


def test_the_estimate_converges_to_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise_scale, "KEPT", 0.9999)  # as good as the plain mean over the steps
    rank = Regression()
    for seed in range(1500):
        estimate = rank.measure(seed)
    assert estimate == pytest.approx((WIDTH + 1) + WIDTH, rel=0.05)
    assert rank.noise.noise / rank.noise.signal == estimate


def test_with_equal_packs_it_is_the_papers_estimate() -> None:
    rank, sizes = Regression(), (20, 20, 20)
    measured = rank.measure(0, sizes)
    gradients = [
        torch.autograd.grad(loss, rank.weight)[0] * 3 for loss in regression(rank.weight, 0, sizes)
    ]  # of the mean over a pack
    small, large = sum(g.square().sum() for g in gradients) / 3, (sum(gradients) / 3).square().sum()  # type: ignore[union-attr]
    signal = (60 * large - 20 * small) / (60 - 20)
    noise = (small - large) / (1 / 20 - 1 / 60)
    assert measured == pytest.approx(float(noise / signal), rel=1e-5)


def test_two_ranks_measure_what_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = Regression()
    expected = alone.measure(0)
    ranks = [Regression(replace(ALONE, rank=rank, world_size=2)) for rank in range(2)]
    for rank in ranks:
        rank.step(0)
    total = ranks[0].noise.sum + ranks[1].noise.sum
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.copy_(total))
    assert alone.weight.grad is not None
    for rank in ranks:
        assert rank.noise.read(alone.weight.grad.norm(), len(SIZES), sum(SIZES)) == pytest.approx(expected, rel=1e-5)


def test_tensor_ranks_count_their_shards_each_and_whole_parameters_once() -> None:
    shard, whole = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    shard.tensor_model_parallel = True  # type: ignore[attr-defined]
    for rank, square in ((0, 3 * 4 + 3 * 25), (1, 3 * 4)):
        noise = NoiseScale([shard, whole], Process(rank, 2, torch.device("cpu"), tensor_size=2), gradient_scale=1)
        with noise.watch(0.5):
            (2 * shard + 5 * whole).sum().backward()
        assert noise.sum.item() == pytest.approx(square / 0.5)


def test_gradients_of_bf16_are_squared_in_fp32() -> None:
    weight = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    noise = NoiseScale([weight], ALONE, gradient_scale=1)
    with noise.watch(1.0):
        (weight * 1.5).sum().backward()
    assert noise.sum.item() == pytest.approx(2250, rel=1e-6)


def test_a_backward_that_is_not_watched_is_not_measured() -> None:
    rank = Regression()
    regression(rank.weight, 0, SIZES)[0].backward()
    assert rank.noise.norms == [] and rank.noise.sum == 0


def test_a_step_of_one_pack_has_no_estimate() -> None:
    assert Regression().measure(0, (40,)) is None


def test_a_step_that_is_not_finite_leaves_the_estimate() -> None:
    rank = Regression()
    rank.measure(0)
    before = rank.noise.state()
    rank.step(1)
    rank.noise.read(torch.tensor(float("nan")), len(SIZES), sum(SIZES))
    assert rank.noise.state() == before


def test_a_resumed_estimate_goes_on_as_if_never_stopped() -> None:
    whole, resumed = Regression(), Regression()
    whole.measure(0)
    resumed.noise.load(whole.noise.state())
    assert resumed.measure(1) == whole.measure(1)


def test_a_hook_sees_whole_gradients_under_every_zero_stage() -> None:
    process = start_process()
    model = ModelConfig(in_channels=4, patch_size=1, depth=1, width=16, heads=2, num_classes=4)
    sizes, found = (12, 30, 20), []
    for stage in (0, 1, 2, 3):
        config = EngineConfig(zero_stage=stage)  # type: ignore[arg-type]
        engine = build_engine(model, 0, OptimizerConfig(), config, process, accumulation=len(sizes))
        noise = NoiseScale(engine.module.parameters(), process, gradient_scale=process.data_size)
        generator = torch.Generator().manual_seed(0)
        for size in sizes:
            tokens, target = torch.randn(2, size, 4, generator=generator)
            layout = PackLayout.from_grids([(2, size // 2)])
            velocity = engine.forward(tokens, torch.tensor([0.3]), torch.tensor([1]), layout)
            with noise.watch(size / sum(sizes)):
                engine.backward((velocity - target).square().sum() / sum(sizes))
            engine.step(1e-4)
        noise.read(engine.grad_norm, len(sizes), sum(sizes))
        found.append([noise.noise, noise.signal])
    assert found[0][0] > 0
    for stage in (1, 2, 3):
        assert found[stage] == pytest.approx(found[0], rel=1e-4)
