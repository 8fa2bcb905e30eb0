"""What a pack is trained on: noise and time are drawn, the model's velocity is compared, and the losses are weighed.

All draws are keyed by (seed, step, pack), so that data ranks draw different noise and tensor ranks the same.
"""

from typing import Any

import torch
from torch import Tensor

from nitscale.flow.losses import reduce_tokens, squared_error
from nitscale.flow.paths import interpolate
from nitscale.flow.timesteps import sample_timesteps
from nitscale.layout import PackedBatch
from nitscale.randomness import bernoulli, torch_generator
from nitscale.train.config import RunConfig
from nitscale.train.engine import Engine
from nitscale.train.metrics import StepStatistics
from nitscale.train.repa import Repa


def pack_loss(
    batch: PackedBatch, total: int, config: RunConfig, engine: Engine, repa: Repa, statistics: StepStatistics
) -> Tensor:
    """This pack's share of the step's loss: its errors over the tokens, or images, of the step (`total`). `batch` is on
    the engine's device."""
    layout, device = batch.layout, batch.tokens.device
    key = (batch.step, batch.pack)
    noise = torch.randn(
        batch.tokens.shape, generator=torch_generator(config.seed, "noise", *key, device=device), device=device
    )
    t = sample_timesteps(
        layout.num_segments,
        torch_generator(config.seed, "timestep", *key),
        config.flow.timesteps,
        mean=config.flow.mean,
        std=config.flow.std,
    ).to(device, torch.float32)
    drop = bernoulli(layout.num_segments, config.model.class_dropout, config.seed, "label drop", *key)
    labels = torch.where(torch.from_numpy(drop).to(device), config.model.num_classes, batch.labels)
    noisy, velocity = interpolate(batch.tokens.float(), noise, t, layout)
    output: Any = engine.forward(noisy, t, labels, layout, return_features=repa.aligns)
    prediction, projected = output if repa.aligns else (output, None)
    error = squared_error(prediction, velocity)
    extra, shares = repa.losses(batch, prediction, velocity, projected, total, config.flow.weighting)
    statistics.add(error, batch.weights, t, layout, shares)
    return reduce_tokens(error, layout, batch.weights, total, config.flow.weighting) + extra
