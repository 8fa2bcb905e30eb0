"""Averages of the weights over training, as arithmetic: how much of an average each step keeps.

An exponential average forgets at one rate; with the ramp of `decay_at` a short run is not dominated by the initial
weights. The power-function average of EDM2 (Karras et al., arXiv 2312.02696, §3.1) spans a fixed share of the run
however long it is: its weights grow with t^γ, and its relative width σ_rel, their standard deviation as a share of the
run, is what one chooses. From stored averages of two widths any other can be made afterwards (§3.2, algorithm 3).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WIDEST = 12**-0.5
"""σ_rel of the plain mean over the run, γ = 0; wider ones would weigh the first steps most."""


@dataclass(frozen=True)
class Profile:
    """How one average weighs the steps: exponentially by `decay`, or by a power of time."""

    name: str
    """In files and on the command line: 0.9999, power-0.05."""
    decay: float = 0.0
    ramp: bool = False
    """Keep no more than (1 + step) / (10 + step)."""
    gamma: float | None = None
    """Exponent of a power-function average."""


def make_profiles(decays: Sequence[float], widths: Sequence[float] = (), ramp: bool = True) -> tuple[Profile, ...]:
    """Exponential averages of these decays, then power-function averages of these relative widths. ValueError for a
    value out of range, or the same one twice."""
    for decay in decays:
        if not 0 <= decay < 1:
            raise ValueError(f"a decay must be in [0, 1), got {decay}")
    profiles = (
        *(Profile(f"{decay:.12g}", decay=decay, ramp=ramp) for decay in decays),
        *(Profile(f"power-{width:.12g}", gamma=gamma_of_width(width)) for width in widths),
    )
    names = [profile.name for profile in profiles]
    if len(set(names)) < len(names):
        raise ValueError(f"each average must be another one, got {', '.join(names)}")
    return profiles


def decay_at(profile: Profile, step: int) -> float:
    """Share of the average that optimizer step `step` (0-based) keeps; the rest is the new weights.

    Of a power-function average: EDM2, eq. 127, (1 - 1/t)ᵞ⁺¹ with t = step + 1; so the first step replaces the initial
    weights.
    """
    if profile.gamma is not None:
        return (step / (step + 1)) ** (profile.gamma + 1)
    return min(profile.decay, (1 + step) / (10 + step)) if profile.ramp else profile.decay


def gamma_of_width(width: float) -> float:
    """Exponent γ of the power-function average of relative width σ_rel: σ_rel² = (γ + 1) / ((γ + 2)² (γ + 3)) solved
    for γ (EDM2, eq. 123 and algorithm 2). ValueError for a width out of range."""
    if not 0 < width < WIDEST:
        raise ValueError(f"the width of a power-function average must be in (0, {WIDEST:.4f}), got {width}")
    inverse = width**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def combine_snapshots(times: Sequence[int], gammas: Sequence[float], time: int, gamma: float) -> np.ndarray:
    """(n,) weights, of sum 1, by which n stored power-function averages add up to the one of exponent `gamma` after
    `time` steps: the least-squares fit of its weights over time (EDM2, algorithm 3).

    `times` and `gammas` of the stored ones: steps done, exponent. ValueError if none is as late as `time`.
    """
    if not times or time > max(times):
        raise ValueError(f"no stored average is as late as step {time:,}; choose an earlier one or train on")
    stored_times, stored_gammas = np.array(times, dtype=np.float64), np.array(gammas, dtype=np.float64)
    products = overlap(stored_times[:, None], stored_gammas[:, None], stored_times, stored_gammas)
    # Neighbouring averages are nearly the same, and the system nearly singular: the smallest solution is meant.
    weights = np.linalg.lstsq(products, overlap(stored_times, stored_gammas, time, gamma), rcond=1e-13)[0]
    return weights / weights.sum()


def overlap(
    time_a: np.ndarray, gamma_a: np.ndarray, time_b: np.ndarray | int, gamma_b: np.ndarray | float
) -> np.ndarray:
    """∫ p_a(t) p_b(t) dt of two power-function averages' weights over time, p(t) = (γ + 1) tᵞ / Tᵞ⁺¹ on [0, T]."""
    earlier_first = (np.minimum(time_a, time_b) / np.maximum(time_a, time_b)) ** np.where(
        time_a < time_b, gamma_b, gamma_a
    )
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * earlier_first / np.maximum(time_a, time_b)
