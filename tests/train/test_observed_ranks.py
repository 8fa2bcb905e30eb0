"""Two processes: validation and previews through the engine, under ZeRO 0 and 3 and tensor parallelism."""

from pathlib import Path

from tests.train.test_two_ranks import torchrun


def test_validation_and_previews_do_not_depend_on_how_the_model_is_spread(shapes_dataset: Path, tmp_path: Path) -> None:
    run = torchrun("tests.train.observed_ranks", shapes_dataset, tmp_path)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-6000:]
    assert (tmp_path / "passed").read_text() == "all cases"
