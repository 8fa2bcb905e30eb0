"""The networks of NiT and FiT written out plainly: image by image, over a state dict under the published names."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nitscale.layout import PackLayout
from nitscale.models.rope import rope_tables

State = dict[str, Tensor]


def plain_output(
    config: dict[str, Any],
    state: State,
    x: Tensor,
    t: Tensor,
    labels: Tensor,
    sizes: list[tuple[int, int]],
    **rope: Any,
) -> tuple[Tensor, Tensor | None]:
    """What the network gives for tokens (N, F), at times of its own direction, and its projector's features, if it has
    one. `rope` are options of `rope_tables`."""
    is_nit = "z_dim" in config
    if config.get("learn_sigma", not is_nit):
        t = 1000 * t  # a step of the DDPM schedule
    else:
        shift = config.get("time_shifting", 1)
        t = (shift * t / (1 + (shift - 1) * t)).clamp(max=1.0)
    conditions = time_embedding(state, t) + state["y_embedder.embedding_table.weight"][labels]
    outputs, features = [], []
    for tokens, size, condition in zip(x.split([h * w for h, w in sizes]), sizes, conditions[:, None], strict=True):
        layout = PackLayout.from_grids([size])
        tables = rope_tables(layout, config["hidden_size"] // config["num_heads"], **rope)
        cos, sin = (table.repeat_interleave(2, dim=1).to(x.dtype) for table in tables)
        y = F.linear(tokens, state["x_embedder.proj.weight"].flatten(1), state["x_embedder.proj.bias"])
        for index in range(config["depth"]):
            y = block(config, state, f"blocks.{index}", y, condition, cos, sin)
            if is_nit and index + 1 == config["encoder_depth"] and "projector.0.weight" in state:
                features.append(projector(state, y))
        shift_, scale = modulation(state, "final_layer.adaLN_modulation", condition).chunk(2, -1)
        normed = norm(state, "final_layer.norm_final", y, config.get("norm_type", "layernorm"))
        outputs.append(linear(state, "final_layer.linear", normed * (1 + scale) + shift_))
    return torch.cat(outputs), torch.cat(features) if features else None


def block(
    config: dict[str, Any], state: State, key: str, x: Tensor, condition: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    values = modulation(state, f"{key}.adaLN_modulation", condition)
    if "global_adaLN_modulation.1.weight" in state:
        values = values + modulation(state, "global_adaLN_modulation", condition)
    shift1, scale1, gate1, shift2, scale2, gate2 = values.chunk(6, -1)
    kind = config.get("norm_type", "layernorm")
    x = x + gate1 * attention(
        config, state, f"{key}.attn", norm(state, f"{key}.norm1", x, kind) * (1 + scale1) + shift1, cos, sin
    )
    y = norm(state, f"{key}.norm2", x, kind) * (1 + scale2) + shift2
    if f"{key}.mlp.fc1_g.weight" in state:
        return x + gate2 * swiglu(state, f"{key}.mlp", y)
    return x + gate2 * linear(state, f"{key}.mlp.fc2", F.gelu(linear(state, f"{key}.mlp.fc1", y), approximate="tanh"))


def attention(config: dict[str, Any], state: State, key: str, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    q, k, v = linear(state, f"{key}.qkv", x).unflatten(-1, (3, config["num_heads"], -1)).permute(1, 2, 0, 3)
    kind = "affine" if config.get("qk_norm") else config.get("q_norm")
    q, k = (norm(state, f"{key}.{name}_norm", each, kind) for name, each in (("q", q), ("k", k)))
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    if config.get("add_rel_pe_to_v"):
        v = rotate(v, cos, sin)
    weights = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1)
    return linear(state, f"{key}.proj", (weights @ v).transpose(0, 1).flatten(1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    quarter_turn = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    return x * cos + quarter_turn * sin


def modulation(state: State, key: str, condition: Tensor) -> Tensor:
    if f"{key}.fc1_g.weight" in state:
        return swiglu(state, key, condition)
    values = linear(state, f"{key}.1", F.silu(condition))
    return linear(state, f"{key}.2", values) if f"{key}.2.weight" in state else values


def norm(state: State, key: str, x: Tensor, kind: str | None) -> Tensor:
    if kind is None or kind in ("", "none"):
        return x
    weight, bias = state.get(f"{key}.weight", torch.ones(x.shape[-1:], dtype=x.dtype)), state.get(f"{key}.bias", 0)
    if kind == "w_rmsnorm":
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    centred = x - x.mean(-1, keepdim=True)
    eps = 1e-5 if kind == "affine" else 1e-6
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def time_embedding(state: State, t: Tensor) -> Tensor:
    angles = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    sinusoids = torch.cat([angles.cos(), angles.sin()], -1).to(state["t_embedder.mlp.0.weight"].dtype)
    return linear(state, "t_embedder.mlp.2", F.silu(linear(state, "t_embedder.mlp.0", sinusoids)))


def projector(state: State, x: Tensor) -> Tensor:
    hidden = F.silu(linear(state, "projector.2", F.silu(linear(state, "projector.0", x))))
    return linear(state, "projector.4", hidden)


def swiglu(state: State, key: str, x: Tensor) -> Tensor:
    return linear(state, f"{key}.fc2", F.silu(linear(state, f"{key}.fc1_g", x)) * linear(state, f"{key}.fc1_x", x))


def linear(state: State, key: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f"{key}.weight"], state.get(f"{key}.bias"))
