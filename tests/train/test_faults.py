"""How a run ends when a rank fails, hangs or is killed, and what signals do. The ranks are in faulty_rank.py."""

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from nitscale.config import load_config
from nitscale.errors import UserError
from nitscale.train import faults
from nitscale.train.faults import Beat, ExitCode, FaultsConfig, StopSignals, laggard

ROOT = Path(__file__).parents[2]


class Ending(NamedTuple):
    """How a group of ranks ended."""

    codes: list[int]
    """Exit codes by rank; minus the signal of one that was killed."""
    order: list[int]
    """Ranks as they ended."""
    seconds: float
    left: list[int]
    """Process groups in which something was left."""
    lines: list[str]
    """What the ranks printed."""
    hangs: Path


@pytest.fixture(scope="module")
def endings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ending]:
    """All cases of faulty_rank.py by name, which ran at the same time."""
    folder = tmp_path_factory.mktemp("endings")
    subprocess.run(
        [sys.executable, "-m", "tests.train.faulty_rank", str(folder)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "NITSCALE_DEVICE": "cpu", "TORCH_FR_BUFFER_SIZE": "100"},
        check=True,
        timeout=120,
    )
    results: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return {
        case: Ending(**result, lines=lines_of(folder / f"{case}.log"), hangs=folder / case / "hangs")
        for case, result in results.items()
    }


def lines_of(log: Path) -> list[str]:
    return [line for line in log.read_text().splitlines() if line]


def test_no_case_leaves_a_process_or_takes_long(endings):
    assert len(endings) == 14
    assert all(ending.left == [] and ending.seconds < 60 for ending in endings.values())


def test_an_exception_on_one_rank_ends_all_with_its_message_first(endings):
    ending = endings["raise_on_one"]
    assert ending.codes == [1, 1, 1] and ending.order[0] == 1
    assert ending.lines[:2] == ["error: rank 1: ValueError: the data are mouldy", "Traceback (most recent call last):"]
    assert sorted(ending.lines[-2:]) == [
        f"rank {rank} ends, too; rank 1: ValueError: the data are mouldy" for rank in (0, 2)
    ]


def test_an_error_of_rank_0_is_read_by_the_others_before_its_store_is_gone(endings):
    ending = endings["raise_on_rank_0"]
    assert ending.codes == [1, 1] and ending.order == [0, 1]
    assert ending.lines == [
        "error: rank 0: train: no such data",
        "rank 1 ends, too; rank 0: train: no such data",
    ]


def test_of_an_error_that_all_raise_together_the_message_is_that_of_its_rank(endings):
    ending = endings["fail_together"]
    assert ending.codes == [1, 1, 1]
    assert ending.lines[0] == "error: rank 1: files: the disk is full"
    assert len(ending.lines) == 3


def test_a_rank_that_waits_at_the_end_hears_that_another_failed(endings):
    ending = endings["raise_at_the_end"]
    assert ending.codes == [1, 1]
    assert ending.lines[0] == "error: rank 1: ValueError: too late"


def test_steps_that_are_not_finite_have_an_exit_code_of_their_own_on_all_ranks(endings):
    assert endings["not_finite"].codes == [ExitCode.NOT_FINITE] * 2
    assert [line.split()[0] for line in endings["not_finite"].lines] == ["error:", "rank"]


def test_a_rank_that_sleeps_for_ever_is_named_and_all_stacks_are_written(endings):
    ending = endings["hang"]
    assert ending.codes == [ExitCode.HUNG] * 3
    first = ending.lines[0]
    assert first.startswith("error: rank ") and "took more than 3 s" in first and str(ending.hangs) in first
    assert "rank 2 is behind the others, in 'data' of step 4" in first
    stacks = [(ending.hangs / f"rank-0000{rank}.txt").read_text() for rank in range(3)]
    assert "faulty_rank.py" in stacks[0] and "in barrier" in stacks[0] and "in sleep_for_ever" in stacks[2]
    assert all("rank 2: 'data' of step 4" in text and "rank 1: 'backward' of step 5" in text for text in stacks)
    recorded = pickle.loads((ending.hangs / "collectives-0").read_bytes())
    assert {entry["profiling_name"] for entry in recorded["entries"]} >= {"gloo:barrier"}


def test_a_single_process_that_hangs_is_ended_too(endings):
    ending = endings["hang_alone"]
    assert ending.codes == [ExitCode.HUNG]
    assert ending.lines[0].startswith("error: rank 0: 'data' of step 4 took more than 3 s; the stacks")
    assert "in sleep_for_ever" in (ending.hangs / "rank-00000.txt").read_text()


