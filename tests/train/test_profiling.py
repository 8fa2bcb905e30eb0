"""Traces of chosen steps, and what is said when memory runs out."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nitscale.data.plan import Pack
from nitscale.errors import UserError
from nitscale.train.engine import EngineConfig
from nitscale.train.process import Process
from nitscale.train.profiling import Profiler, out_of_memory_report, parse_profile, ways_out

PROCESS = Process(0, 1, torch.device("cpu"))


def pack(*grids: tuple[int, int]) -> Pack:
    return Pack(7, 0, np.arange(len(grids)), np.array(grids), np.zeros(len(grids), bool), 0)


def products(run: Path, profiler: Profiler, steps: range) -> list[int]:
    """Take steps, each of which multiplies matrices with as many rows as its number; the rows that the trace has."""
    for step in steps:
        profiler.step(step)
        torch.ones(step + 1, 2) @ torch.ones(2, 3)
    profiler.close()
    files = list((run / "profile").glob("*.json.gz")) if (run / "profile").exists() else []
    if not files:
        return []
    with gzip.open(files[0]) as file:
        events = json.load(file)["traceEvents"]
    return [event["args"]["Input Dims"][0][0] - 1 for event in events if event.get("name") == "aten::mm"]


def test_a_range_of_steps_is_read() -> None:
    assert list(parse_profile("10:13")) == [10, 11, 12]
    for wrong in ("10", "13:10", "5:5", "a:b", "-1:3", "1:2:3"):
        with pytest.raises(UserError, match=r"--profile '.*' must be FIRST:END"):
            parse_profile(wrong)


@pytest.mark.parametrize("first", [0, 4])
def test_the_trace_has_the_steps_that_were_asked_for(tmp_path: Path, first: int) -> None:
    profiler = Profiler(tmp_path, PROCESS, range(4, 6))
    assert products(tmp_path, profiler, range(first, 9)) == [4, 5]
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["steps-4-6-rank-00000.json.gz"]


def test_a_run_that_ends_within_the_range_leaves_what_it_did(tmp_path: Path) -> None:
    assert products(tmp_path, Profiler(tmp_path, PROCESS, range(2, 100)), range(0, 4)) == [2, 3]


def test_without_a_range_nothing_is_traced(tmp_path: Path) -> None:
    assert products(tmp_path, Profiler(tmp_path, PROCESS, None), range(3)) == []
    assert list(tmp_path.iterdir()) == []


def test_a_range_that_a_resumed_run_is_beyond_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert products(tmp_path, Profiler(tmp_path, PROCESS, range(2, 4)), range(10, 12)) == []
    assert "nothing is traced: steps 2 to 3 were not run" in capsys.readouterr().out


def test_a_disk_that_refuses_the_trace_does_not_end_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "profile").write_text("in the way")
    profiler = Profiler(tmp_path, PROCESS, range(0, 1))
    for step in range(3):
        profiler.step(step)
    assert "cannot be written" in capsys.readouterr().out


def test_only_the_first_and_the_last_rank_trace(tmp_path: Path) -> None:
    chosen = [Profiler(tmp_path, Process(rank, 4, torch.device("cpu")), range(3)).steps for rank in range(4)]
    assert [steps is not None for steps in chosen] == [True, False, False, True]


def test_running_out_of_memory_names_the_pack_and_the_ways_out(tmp_path: Path) -> None:
    packs = [pack((4, 4), (2, 3)), pack((5, 6))]
    with (
        pytest.raises(UserError, match=r"at step 7 .*can't allocate.*30 tokens, its longest image 30") as caught,
        out_of_memory_report(tmp_path, PROCESS, packs, EngineConfig(zero_stage=1)),
    ):
        torch.empty(1 << 60)
    for way in ("engine.recompute=selective", "engine.zero_stage (now 1)", "data.token_budget", "oom/rank-00000.txt"):
        assert way in str(caught.value)
    report = (tmp_path / "oom" / "rank-00000.txt").read_text()
    assert "can't allocate" in report and "VmRSS" in report


def test_running_out_of_gpu_memory_is_reported_alike(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="CUDA out of memory"),
        out_of_memory_report(tmp_path, PROCESS, [pack((1, 1))], EngineConfig()),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")


def test_other_errors_pass(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="another"),
        out_of_memory_report(tmp_path, PROCESS, [pack((1, 1))], EngineConfig()),
    ):
        raise RuntimeError("another")
    assert list(tmp_path.iterdir()) == []


def test_what_is_done_already_is_not_advised() -> None:
    words = ways_out(EngineConfig(zero_stage=3, recompute="full"))
    assert "recompute" not in words and "zero_stage" not in words and "data.token_budget" in words
    assert "recompute_every=1" in ways_out(EngineConfig(recompute="full", recompute_every=2))
