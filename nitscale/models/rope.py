"""Axial two-dimensional rotary position embedding (RoPE) and its extrapolation to unseen image sizes.

A `PackLayout` comes in; the cosines and sines of every token's rotation angles go out, once per forward. The first half
of a head's rotary pairs turns with the row, the second with the column (NiT arXiv 2506.03131 §3.2; FiT arXiv 2402.12376
§3.2). Extrapolation (FiT §3.3, FiTv2 arXiv 2410.13925 §3.4) is per image: each image of a pack has its own frequencies.

Angles are computed in float32 in the order of operations of the published code, so that its tables are met to the bit.
"""

import math

import torch
from torch import Tensor

from nitscale.errors import UserError
from nitscale.layout import PackLayout

ORDERS = ("row_major", "reference")
EXTRAPOLATIONS = ("none", "linear", "ntk", "ntk-by-parts", "yarn")
MAGNITUDES = ("none", "mscale", "proportion1", "proportion2", "attention_scale")


def rope_tables(
    layout: PackLayout,
    head_dim: int,
    *,
    theta: float = 10000.0,
    order: str = "row_major",
    extrapolation: str = "none",
    decoupled: bool = True,
    train_grid: int | None = None,
    magnitude: str = "none",
    test_grid: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each token's angles, two (N, head_dim / 2) float32 tensors: one column for each rotary pair,
    the row's pairs before the column's, times the magnitude correction.

    - `order`: which coordinates a token has, see `token_coordinates`.
    - `extrapolation`: how frequencies are rescaled for an image larger than `train_grid` (tokens a side), see
      `axis_frequencies`. `decoupled` gives each side its own scale (VisionNTK, VisionYaRN); otherwise both take the
      longer side's.
    - `magnitude`: factor on cosine and sine, see `magnitude_factor`.
    - `test_grid`: (rows, columns) that the scales are computed from, for all images alike; by default each image's own.
    """
    if head_dim % 4:
        raise UserError(
            f"rope: head_dim={head_dim} is not a multiple of 4; two axes of rotary pairs need width / heads to be one"
        )
    _check("extrapolation", extrapolation, EXTRAPOLATIONS)
    _check("magnitude", magnitude, MAGNITUDES)
    if (extrapolation != "none" or magnitude != "none") and train_grid is None:
        raise UserError(
            f"rope: extrapolation={extrapolation!r} with magnitude={magnitude!r} needs train_grid, "
            "the tokens a side that the model was trained with"
        )
    coordinates = token_coordinates(layout, order)
    grids = layout.grids if test_grid is None else torch.tensor([test_grid], device=layout.grids.device)
    if extrapolation == "none":
        frequencies = base_frequencies(head_dim // 2, theta, coordinates.device)
        angles = (coordinates[..., None].float() * frequencies).flatten(1)
    else:
        sides = grids if decoupled else grids.amax(dim=1, keepdim=True).expand(-1, 2)
        frequencies = axis_frequencies(sides, head_dim // 2, theta, extrapolation, train_grid or 1)
        per_token = frequencies[layout.segment_ids] if test_grid is None else frequencies
        angles = (coordinates[..., None].float() * per_token).flatten(1)
    cos, sin = angles.cos(), angles.sin()
    if magnitude != "none":
        factor = magnitude_factor(grids, train_grid or 1, magnitude)
        factor = (factor[layout.segment_ids] if test_grid is None else factor)[:, None]
        cos, sin = cos * factor, sin * factor
    return cos, sin


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the interleaved pairs (x₀, x₁), (x₂, x₃), … of (N, heads, head_dim) by the angles of (N, head_dim / 2)."""
    pairs = x.unflatten(-1, (-1, 2))
    cos, sin = cos[:, None], sin[:, None]
    if x.device.type == "cpu" and x.dtype == cos.dtype:  # the same products and sums, in a sixth of the time
        return torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin)).flatten(-2)
    even, odd = pairs.unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2)