def test_a_hang_that_keeps_pythons_lock_is_ended_by_c_code(endings):
    ending = endings["hang_with_the_lock"]
    assert ending.codes == [ExitCode.FAILED]
    assert any("in hang_with_the_lock" in line for line in ending.lines)


def test_phases_within_their_limits_may_add_up_and_a_limit_of_0_is_none(endings):
    assert endings["slow_but_within_its_limits"].codes == [0]
    assert endings["slow_but_within_its_limits"].lines == []


def test_a_broken_collective_is_blamed_on_the_rank_that_was_killed(endings):
    ending = endings["die_in_a_collective"]
    assert ending.codes == [1, -signal.SIGKILL]
    assert ending.lines[0].startswith("error: rank 1 ended without a message; rank 0: RuntimeError: ")


def test_a_killed_rank_ends_the_others_even_when_no_collective_breaks(endings):
    ending = endings["die"]
    assert ending.codes == [1, -signal.SIGKILL, 1]
    assert ending.lines[0].startswith("error: rank 1: gave no sign of life for 10 s")
    assert ending.lines[1].startswith("rank 2 ends, too; rank 1: gave")


def test_a_killed_rank_0_which_keeps_the_store_ends_the_others(endings):
    ending = endings["die_on_rank_0"]
    assert ending.codes == [-signal.SIGKILL, 1]
    assert ending.lines[-1].startswith("error: rank 1: rank 0 ended without a message")


@pytest.mark.parametrize("case", ["end_with_rank_0_first", "end_with_rank_0_last"])
def test_a_normal_end_is_no_failure_whoever_is_first(endings, case):
    assert endings[case].codes == [0, 0]
    assert endings[case].lines == []


def test_the_rank_behind_the_others_is_the_earliest_then_the_longest_in_its_phase():
    def beats(*states: tuple[str, int, float]) -> dict[int, Beat]:
        return {rank: Beat(9, *state) for rank, state in enumerate(states)}

    assert laggard(beats(("backward", 5, 300), ("data", 4, 290), ("backward", 5, 300))) == 1
    assert laggard(beats(("backward", 5, 300), ("backward", 5, 300.4), ("forward", 5, 304))) == 2
    assert laggard(beats(("backward", 5, 300), ("backward", 5, 301))) is None
    assert laggard(beats(("data", 5, 300))) is None


@pytest.mark.parametrize("number", StopSignals.SIGNALS)
def test_a_signal_asks_to_stop_and_is_remembered_by_name(number, capfd):
    before = signal.getsignal(number)
    with StopSignals() as signals:
        assert not signals.requested
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.requested and signals.name == signal.Signals(number).name
    assert signal.getsignal(number) is before
    assert f"train: {signals.name}: the run stops" in capfd.readouterr().err


def test_a_second_ctrl_c_ends_at_once_unless_it_comes_with_the_first(monkeypatch):
    with StopSignals():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        monkeypatch.setattr(faults, "FORCE_AFTER_S", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_sigterm_during_the_import_of_torch_is_kept_for_later():
    program = """
import sys
from nitscale.train.faults import ExitCode, StopSignals
with StopSignals() as signals:
    assert "torch" not in sys.modules
    print("ready", flush=True)
    import torch
    sys.stdin.readline()
    print(signals.name)
    sys.exit(ExitCode.STOPPED)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate("\n", timeout=60)
    assert output == "SIGTERM\n"
    assert process.returncode == 75


def test_child_processes_can_be_kept_from_the_signals():
    with StopSignals() as signals:
        with signals.kept_from_children():
            child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
            os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.name == "SIGUSR1"
    status = Path(f"/proc/{child.pid}/status").read_text()
    child.communicate()
    blocked = int(next(line.split()[1] for line in status.splitlines() if line.startswith("SigBlk")), 16)
    assert all(blocked >> (number - 1) & 1 for number in StopSignals.SIGNALS)
    assert not set(StopSignals.SIGNALS) & signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.parametrize("override", ["step_limit_s=-1", "lost_after_s=1", "nonfinite_limit=0", "spikes.patience=0"])
def test_limits_that_cannot_be_are_refused_by_name(override):
    with pytest.raises(UserError, match=override.split("=")[0].split(".")[-1]):
        load_config(FaultsConfig, None, [override])
