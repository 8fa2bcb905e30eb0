"""A part of the matrix of matrix.py that has every pair of values; docs/correctness.md has all of it."""

import json
import subprocess
import sys
from pathlib import Path

TOLERANCE = 2e-5
KINDS = ("loss", "grad_norm", "weights", "ema")


def test_the_trainer_equals_a_plain_loop_and_resumes_exactly_or_on_other_ranks(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.train.matrix", "--pairs", "--json", str(tmp_path / "matrix.json")]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-9000:]
    lines, changed = json.loads((tmp_path / "matrix.json").read_text())
    assert len(lines) >= 20 and len(changed) == 10
    for line in lines:
        assert all(line[kind] <= TOLERANCE for kind in (*KINDS, "gradients")), line
        assert line["resumed"] == "exact", line
    for line in changed:
        assert all(line[kind] <= TOLERANCE for kind in KINDS), line
