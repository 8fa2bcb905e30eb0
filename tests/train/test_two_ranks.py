"""Two processes: exact resume under ZeRO 1 and 2, and failures of one that end both."""

import os
import subprocess
import sys
from pathlib import Path


def test_two_ranks_resume_exactly_stop_together_and_fail_together(shapes_dataset: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*command, "-m", "tests.train.two_ranks", str(shapes_dataset), str(tmp_path)],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1", "NITSCALE_DEVICE": "cpu"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-6000:]
    assert (tmp_path / "passed").read_text() == "all cases"
