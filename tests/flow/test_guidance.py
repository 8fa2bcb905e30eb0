"""Guidance: what is evaluated, for whom, and when."""

import pytest
import torch
from torch import Tensor

from nitscale.errors import UserError
from nitscale.flow.guidance import Guidance, GuidedVelocity
from nitscale.layout import PackLayout

LAYOUT = PackLayout.from_grids([(2, 2), (1, 3), (1, 1)])
LABELS = torch.tensor([1, 2, 3])
NULL = 9


class Recorder:
    """A model whose velocity tells the label and the place of a token; it notes what it was asked."""

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor
        self.calls: list[tuple[list[float], list[int], list[list[int]]]] = []

    def __call__(self, tokens: Tensor, t: Tensor, labels: Tensor, layout: PackLayout) -> Tensor:
        assert len(tokens) == layout.num_tokens
        self.calls.append((t.tolist(), labels.tolist(), layout.grids.tolist()))
        per_image = self.factor * (labels + 10 * t)
        return tokens + per_image[layout.segment_ids][:, None]


def at(t: float) -> Tensor:
    return torch.full((3,), t, dtype=torch.float64)


X = torch.arange(64, dtype=torch.float64).reshape(8, 8)


def test_without_guidance_the_model_is_asked_once_for_each_image() -> None:
    model = Recorder()
    velocity = GuidedVelocity(model, LABELS, LAYOUT, Guidance(1.0), null_label=NULL)
    assert torch.equal(velocity(X, at(0.5)), model(X, at(0.5), LABELS, LAYOUT))
    assert model.calls[0][1] == [1, 2, 3]


def test_both_halves_are_evaluated_in_one_pack() -> None:
    model = Recorder()
    velocity = GuidedVelocity(model, LABELS, LAYOUT, Guidance(3.0), null_label=NULL)(X, at(0.5))
    assert len(model.calls) == 1
    assert model.calls[0][1] == [1, 2, 3, NULL, NULL, NULL]
    plain = Recorder()(X, at(0.5), LABELS, LAYOUT)
    null = Recorder()(X, at(0.5), torch.full((3,), NULL), LAYOUT)
    assert torch.allclose(velocity, null + 3.0 * (plain - null))


def test_outside_the_interval_there_is_no_second_half() -> None:
    model = Recorder()
    velocity = GuidedVelocity(model, LABELS, LAYOUT, Guidance(3.0, (0.2, 0.7)), null_label=NULL)
    for t in (0.1999, 0.2, 0.7, 0.7001):
        velocity(X, at(t))
    assert [len(labels) for _, labels, _ in model.calls] == [3, 6, 6, 3]


def test_every_image_has_its_own_guidance() -> None:
    model = Recorder()
    guidance = [Guidance(2.0, (0.0, 0.4)), Guidance(1.0), Guidance(4.0, (0.3, 1.0))]
    velocity = GuidedVelocity(model, LABELS, LAYOUT, guidance, null_label=NULL)
    guided = velocity(X, at(0.35))
    assert model.calls[0][1:] == ([1, 2, 3, NULL, NULL], [[2, 2], [1, 3], [1, 1], [2, 2], [1, 1]])
    difference = guided - Recorder()(X, at(0.35), LABELS, LAYOUT)
    expected = torch.tensor([(2 - 1) * (1 - NULL)] * 4 + [0] * 3 + [(4 - 1) * (3 - NULL)])
    assert torch.allclose(difference, expected[:, None].expand(8, 8).double())
    velocity(X, at(0.5))
    assert model.calls[1][1] == [1, 2, 3, NULL]


def test_channels_that_are_not_guided_keep_the_conditional_velocity() -> None:
    velocity = GuidedVelocity(Recorder(), LABELS, LAYOUT, Guidance(3.0, channels=1), null_label=NULL, patch_size=2)
    guided = velocity(X, at(0.5))
    plain = Recorder()(X, at(0.5), LABELS, LAYOUT)
    assert torch.equal(guided[:, 4:], plain[:, 4:])
    assert not torch.isclose(guided[:, :4], plain[:, :4]).any()


def test_the_interval_is_judged_where_the_step_began_or_at_each_evaluation() -> None:
    for interval_at, expected in (("step", [6, 3]), ("evaluation", [3, 6])):
        model = Recorder()
        guidance = Guidance(2.0, (0.5, 1.0), interval_at=interval_at)
        velocity = GuidedVelocity(model, LABELS, LAYOUT, guidance, null_label=NULL)
        velocity(X, at(0.4), step_t=at(0.6))
        velocity(X, at(0.6), step_t=at(0.4))
        assert [len(labels) for _, labels, _ in model.calls] == expected


def test_a_weak_model_takes_the_place_of_the_null_class() -> None:
    for weak_labels, asked in (("same", [1, 2, 3]), ("null", [NULL] * 3)):
        model, weak = Recorder(), Recorder(0.5)
        guidance = Guidance(2.0, weak_labels=weak_labels)
        velocity = GuidedVelocity(model, LABELS, LAYOUT, guidance, null_label=NULL, weak_model=weak)
        guided = velocity(X, at(0.5))
        assert model.calls[0][1] == [1, 2, 3] and weak.calls[0][1] == asked
        strong = Recorder()(X, at(0.5), LABELS, LAYOUT)
        reference = Recorder(0.5)(X, at(0.5), torch.tensor(asked), LAYOUT)
        assert torch.allclose(guided, reference + 2 * (strong - reference))


def test_the_power_cosine_schedule_grows_from_data_to_noise() -> None:
    guidance = Guidance(4.0, power=1.5)
    scales = [guidance.scale_at(t) for t in (0.0, 0.2, 0.6, 1.0, 1.2)]
    assert scales == sorted(scales)
    assert scales[0] == 1.0 and scales[3] == scales[4] == 4.0


def test_wrong_options_are_errors() -> None:
    with pytest.raises(UserError, match="interval_at='never'"):
        Guidance(interval_at="never")
    with pytest.raises(UserError, match="2 given for 3 images"):
        GuidedVelocity(Recorder(), LABELS, LAYOUT, [Guidance()] * 2, null_label=NULL)
