"""Samplers: the published runs, and their order of accuracy on a flow that is known."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nitscale.errors import UserError
from nitscale.flow.guidance import Guidance, GuidedVelocity
from nitscale.flow.paths import PATHS, get_path
from nitscale.flow.samplers import diffusion_coefficient, dopri5, euler, heun, midpoint, sde, time_grid
from nitscale.layout import PackLayout
from tests.published import TOLERANCE, difference, fit_layout, golden, names, nit_layout, published_model

DTYPES = [torch.float32, torch.float64]
LAYOUT = PackLayout.from_grids([(2, 3), (1, 2)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", names("nit_samplers*"))
def test_nit_samples_are_the_published_ones(name: str, dtype: torch.dtype) -> None:
    about, tensors = golden(name)
    model, layout = published_model("nit", name, dtype), nit_layout(tensors)
    start = tensors["in.latents"].flatten(1).to(dtype)
    for run, how in about["runs"].items():
        options = how["kwargs"]
        guidance = Guidance(options["cfg_scale"], (options["guidance_low"], options["guidance_high"]))
        velocity = Counted(GuidedVelocity(model, tensors["in.y"], layout, guidance, null_label=1000))
        steps = how["num_steps"]
        if how["fn"] == "euler_maruyama_sampler":
            draws = tensors["in.sde_draws"].flatten(2)
            path = options.get("path_type", "linear")
            sample = sde(velocity.call, start, layout, draw=draws.__getitem__, num_steps=steps, path=path)
        else:
            sample = (heun if options["heun"] else euler)(velocity.guided, start, layout, num_steps=steps)
        assert difference(sample, tensors[f"out.{run}"]) <= TOLERANCE[dtype], run


class Counted:
    """A velocity, and as a plain callable with the number of its calls."""

    def __init__(self, guided: GuidedVelocity) -> None:
        self.guided, self.calls = guided, 0

    def call(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return self.guided(x, t)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", names("fit_transport*"))
def test_fit_samples_are_the_published_ones(name: str, dtype: torch.dtype) -> None:
    about, tensors = golden(name)
    model, layout = published_model("fit", name, dtype), fit_layout(tensors["in.sample.size"])
    images = len(tensors["in.sample.y"])
    real = tensors["in.sample.mask"].bool()
    start = tensors["in.sample.z"][real].to(dtype)
    draws = tensors["in.sample.sde_draws"][:, :images][:, real]
    for run, how in about["runs"].items():
        if how["error"]:
            continue
        options, method = how["kwargs"], how["kwargs"]["sampling_method"].lower()
        guidance = Guidance(how["cfg_scale"], channels=3)
        null = about["config"]["num_classes"]
        velocity = GuidedVelocity(model, tensors["in.sample.y"], layout, guidance, null_label=null, patch_size=2)
        expected = tensors[f"out.sample.{run}"][:images][real]
        if how["mode"] == "sde":
            sample = sde(
                velocity,
                start,
                layout,
                draw=draws.__getitem__,
                num_steps=options["num_steps"],
                method=method,
                diffusion=options["diffusion_form"],
                diffusion_norm=options["diffusion_norm"],
                last_step=options["last_step"].lower(),
                last_step_size=options["last_step_size"],
            )
        elif method == "dopri5":
            tolerances = {"atol": options["atol"], "rtol": options["rtol"]}
            state, field, pack = start, velocity, layout
            if how["cfg_scale"] != 1.0:  # their error is that of both halves of the doubled batch
                state, field, pack = both_halves(start, velocity, layout)
            sample = dopri5(field, state, pack, error_norm="batch", stop_at_data=False, **tolerances)[: len(start)]
        else:
            steps = options["num_steps"] - 1  # theirs are points of a grid, both ends counted
            solve: dict[str, Callable[[], Tensor]] = {
                "euler": lambda v=velocity, n=steps: euler(v, start, layout, num_steps=n),
                "heun2": lambda v=velocity, n=steps: heun(v, start, layout, num_steps=n, correct_last=True),
                "midpoint": lambda v=velocity, n=steps: midpoint(v, start, layout, num_steps=n),
            }
            sample = solve[method]()
        assert difference(sample, expected) <= TOLERANCE[dtype], run


def both_halves(
    start: Tensor, velocity: GuidedVelocity, layout: PackLayout
) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor], PackLayout]:
    """The published sampler's state: the guided half, and a second whose unguided channels are the null class's."""
    pack = PackLayout.from_grids(layout.grids.tolist() * 2)
    null = torch.full_like(velocity.labels, velocity.null_label)
    guided_features = 3 * velocity.patch_size**2

    def field(x: Tensor, t: Tensor) -> Tensor:
        half, of_images = x[: len(start)], t[: layout.num_segments]
        guided = velocity(half, of_images)
        second = velocity.model(half, of_images, null, layout)
        second[:, :guided_features] = guided[:, :guided_features]
        return torch.cat([guided, second])

    return torch.cat([start, start]), field, pack


@pytest.mark.parametrize("name", names("fit_transport*"))
def test_dopri5_comes_close_to_the_exact_flow_with_error_control_per_image(name: str) -> None:
    _, tensors = golden(name)
    model, layout = published_model("fit", name, torch.float64), fit_layout(tensors["in.sample.size"])
    velocity = GuidedVelocity(model, tensors["in.sample.y"], layout, Guidance(), null_label=10)
    start = tensors["in.sample.z"].flatten(0, 1).double()
    exact = tensors["out.sample.dopri5_tight"].flatten(0, 1)
    assert difference(dopri5(velocity, start, layout, atol=1e-10, rtol=1e-10), exact) <= 1e-8
    assert difference(dopri5(velocity, start, layout), exact) <= 1e-3


def circle(x: Tensor, t: Tensor) -> Tensor:
    """A rotation by one radian a unit of time."""
    return torch.stack([-x[:, 1], x[:, 0]], dim=1)


START = torch.tensor([[1.0, 0.0], [0.0, 2.0]] * 4, dtype=torch.float64)
END = torch.stack(
    [
        START[:, 0] * torch.cos(torch.tensor(1.0)) + START[:, 1] * torch.sin(torch.tensor(1.0)),
        START[:, 1] * torch.cos(torch.tensor(1.0)) - START[:, 0] * torch.sin(torch.tensor(1.0)),
    ],
    dim=1,
)


@pytest.mark.parametrize(("sampler", "order"), [(euler, 1), (heun, 2), (midpoint, 2)])
def test_the_error_of_a_solver_falls_with_its_order(sampler: Callable[..., Tensor], order: int) -> None:
    options = {"correct_last": True} if sampler is heun else {}
    errors = [float((sampler(circle, START, LAYOUT, num_steps=n, **options) - END).abs().max()) for n in (20, 40)]
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.1)


def test_one_image_alone_steers_the_steps_of_dopri5_in_a_pack_of_many() -> None:
    """Averaged over the batch, the error of one hard image among easy ones would be let pass."""
    layout = PackLayout.from_grids([(1, 1)] * 200)
    hard = torch.zeros(200, 1, dtype=torch.float64)
    hard[0] = 1.0

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return hard * torch.cos(25 * t[0]) * 25

    exact = hard * (1 - torch.sin(torch.tensor(25.0, dtype=torch.float64)))
    errors = {}
    for norm in ("image", "batch"):
        sample = dopri5(velocity, hard, layout, atol=1e-4, rtol=1e-4, error_norm=norm)
        errors[norm] = float((sample - exact).abs().max())
    assert errors["image"] < 1e-3
    assert errors["image"] < errors["batch"] / 3


def test_dopri5_never_looks_beyond_the_data() -> None:
    seen: list[float] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t.min().item())
        return circle(x, t)

    dopri5(velocity, START, LAYOUT)
    assert min(seen) >= -1e-12
    dopri5(velocity, START, LAYOUT, stop_at_data=False)
    assert min(seen) < 0


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("diffusion", ["linear", "sigma", "constant", "decreasing", "increasing-decreasing"])
def test_the_sde_keeps_the_marginals_of_the_path(diffusion: str, path: str, method: str) -> None:
    """Data N(2, 0.5²): the exact velocity is linear in x, and samples must have the mean and deviation of the data."""
    p = get_path(path)
    mean, std = 2.0, 0.5

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        t = t[0]
        alpha, sigma, d_alpha, d_sigma = (f(t) for f in (p.alpha, p.sigma, p.d_alpha, p.d_sigma))
        variance = alpha**2 * std**2 + sigma**2
        from_mean = (alpha * d_alpha * std**2 + sigma * d_sigma) / variance
        return d_alpha * mean + from_mean * (x - alpha * mean)

    layout = PackLayout.from_grids([(1, 1)])
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1, 20_000, generator=generator, dtype=torch.float64)

    def draw(step: int) -> Tensor:
        return torch.randn(1, 20_000, generator=generator, dtype=torch.float64)

    sample = sde(
        velocity,
        start,
        layout,
        draw=draw,
        num_steps=200,
        path=path,
        method=method,
        diffusion=diffusion,
        last_step_size=0.005,
    )
    assert sample.mean().item() == pytest.approx(mean, abs=0.03)
    assert sample.std().item() == pytest.approx(std, abs=0.03)


def test_a_step_of_the_sde_without_a_last_one_ends_at_the_data() -> None:
    times: list[float] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        times.append(t[0].item())
        return torch.zeros_like(x)

    sde(velocity, START, LAYOUT, draw=lambda step: torch.zeros(8, 2), num_steps=5, last_step="none")
    assert times == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_score_based_diffusion_is_that_of_the_forward_process() -> None:
    assert diffusion_coefficient("sbdm", 0.3) == pytest.approx(0.3 + 0.09 / 0.7)
    with pytest.raises(UserError, match="'quadratic'"):
        diffusion_coefficient("quadratic", 0.3)


def test_samples_have_the_dtype_of_their_start_and_do_not_need_gradients() -> None:
    weight = torch.ones(2, requires_grad=True)
    for sampler in (euler, heun, midpoint, dopri5):
        sample = sampler(lambda x, t: x * weight, START.float(), LAYOUT)
        assert sample.dtype == torch.float32 and not sample.requires_grad


def test_wrong_options_are_errors() -> None:
    with pytest.raises(UserError, match="num_steps=0"):
        time_grid(0)
    with pytest.raises(UserError, match="error_norm='token'"):
        dopri5(circle, START, LAYOUT, error_norm="token")
    for options, named in (({"method": "rk4"}, "method='rk4'"), ({"last_step": "mode"}, "last_step='mode'")):
        with pytest.raises(UserError, match=named):
            sde(circle, START, LAYOUT, draw=lambda step: START, **options)
    with pytest.raises(UserError, match="num_steps=1"):
        sde(circle, START, LAYOUT, draw=lambda step: START, num_steps=1)
