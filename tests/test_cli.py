"""The command line as a user meets it: in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

from nitscale.cli import app


def nitscale(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "nitscale", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_five_commands_run_one_after_the_other(tmp_path, shapes_dataset):
    images = shapes_dataset.parent / "images"
    encoded = nitscale("encode", images, tmp_path / "latents", "--shard-samples", "16")
    assert encoded.returncode == 0 and "64 images" in encoded.stdout, encoded.stderr

    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        f"run: {tmp_path / 'run'}\n"
        f"data: {{path: {tmp_path / 'latents'}, token_budget: 64, packs_per_step: 2, workers: 0}}\n"
        "model: {width: 32, depth: 1, heads: 2, num_classes: 8}\n"
        "train: {steps: 2}\n"
    )
    trained = nitscale("train", recipe, "train.steps=3")
    assert trained.returncode == 0 and "is complete" in trained.stdout, trained.stderr
    assert (tmp_path / "run" / "checkpoints" / "step-00000003" / "manifest.json").exists()

    sampled = nitscale(
        "sample", tmp_path / "run", "--size", "32x48", "--size", "64x32", "--class", "disc,0", "--seeds", "0-1",
        "--steps", "2", "--interval", "0.2,0.9", "--out", tmp_path / "samples",
    )  # fmt: skip
    assert sampled.returncode == 0, sampled.stderr
    assert len(list((tmp_path / "samples").glob("class*.png"))) == 8
    assert (tmp_path / "samples" / "contact_sheet.png").exists()

    evaluated = nitscale("evaluate", tmp_path / "samples", "--data", tmp_path / "latents")
    assert evaluated.returncode == 0 and "8 samples against 64 real images" in evaluated.stdout, evaluated.stderr


def test_a_mistake_is_one_line_without_a_traceback_and_a_failing_exit_code(tmp_path):
    for arguments, words in {
        ("train", "configs/absent.yaml"): "no file configs/absent.yaml",
        ("encode", tmp_path / "absent", tmp_path / "out"): "does not exist",
        ("sample", tmp_path, "--size", "32x32"): "there is none at",
        ("demo", "--images", tmp_path / "absent", "--out", tmp_path / "demo"): "does not exist",
    }.items():
        result = nitscale(*arguments)
        assert result.returncode == 1, arguments
        assert words in result.stderr and "Traceback" not in result.stderr
        assert result.stderr.startswith("error: ")


def test_print_config_shows_the_resolved_configuration_and_trains_nothing(tmp_path):
    result = nitscale(
        "train", "configs/nit_xl_imagenet.yaml", "train.steps=7", f"run={tmp_path / 'run'}", "--print-config"
    )
    assert result.returncode == 0 and "steps: 7" in result.stdout and "width: 1152" in result.stdout
    assert not (tmp_path / "run").exists()


def test_every_command_has_an_example_in_its_help():
    for command in app.registered_commands:
        assert command.epilog is not None and command.epilog.startswith("Example: ")


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--size", "33x32", "multiples of 16"),
        ("--size", "0x32", "multiples of 16"),
        ("--size", "32", "HEIGHTxWIDTH"),
        ("--size", "32000x32000", "token_budget"),
        ("--class", "unicorn", "class 'unicorn' is unknown"),
        ("--class", "8", "classes are 0 to 7"),
        ("--seeds", "a-b", "must be like 0-7"),
        ("--interval", "0.5", "two times"),
        ("--interval", "0.9,0.1", "0 <= from <= to <= 1"),
        ("--sampler", "ddim", "must be one of: ode, sde"),
        ("--steps", "0", "at least 1"),
    ],
)
def test_a_wrong_wish_for_samples_is_named(trained_run, tmp_path, option, value, words):
    from typer.testing import CliRunner

    from nitscale.errors import UserError

    arguments = {"--size": "32x32", "--out": str(tmp_path / "out")} | {option: value}
    result = CliRunner().invoke(
        app, ["sample", str(trained_run), *(word for pair in arguments.items() for word in pair)]
    )
    assert isinstance(result.exception, UserError) and words in str(result.exception)
    assert not (tmp_path / "out").exists()
