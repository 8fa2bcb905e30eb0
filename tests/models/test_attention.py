"""Attention within segments against the plain formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nitscale.errors import UserError
from nitscale.layout import PackLayout
from nitscale.models.attention import attend, choose_backend, equal_length_runs, group_by_length
from nitscale.models.segments import gated_add, modulate, segment_sum

lengths = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def pack_of(sizes: list[int]) -> PackLayout:
    return PackLayout.from_grids([(1, size) for size in sizes])


@settings(max_examples=40, deadline=None)
@given(lengths, st.sampled_from([None, 0.3]))
def test_tokens_attend_to_their_own_segment_alone(sizes: list[int], scale: float | None) -> None:
    layout = pack_of(sizes)
    q, k, v = torch.randn(3, layout.num_tokens, 2, 4, generator=torch.Generator().manual_seed(0)).double()
    logits = torch.einsum("ihd,jhd->hij", q, k) * (0.5 if scale is None else scale)
    same = layout.segment_ids[:, None] == layout.segment_ids
    expected = torch.einsum("hij,jhd->ihd", logits.masked_fill(~same, -torch.inf).softmax(-1), v)
    assert torch.allclose(attend(q, k, v, layout, scale), expected)


@settings(max_examples=40, deadline=None)
@given(lengths)
def test_runs_cover_the_pack_in_order(sizes: list[int]) -> None:
    layout = pack_of(sizes)
    covered = [length for _, count, length in equal_length_runs(layout) for _ in range(count)]
    assert covered == sizes
    firsts = [first for first, _, _ in equal_length_runs(layout)]
    assert set(firsts) <= set(layout.cu_seqlens.tolist())
    order = group_by_length(layout)
    grouped = sizes if order is None else [sizes[i] for i in order]
    assert len(equal_length_runs(pack_of(grouped))) == len(set(sizes))


def test_a_backend_that_is_not_there_is_an_error() -> None:
    with pytest.raises(UserError, match="'flash'"):
        choose_backend(torch.zeros(1), "flash")
    assert choose_backend(torch.zeros(1)) == "sdpa_loop"


def test_values_of_images_meet_their_tokens_forward_and_backward() -> None:
    layout = pack_of([3, 1, 3, 3, 2])
    generator = torch.Generator().manual_seed(0)
    x, branch = torch.randn(2, 12, 4, generator=generator, dtype=torch.float64)
    shift, scale, gate = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (x, branch, shift, scale, gate)]
    ids = layout.segment_ids
    ours = gated_add(modulate(x, shift, scale, layout), branch, gate, layout)
    plain = x * (1 + scale[ids]) + shift[ids] + gate[ids] * branch
    assert torch.allclose(ours, plain)
    weights = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    for mine, theirs in zip(
        torch.autograd.grad((ours * weights).sum(), inputs),
        torch.autograd.grad((plain * weights).sum(), inputs),
        strict=True,
    ):
        assert torch.allclose(mine, theirs)


def test_segment_sums_are_sums_over_segments() -> None:
    layout = pack_of([2, 5, 5, 1])
    values = torch.arange(26.0).reshape(13, 2)
    expected = torch.stack([part.sum(0) for part in values.split([2, 5, 5, 1])])
    assert torch.equal(segment_sum(values, layout), expected)
