"""A training as anyone would write it in PyTorch, in one process and without an engine: what the trainer must equal."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nitscale.data.loader import read_pack
from nitscale.data.plan import Plan
from nitscale.models.transformer import PackedTransformer
from nitscale.randomness import bernoulli, torch_generator
from nitscale.train.config import RunConfig


@dataclass
class PlainRun:
    losses: list[float]
    grad_norms: list[float]
    gradients: dict[str, Tensor]
    """Of the first step, before clipping."""
    weights: dict[str, Tensor]
    ema: dict[str, Tensor]


def train_plainly(config: RunConfig) -> PlainRun:
    """Flow matching on the linear path with AdamW, clipping and one average of the weights."""
    dataset = config.data.open()
    plan = Plan(dataset, config.data.plan(config.seed, 1))
    model = PackedTransformer(config.model)
    model.initialize(config.seed)
    adamw = config.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=adamw.lr, betas=adamw.betas, eps=adamw.eps, weight_decay=adamw.weight_decay
    )
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses, norms, gradients = [], [], {}
    state = plan.start()
    for step in range(config.train.steps):
        packs, state = plan.step(state)
        total = sum(pack.num_tokens for pack in packs)
        losses.append(0.0)
        for pack in packs:
            batch = read_pack(dataset, pack, 1)
            n, tokens = len(batch.labels), batch.tokens.float()
            noise = torch.randn(tokens.shape, generator=torch_generator(0, "noise", step, pack.pack))
            normal = torch.randn(n, generator=torch_generator(0, "timestep", step, pack.pack), dtype=torch.float64)
            t = torch.sigmoid(normal).float()
            drop = torch.from_numpy(bernoulli(n, 0.1, 0, "label drop", step, pack.pack))
            t_of_token = t[batch.layout.segment_ids][:, None]
            x = (1 - t_of_token) * tokens + t_of_token * noise
            predicted = model(x, t, torch.where(drop, config.model.num_classes, batch.labels), batch.layout)
            loss = ((predicted - (noise - tokens)) ** 2).mean(1).sum() / total
            loss.backward()
            losses[-1] += loss.item()
        if step == 0:
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), adamw.clip).item())
        optimizer.step()
        optimizer.zero_grad()
        decay = min(config.ema.decays[0], (1 + step) / (10 + step))
        for name, p in model.named_parameters():
            average[name].lerp_(p.detach(), 1 - decay)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return PlainRun(losses, norms, gradients, weights, average)
