"""The built-in pictures and their judge."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nitscale.demo.classifier import NONE, classify
from nitscale.demo.shapes import CLASSES, draw, draw_folder, random_size

SIZES = [(48, 48), (96, 64), (64, 128), (144, 144), (48, 144)]


def pictures(count: int) -> list[tuple[torch.Tensor, int]]:
    random = np.random.default_rng(0)
    made = []
    for i in range(count):
        picture = draw(CLASSES[i % len(CLASSES)], *SIZES[i % len(SIZES)], random)
        made.append((torch.from_numpy(picture).permute(2, 0, 1) / 127.5 - 1, i % len(CLASSES)))
    return made


def test_the_judge_is_right_on_real_pictures_and_on_their_mirror_images():
    real = pictures(160)
    assert np.mean([classify(image)[0] == label for image, label in real]) >= 0.97
    assert np.mean([classify(image.flip(-1))[0] == label for image, label in real]) >= 0.97


def test_the_judge_needs_the_layout_and_not_the_colours():
    real = pictures(80)
    shuffled = [(image.flatten(1)[:, torch.randperm(image[0].numel())].view_as(image), y) for image, y in real]
    assert np.mean([classify(image)[0] == label for image, label in shuffled]) < 0.05
    recoloured = [(image.flip(0) * -0.7, label) for image, label in real]
    assert np.mean([classify(image)[0] == label for image, label in recoloured]) >= 0.97


def test_the_judge_answers_none_for_pictures_that_show_no_layout():
    ramp = torch.linspace(-1, 1, 64).expand(3, 64, 64)
    coarse = F.interpolate(torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)), scale_factor=8)[0]
    for image in (torch.zeros(3, 64, 64), ramp, torch.rand(3, 64, 64) * 2 - 1, coarse * 2 - 1):
        assert classify(image)[0] == NONE


def test_a_quarter_of_a_picture_does_not_tell_the_class():
    """No single patch gives the class away: a crop of a corner is judged little better than chance."""
    real = [(image[:, : image.shape[1] // 2, : image.shape[2] // 2], label) for image, label in pictures(160)]
    assert np.mean([classify(image)[0] == label for image, label in real]) < 0.5


def test_drawing_is_repeatable_and_keeps_what_is_there(tmp_path):
    draw_folder(tmp_path / "a", 16, (48, 80), 2.0, "seed")
    draw_folder(tmp_path / "b", 16, (48, 80), 2.0, "seed")
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.*"))
    assert len(files) == 16 and {p.suffix for p in files} == {".png", ".jpg"}
    assert all((tmp_path / "a" / p).read_bytes() == (tmp_path / "b" / p).read_bytes() for p in files)
    (tmp_path / "a" / files[0]).unlink()
    stamps = {p: (tmp_path / "a" / p).stat().st_mtime_ns for p in files[1:]}
    draw_folder(tmp_path / "a", 16, (48, 80), 2.0, "seed")
    assert (tmp_path / "a" / files[0]).read_bytes() == (tmp_path / "b" / files[0]).read_bytes()
    assert all((tmp_path / "a" / p).stat().st_mtime_ns == stamp for p, stamp in stamps.items())


@pytest.mark.parametrize("ratio", [1.0, 2.0])
def test_random_sizes_stay_within_their_bounds(ratio):
    random = np.random.default_rng(0)
    for height, width in (random_size(random, (48, 111), ratio) for _ in range(200)):
        assert min(height, width) >= 48 and max(height, width) <= min(111, ratio * min(height, width))
