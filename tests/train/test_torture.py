"""Four kills; `python -m tests.train.torture` does twenty."""

from pathlib import Path

from tests.train.torture import torture


def test_a_run_whose_ranks_are_killed_at_random_equals_the_undisturbed_one(
    shapes_dataset: Path, tmp_path: Path
) -> None:
    assert len(torture(shapes_dataset, tmp_path, kills=4, seed=0)) == 4