def token_coordinates(layout: PackLayout, order: str = "row_major") -> Tensor:
    """(N, 2) int64 coordinates that RoPE uses for each token.

    `row_major` is the truth: token k of an h x w image lies at (k div w, k mod w). `reference` is what the published
    NiT code computes and its weights were trained with: (k mod h, k div h), see docs/fidelity.md.
    """
    _check("order", order, ORDERS)
    if order == "row_major":
        return layout.positions
    rows, columns = layout.grids[layout.segment_ids].unbind(1)
    index = layout.positions[:, 0] * columns + layout.positions[:, 1]
    return torch.stack([index % rows, index // rows], dim=1)


def base_frequencies(dim: int, theta: float, device: torch.device | str | None = None) -> Tensor:
    """The unscaled angular frequencies of one axis, (dim / 2,) float32; dim is half a head."""
    return 1.0 / _powers(dim, theta, device)


def axis_frequencies(sides: Tensor, dim: int, theta: float, extrapolation: str, train_grid: int) -> Tensor:
    """Frequencies of each axis of each image, (n, 2, dim / 2) float32, for images of `sides` (n, 2) tokens.

    With s = max(side / train_grid, 1):
    - `linear`: ω / s, position interpolation;
    - `ntk`: the base θ becomes θ · s^(dim / (dim - 2));
    - `ntk-by-parts`: NTK for slow and linear for medium frequencies, and the fastest unchanged (rotations 1.25 to 0.75
      and 16 to 2 over the training grid);
    - `yarn`: unchanged above 32 rotations over the training grid, linear below 1, a ramp between (YaRN, arXiv
      2309.00071).
    """
    scale = torch.clamp_min(sides / train_grid, 1.0)[..., None]
    powers = _powers(dim, theta, sides.device)
    if extrapolation == "linear":
        return 1.0 / (scale * powers)
    if extrapolation == "ntk":
        return _ntk_frequencies(scale, dim, theta)
    kept = 1.0 / powers
    interpolated = 1.0 / (scale * powers)
    if extrapolation == "yarn":
        keep = 1 - _ramp(32, 1, dim, theta, train_grid, sides.device)
        return interpolated * (1 - keep) + kept * keep
    ntk = 1 - _ramp(1.25, 0.75, dim, theta, train_grid, sides.device)
    mixed = interpolated * (1 - ntk) + _ntk_frequencies(scale, dim, theta) * ntk
    keep = 1 - _ramp(16, 2, dim, theta, train_grid, sides.device)
    return mixed * (1 - keep) + kept * keep


def magnitude_factor(grids: Tensor, train_grid: int, magnitude: str) -> Tensor:
    """Factor on cosine and sine for each image of `grids` (n, 2): (n,) float32. Attention logits scale by its square.

    - `mscale`: 0.1 ln s + 1 with s from the longer side (YaRN), also where the frequencies are decoupled;
    - `proportion1`: sqrt(ln 2L / ln L₀), L the longer side, where 2L > L₀, else 1: as the published code has it, which
      doubles L and so corrects at the training size already;
    - `proportion2`: the same of the areas, sqrt(ln 2hw / ln L₀²);
    - `attention_scale`: logits times max(1, sqrt(ln(hw / L₀²))), FiTv2 eq. 15 as it is printed.
    """
    area = (grids[:, 0] * grids[:, 1]).float()
    longer = grids.amax(dim=1).float()
    if magnitude == "mscale":
        scale = torch.clamp_min(longer / train_grid, 1.0)
        return torch.where(scale <= 1.0, 1.0, 0.1 * torch.log(scale) + 1.0)
    if magnitude == "attention_scale":
        growth = torch.clamp_min(area / train_grid**2, 1.0)
        return torch.clamp_min(torch.sqrt(torch.log(growth)), 1.0).sqrt()
    doubled, trained = (2 * longer, train_grid) if magnitude == "proportion1" else (2 * area, train_grid**2)
    log_trained = torch.log(torch.tensor(float(trained), device=grids.device))
    return torch.where(doubled / trained <= 1.0, 1.0, torch.sqrt(torch.log(doubled) / log_trained))


def _powers(dim: int, theta: float, device: torch.device | str | None) -> Tensor:
    return theta ** (torch.arange(0, dim, 2, device=device).float() / dim)


def _ntk_frequencies(scale: Tensor, dim: int, theta: float) -> Tensor:
    if dim == 2:  # the single frequency is θ⁰ for every base; the exponent below would divide by zero
        return torch.ones_like(scale)
    base = theta * scale ** (dim / (dim - 2))
    return 1.0 / torch.pow(base, torch.arange(0, dim, 2, device=scale.device).float() / dim)


def _ramp(most: float, fewest: float, dim: int, theta: float, train_grid: int, device: torch.device | str) -> Tensor:
    """0 for frequencies that turn more than `most` times over the training grid, 1 below `fewest`: (dim / 2,)."""

    def index_of(rotations: float) -> float:
        return dim * math.log(train_grid / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(index_of(most)), 0), min(math.ceil(index_of(fewest)), dim - 1)
    end = high + 0.001 if low == high else float(high)  # a step rather than 0 / 0
    return ((torch.arange(dim // 2, device=device).float() - low) / (end - low)).clamp(0, 1)


def _check(field: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise UserError(f"rope: {field}={value!r} is unknown; choose one of {', '.join(valid)}")
