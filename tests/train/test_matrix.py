"""A part of the matrix of matrix.py that has every pair of values; docs/correctness.md has all of it."""

from pathlib import Path

from tests.train.matrix import ALL, CHANGES, pairwise, run_matrix

TOLERANCE = 2e-5
KINDS = ("loss", "grad_norm", "weights", "ema")


def test_the_trainer_equals_a_plain_loop_and_resumes_exactly_or_on_other_ranks(
    shapes_dataset: Path, tmp_path: Path
) -> None:
    changes = [change for change in CHANGES if change.to_stage is not None or change.zero_stage == 2]
    lines, changed = run_matrix(pairwise(ALL), changes, shapes_dataset, tmp_path)
    assert len(lines) >= 12 and len(changed) == len(changes)
    for line in lines:
        assert all(line[kind] <= TOLERANCE for kind in (*KINDS, "gradients")), line
        assert line["resumed"] == "exact", line
    for line in changed:
        assert all(line[kind] <= TOLERANCE for kind in KINDS), line
