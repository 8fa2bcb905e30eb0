"""How whole trainings end when something goes wrong: `nitscale train` on two ranks, see ending_trainings.py."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from nitscale.checkpoints import published
from nitscale.train.faults import ExitCode
from tests.train.ending_trainings import CASES
from tests.train.tiny import metrics


class Ending(NamedTuple):
    codes: list[int]
    left: bool
    """Whether processes were left."""
    seconds: float
    run: Path
    log: str

    @property
    def steps(self) -> list[int]:
        return [checkpoint.step for checkpoint in published(self.run / "checkpoints")]


@pytest.fixture(scope="module")
def endings(shapes_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ending]:
    folder = tmp_path_factory.mktemp("endings")
    names = [name for name in CASES if name != "sigterm_in_compile" or shutil.which("g++")]
    subprocess.run(
        [sys.executable, "-m", "tests.train.ending_trainings", str(shapes_dataset), str(folder), *names],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1", "NITSCALE_DEVICE": "cpu"},
        check=True,
        timeout=300,
    )
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return {
        name: Ending(*result, run=folder / name, log=(folder / f"{name}.log").read_text(errors="replace"))
        for name, result in results.items()
    }


def test_no_case_leaves_a_process_or_takes_long(endings):
    assert not [name for name, ending in endings.items() if ending.left]
    assert max(ending.seconds for ending in endings.values()) < 200


@pytest.mark.parametrize(
    ("case", "step"),
    [
        ("sigterm_in_start_up", 0),
        ("sigterm_in_step", 3),
        ("sigterm_in_save", 4),
        ("sigterm_in_validation", 2),
        ("sigterm_in_compile", 1),
    ],
)
def test_sigterm_of_one_rank_ends_all_after_the_step_with_a_checkpoint_and_its_own_code(endings, case, step):
    if case not in endings:
        pytest.skip("torch.compile needs g++")
    ending = endings[case]
    assert ending.codes == [ExitCode.STOPPED] * 2, ending.log
    for checkpoint in published(ending.run / "checkpoints"):
        checkpoint.verify()
    if case == "sigterm_in_save":  # steps go on while a thread writes
        assert ending.steps[0] == 4 and 4 <= ending.steps[-1] <= 8
    else:
        assert ending.steps == ([step] if step else [])
    assert "stopped by" in ending.log


def test_a_loss_of_one_rank_that_is_not_finite_skips_the_step_on_all(endings):
    ending = endings["nan_once"]
    assert ending.codes == [ExitCode.COMPLETE] * 2, ending.log
    assert [line["skipped"] for line in metrics(ending.run)] == [0, 0, 0, 1, 0, 0, 0, 0]
    assert metrics(ending.run)[3]["loss"] is None
    weights = published(ending.run / "checkpoints")[-1].weights("model")
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_a_run_of_steps_that_are_not_finite_ends_with_what_it_trained_on(endings):
    ending = endings["nan_for_ever"]
    assert ending.codes == [ExitCode.NOT_FINITE] * 2, ending.log
    assert ending.steps == [4]
    packs = json.loads((ending.run / "nonfinite.json").read_text())
    assert min(pack["step"] for pack in packs) == 5 and len({pack["step"] for pack in packs}) >= 3
    assert all(len(pack["samples"]) == len(pack["keys"]) > 0 for pack in packs)


def test_a_rank_that_sleeps_for_ever_ends_all_within_the_limit(endings):
    ending = endings["sleeps"]
    assert ending.codes == [ExitCode.HUNG] * 2, ending.log
    assert "rank 1 is behind the others" in ending.log or "rank 1: 'forward' of step 5" in ending.log
    assert "sleep_for_ever" in (ending.run / "hangs" / "rank-00001.txt").read_text()
    assert ending.steps == [4]


def test_an_exception_on_one_rank_ends_all_with_its_message(endings):
    ending = endings["raises"]
    assert ending.codes == [ExitCode.FAILED] * 2
    first = next(line for line in ending.log.splitlines() if "rank" in line)
    assert first.endswith("error: rank 1: ValueError: the data are mouldy"), ending.log
