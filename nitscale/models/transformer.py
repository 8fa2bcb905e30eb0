"""The packed diffusion transformer: NiT (arXiv 2506.03131), FiTv2 (arXiv 2410.13925) and FiT (arXiv 2402.12376).

Tokens (N, c·p·p) of a pack, a time and a class for each image, and the pack's layout come in; the velocity of each
token goes out. Patch embedding → blocks of [adaptive layer norm → attention within each image, axial RoPE → gate →
adaptive layer norm → MLP → gate] → final layer. Which published model it is, is said by `ModelConfig` alone; the
presets are in presets.py, and published weights are read and written by reference.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from nitscale.errors import UserError
from nitscale.layout import PackLayout
from nitscale.models.attention import BACKENDS, attend, choose_backend, group_by_length
from nitscale.models.rope import EXTRAPOLATIONS, MAGNITUDES, ORDERS, apply_rope, rope_tables
from nitscale.models.segments import gated_add, modulate
from nitscale.randomness import torch_generator
from nitscale.slices import shard_of_parameter

FREQUENCIES = 256
"""Sinusoids of the time embedding."""

CHOICES = {
    "mlp": ("gelu", "swiglu"),
    "adaln": ("full", "lora", "lora+global", "swiglu"),
    "norm": ("none", "plain", "weight", "rms"),
    "qk_norm": ("none", "plain", "weight", "affine", "rms"),
    "prediction": ("velocity", "noise"),
    "time_direction": ("data_to_noise", "noise_to_data"),
    "absolute_positions": ("none", "fractional"),
    "rope_order": ORDERS,
    "rope_extrapolation": EXTRAPOLATIONS,
    "rope_magnitude": MAGNITUDES,
    "attention_backend": BACKENDS,
    "published_as": ("nit", "fit"),
}


@dataclass(frozen=True)
class ModelConfig:
    """Everything that makes one transformer differ from another."""

    patch_size: int = 1
    """Latent pixels a side of one token."""
    in_channels: int = 32
    """Channels of the latent."""
    depth: int = 12
    """Number of blocks."""
    width: int = 384
    """Features of a token, D."""
    heads: int = 6
    """Attention heads; width / heads must be a multiple of 4."""
    num_classes: int = 1000
    """Classes 0 … num_classes - 1; label num_classes is the null class."""
    null_class: bool = True
    """Whether the label table has a row for the null class; without it there is no class dropout and no guidance."""
    class_dropout: float = 0.1
    """Share of labels that training replaces by the null class. The model itself never drops any."""
    mlp: str = "gelu"
    """gelu: two linears around tanh-GELU; swiglu: silu(gate) · up, then down."""
    mlp_width: int | None = None
    """Hidden features of the MLP; 4 · width if not given."""
    mlp_bias: bool = True
    """Whether the linears of the MLP have a bias."""
    adaln: str = "full"
    """Modulation of each block. full: a (D, 6 D) linear; lora: two linears through `adaln_rank` features; lora+global:
    the same plus one (D, 6 D) linear shared by all blocks (FiTv2); swiglu: a SwiGLU of 3/4 D (an option of FiT)."""
    adaln_rank: int = 0
    """Hidden features of adaln lora."""
    adaln_bias: bool = True
    """Whether the linears of the modulation have a bias."""
    norm: str = "plain"
    """Norm before attention, MLP and final layer. plain: layer norm without parameters; weight: with a scale; rms;
    none (an option of FiT)."""
    qk_norm: str = "affine"
    """Norm of queries and keys in each head. plain: layer norm without parameters (FiTv2); affine: with scale and shift
    (NiT); weight: with a scale; rms; none (FiT)."""
    qk_norm_eps: float = 1e-5
    """Epsilon of qk_norm: 1e-5 in NiT, 1e-6 in FiTv2."""
    qkv_bias: bool = True
    """Whether the linear for queries, keys and values has a bias."""
    prediction: str = "velocity"
    """What the output is: the velocity of a flow, or the noise of the DDPM objective (FiT v1)."""
    learned_variance: bool = False
    """Whether the output has as many channels again for the variance of the DDPM objective."""
    time_direction: str = "data_to_noise"
    """What the weights were trained with. Times given and velocities returned always run 0 = data → 1 = noise; weights
    of the other direction (published FiTv2) see 1 - t, and their velocity changes its sign."""
    time_shift: float = 1.0
    """s of t → s t / (1 + (s - 1) t), applied to the time that the weights see (FiT's `time_shifting`)."""
    time_scale: float = 1.0
    """Factor on the time that the weights see: 1000 for the DDPM objective, whose weights see steps 0 to 999."""
    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_order: str = "row_major"
    """Coordinates of tokens. reference: the published NiT code's, which scramble images that are not square; for its
    weights only (docs/fidelity.md)."""
    rope_values: bool = False
    """Whether values are rotated too (FiT's `add_rel_pe_to_v`)."""
    rope_extrapolation: str = "none"
    """none, linear, ntk, ntk-by-parts or yarn: rescaling of the frequencies of images beyond `rope_train_grid`."""
    rope_decoupled: bool = True
    """Whether rows and columns are rescaled each by its own side; otherwise both by the longer one."""
    rope_train_grid: int | None = None
    """Tokens a side at training."""
    rope_magnitude: str = "none"
    """none, mscale, proportion1, proportion2 or attention_scale: factor on the logits of larger images."""
    rope_test_grid: tuple[int, int] | None = None
    """Grid (rows, columns) that sets the rescaling of all images; by default each image's own."""
    absolute_positions: str = "none"
    """What the patch embedding adds beside RoPE. none: nothing (NiT, FiTv2); fractional: where the token's cell lies in
    its image, as a share of the sides (NaViT, arXiv 2307.06304 §2.1), with which small models find layouts sooner."""
    feature_block: int | None = None
    """Features for REPA are taken after this many blocks."""
    projector_width: int | None = None
    """Hidden features of a REPA projector that is part of the model, as in the published NiT checkpoints. Without a
    feature_block it is carried along unused."""
    feature_width: int | None = None
    """Output features of that projector."""
    attention_backend: str = "auto"
    """auto, sdpa_loop, varlen or flash_attn."""
    published_as: str = "nit"
    """nit or fit: whose parameter names `save_reference` writes."""

    def __post_init__(self) -> None:
        for field, valid in CHOICES.items():
            if getattr(self, field) not in valid:
                raise UserError(f"model: {field}={getattr(self, field)!r} is unknown; choose one of {', '.join(valid)}")
        if self.width % self.heads or self.head_dim % 4:
            raise UserError(
                f"model: width={self.width} over heads={self.heads} must give heads of a multiple of 4 features"
            )
        if self.adaln.startswith("lora") and self.adaln_rank < 1:
            raise UserError(f"model: adaln={self.adaln!r} needs adaln_rank, the features between its two linears")
        if self.class_dropout > 0 and not self.null_class:
            raise UserError(f"model: class_dropout={self.class_dropout} needs null_class=true")
        if self.feature_block is not None and not 1 <= self.feature_block <= self.depth:
            raise UserError(f"model: feature_block={self.feature_block} is not one of the blocks 1 to {self.depth}")
        if (self.projector_width is None) != (self.feature_width is None):
            raise UserError("model: projector_width and feature_width are given together or not at all")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def token_features(self) -> int:
        """F: features of one token, c·p·p."""
        return self.in_channels * self.patch_size**2

    @property
    def output_features(self) -> int:
        return self.token_features * (2 if self.learned_variance else 1)

    @property
    def hidden_width(self) -> int:
        return 4 * self.width if self.mlp_width is None else self.mlp_width


class PackedTransformer(nn.Module):
    """The model of a `ModelConfig`. Its weights are set from `seed`, see `initialize`; None leaves them unset."""

    def __init__(self, config: ModelConfig, seed: int | None = 0) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.patch_embedding = Linear(config.token_features, width)
        self.position_embedding = FractionalPositions(width) if config.absolute_positions == "fractional" else None
        self.time_embedding = TimeEmbedding(width)
        self.label_embedding = Embedding(config.num_classes + config.null_class, width)
        self.global_adaln = Linear(width, 6 * width, config.adaln_bias) if config.adaln == "lora+global" else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.projector: Projector | None = None
        if config.projector_width is not None and config.feature_width is not None:
            self.projector = Projector(width, config.projector_width, config.feature_width)
        self.block_calls: list[Callable[..., Tensor]] = list(self.blocks)
        """What is called for each block: the block, or something around it that recomputes or compiles it."""
        self.sequence: SequenceSplit | None = None
        """How tokens are spread over ranks between the linears of the blocks; None: every rank has all."""
        if seed is not None and not self.patch_embedding.weight.is_meta:
            self.initialize(seed)

    def forward(
        self, tokens: Tensor, t: Tensor, labels: Tensor, layout: PackLayout, *, return_features: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The velocity noise - data of each token, (N, F); float32, or float64 where the weights are.

        `tokens` (N, F) in the order (c p1 p2), at time `t` (n,), 0 = data, 1 = noise; `labels` (n,), with num_classes
        for the null class. With `return_features`, also the features after `feature_block` blocks: (N, D), or the
        projector's (N, feature_width) if the model has one. Models of `prediction` noise return the noise, and with
        `learned_variance` as many features for the variance after it: (N, 2 F).

        ValueError where a shape does not fit the layout; UserError for features of a model without `feature_block`.
        """
        config = self.config
        for name, value, shape in (
            ("tokens", tokens, (layout.num_tokens, config.token_features)),
            ("t", t, (layout.num_segments,)),
            ("labels", labels, (layout.num_segments,)),
        ):
            if value.shape != shape:
                raise ValueError(f"model: {name} is {tuple(value.shape)}, its layout needs {shape}")
        weight = self.patch_embedding.weight
        x = self.patch_embedding(tokens.to(weight.dtype))
        if self.position_embedding is not None:
            x = x + self.position_embedding(layout)
        condition = self.time_embedding(self._reference_time(t)) + self.label_embedding(labels)

        # Equal lengths side by side make the loop of attention calls short; other backends take any order.
        order = None
        if choose_backend(x, config.attention_backend) == "sdpa_loop":
            order = group_by_length(layout)
        if order is not None:
            given, layout = layout, reorder(layout, order)
            x = x.index_select(0, token_order(given, order))
            condition = condition[torch.tensor(order, device=condition.device)]

        cos, sin = rope_tables(
            layout,
            config.head_dim,
            theta=config.rope_theta,
            order=config.rope_order,
            extrapolation=config.rope_extrapolation,
            decoupled=config.rope_decoupled,
            train_grid=config.rope_train_grid,
            magnitude=config.rope_magnitude,
            test_grid=config.rope_test_grid,
        )
        activated = F.silu(condition)
        shared = None if self.global_adaln is None else self.global_adaln(activated)
        features = None
        tokens_here = layout
        if self.sequence is not None:
            x, tokens_here = self.sequence.split(x, layout)
        for index, call in enumerate(self.block_calls):
            x = call(x, condition, activated, shared, cos, sin, layout, tokens_here)
            if return_features and index + 1 == config.feature_block:
                whole = x if self.sequence is None else self.sequence.join(x, layout)
                features = whole if self.projector is None else self.projector(whole)
        if self.sequence is not None:
            x = self.sequence.join(x, layout)
        output = self.final_layer(x, condition, activated, layout)

        if order is not None:
            back = torch.argsort(token_order(given, order))
            output = output.index_select(0, back)
            features = None if features is None else features.index_select(0, back)
        if config.time_direction == "noise_to_data":
            output = -output
        output = output if output.dtype == torch.float64 else output.float()
        if not return_features:
            return output
        if features is None:
            raise UserError("model: features were asked for, but feature_block is not set")
        return output, features

    def _reference_time(self, t: Tensor) -> Tensor:
        """The time that the weights were trained to see."""
        config = self.config
        if config.time_direction == "noise_to_data":
            t = 1 - t
        if config.time_shift != 1.0:
            t = config.time_shift * t / (1 + (config.time_shift - 1) * t)
        if config.time_direction == "noise_to_data":
            # A solver may look beyond the end of its interval; the published FiT code stops the clock at data.
            t = t.clamp(max=1.0)
        return t * config.time_scale

    @torch.no_grad()
    def initialize(self, seed: int, group: ProcessGroup | None = None) -> None:
        """Set every weight as the published code does, as a pure function of the seed and the weight's name. With
        tensor parallelism over `group`, each rank gets its part of the same weights.

        Linears: Xavier uniform, bias 0; label table and time embedding: N(0, 0.02²); the last linear of every
        modulation and of the output: 0, so that each block begins as the identity.
        """
        for name, parameter in self.named_parameters():
            generator = torch_generator(seed, "weights", name, device=parameter.device)
            shard = None if group is None else shard_of_parameter(parameter, group.rank(), group.size())
            whole = parameter if shard is None else parameter.new_empty(shard.whole_shape(parameter.shape))
            is_zero = "adaln.out." in name or name.startswith(("global_adaln.", "final_layer.out."))
            if "_norm." in name or ".norm" in name:
                nn.init.constant_(whole, 1.0 if name.endswith(".weight") else 0.0)
            elif whole.ndim < 2 or is_zero:
                nn.init.zeros_(whole)
            elif name.startswith(("label_embedding.", "time_embedding.")):
                nn.init.normal_(whole, std=0.02, generator=generator)
            else:
                nn.init.xavier_uniform_(whole, generator=generator)
            if shard is not None:
                parameter.copy_(shard.of(whole))


class SequenceSplit(Protocol):
    """Sequence parallelism, see `nitscale.models.parallel`."""

    def split(self, x: Tensor, layout: PackLayout) -> tuple[Tensor, PackLayout]:
        """(N, D) → this rank's part of the tokens, and their layout, in which images may have no tokens."""

    def join(self, x: Tensor, layout: PackLayout) -> Tensor:
        """The inverse: (N, D) of the whole pack."""


class Block(nn.Module):
    """Attention and MLP, each normalised and modulated before and gated after by the image's condition."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm1 = make_norm(config.norm, config.width, 1e-6)
        self.norm2 = make_norm(config.norm, config.width, 1e-6)
        self.attention = Attention(config)
        self.mlp = SwiGLU.of(config) if config.mlp == "swiglu" else GeluMLP(config)
        self.adaln = AdaLN(config, 6, 3 * (config.width // 4))

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        activated: Tensor,
        shared: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        layout: PackLayout,
        tokens_here: PackLayout,
    ) -> Tensor:
        """`layout` is the pack's, `tokens_here` that of the tokens in x: under sequence parallelism a part of them."""
        modulation = self.adaln(condition, activated)
        if shared is not None:
            modulation = modulation + shared
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        branch = self.attention(modulate(self.norm1(x), shift1, scale1, tokens_here), cos, sin, layout)
        x = gated_add(x, branch, gate1, tokens_here)
        branch = self.mlp(modulate(self.norm2(x), shift2, scale2, tokens_here))
        return gated_add(x, branch, gate2, tokens_here)


class Attention(nn.Module):
    """Attention within each image. The rows of `qkv` are ordered (heads, 3, head_dim), so that a contiguous slice of
    them holds whole heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.rotates_values = config.rope_values
        self.backend = config.attention_backend
        self.qkv = Linear(config.width, 3 * config.width, config.qkv_bias)
        self.q_norm = make_norm(config.qk_norm, config.head_dim, config.qk_norm_eps)
        self.k_norm = make_norm(config.qk_norm, config.head_dim, config.qk_norm_eps)
        self.out = Linear(config.width, config.width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: PackLayout) -> Tensor:
        # -1 and not the number of heads: a tensor-parallel rank holds some of them.
        # [:N]: sequence parallelism rounds the number of tokens up to a multiple of its ranks.
        q, k, v = self.qkv(x)[: layout.num_tokens].unflatten(-1, (-1, 3, self.head_dim)).unbind(2)
        q = apply_rope(self.q_norm(q), cos, sin).to(v.dtype)
        k = apply_rope(self.k_norm(k), cos, sin).to(v.dtype)
        if self.rotates_values:
            v = apply_rope(v, cos, sin).to(v.dtype)
        return self.out(attend(q, k, v, layout, backend=self.backend).flatten(1))


class GeluMLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = Linear(config.width, config.hidden_width, config.mlp_bias)
        self.out = Linear(config.hidden_width, config.width, config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.gelu(self.up(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """Gate and up are two linears and not one, so that each is sharded by contiguous rows."""

    def __init__(self, width: int, hidden: int, out: int, bias: bool) -> None:
        super().__init__()
        self.gate = Linear(width, hidden, bias)
        self.up = Linear(width, hidden, bias)
        self.out = Linear(hidden, out, bias)

    @classmethod
    def of(cls, config: ModelConfig) -> "SwiGLU":
        return cls(config.width, config.hidden_width, config.width, config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.silu(self.gate(x)) * self.up(x))


class AdaLN(nn.Module):
    """An image's condition (n, D) → its modulation (n, parts · D)."""

    def __init__(self, config: ModelConfig, parts: int, swiglu_width: int) -> None:
        super().__init__()
        width, bias = config.width, config.adaln_bias
        self.down: Linear | None = None
        self.gate: Linear | None = None
        hidden = width
        if config.adaln.startswith("lora") and parts == 6:
            hidden = config.adaln_rank
            self.down = Linear(width, hidden, bias)
        elif config.adaln == "swiglu":
            hidden = swiglu_width
            self.gate, self.down = Linear(width, hidden, bias), Linear(width, hidden, bias)
        self.out = Linear(hidden, parts * width, bias)

    def forward(self, condition: Tensor, activated: Tensor) -> Tensor:
        if self.down is None:
            return self.out(activated)
        if self.gate is None:
            return self.out(self.down(activated))
        return self.out(F.silu(self.gate(condition)) * self.down(condition))


class FinalLayer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = make_norm(config.norm, config.width, 1e-6)
        self.adaln = AdaLN(config, 2, config.width // 2)
        self.out = Linear(config.width, config.output_features)

    def forward(self, x: Tensor, condition: Tensor, activated: Tensor, layout: PackLayout) -> Tensor:
        shift, scale = self.adaln(condition, activated).chunk(2, dim=-1)
        return self.out(modulate(self.norm(x), shift, scale, layout))


class TimeEmbedding(nn.Module):
    """Times (n,) → (n, D): sinusoids in float32, then an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = Linear(FREQUENCIES, width)
        self.out = Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        half = FREQUENCIES // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
        angles = t[:, None].float() * frequencies
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.out(F.silu(self.up(sinusoids.to(self.up.weight.dtype))))


class FractionalPositions(nn.Module):
    """A token's cell in its image → (N, D): sinusoids of its centre and of its extent, both as shares of the sides."""

    OCTAVES = 4

    def __init__(self, width: int) -> None:
        super().__init__()
        self.out = Linear(8 * self.OCTAVES, width)

    def forward(self, layout: PackLayout) -> Tensor:
        extent = 1 / layout.grids[layout.segment_ids].float()
        cell = torch.cat([(layout.positions + 0.5) * extent, extent], dim=-1)
        angles = math.pi * cell[:, :, None] * 2.0 ** torch.arange(self.OCTAVES, device=cell.device)
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=-1).flatten(1)
        return self.out(sinusoids.to(self.out.weight.dtype))


class Projector(nn.Module):
    """REPA's head: the features of a block → the features of a vision encoder (arXiv 2410.06940)."""

    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1, self.fc2, self.out = Linear(width, hidden), Linear(hidden, hidden), Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.silu(self.fc2(F.silu(self.fc1(x)))))


class Linear(nn.Linear):
    """A linear whose weights are left for `PackedTransformer.initialize`: the global generator is never touched."""

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """The same for a table."""

    def reset_parameters(self) -> None:
        pass


def make_norm(kind: str, width: int, eps: float) -> nn.Module:
    if kind == "none":
        return nn.Identity()
    if kind == "rms":
        return nn.RMSNorm(width, eps=eps)
    return nn.LayerNorm(width, eps=eps, elementwise_affine=kind != "plain", bias=kind == "affine")


def reorder(layout: PackLayout, order: list[int]) -> PackLayout:
    """The layout of the same segments in another order: segment i of the result is segment order[i] of `layout`."""
    lengths = tuple(layout.lengths[segment] for segment in order)
    tokens = token_order(layout, order)
    segments = torch.tensor(order, device=tokens.device)
    cu_seqlens = F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))
    return replace(
        layout,
        cu_seqlens=cu_seqlens.to(tokens.device),
        segment_ids=torch.argsort(segments)[layout.segment_ids[tokens]],
        positions=layout.positions[tokens],
        grids=layout.grids[segments],
        lengths=lengths,
    )


def token_order(layout: PackLayout, order: list[int]) -> Tensor:
    """(N,) int64: the tokens of `layout`, segment after segment in the given order."""
    starts = [0]
    for length in layout.lengths:
        starts.append(starts[-1] + length)
    parts = [torch.arange(starts[segment], starts[segment + 1]) for segment in order]
    return torch.cat(parts).to(layout.segment_ids.device)
