"""The environment of a run: what is written down, and what must not be."""

import json
import subprocess
from pathlib import Path

import pytest

from nitscale.train import environment
from nitscale.train.environment import git_state, relevant_variables, uncommitted_changes, write_environment
from nitscale.train.process import start_process


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A git checkout with one committed file of nitscale."""
    folder = tmp_path / "checkout"
    (folder / "nitscale").mkdir(parents=True)
    (folder / "nitscale" / "__init__.py").write_text("first = 1\n")
    for command in (
        ["init", "-q", "-b", "trunk"],
        ["add", "."],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "one"],
    ):
        subprocess.run(["git", "-C", str(folder), *command], check=True)
    return folder


def test_a_clean_checkout_is_its_commit(checkout: Path) -> None:
    state = git_state(checkout)
    assert len(state["commit"]) == 40 and state["branch"] == "trunk"
    assert not state["dirty"] and uncommitted_changes(checkout) == ""


def test_changes_that_no_commit_has_are_kept_up_to_a_length(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkout / "nitscale" / "__init__.py").write_text("second = 2\n")
    (checkout / "new.py").write_text("")
    state = git_state(checkout)
    assert state["dirty"] and state["changed"] == [" M nitscale/__init__.py", "?? new.py"]
    assert "+second = 2" in uncommitted_changes(checkout)
    monkeypatch.setattr(environment, "LONGEST_DIFF", 10)
    assert uncommitted_changes(checkout).startswith("diff --git") and "[cut: " in uncommitted_changes(checkout)


def test_another_project_around_an_installation_is_not_taken_for_its_source(checkout: Path) -> None:
    installed = checkout / "venv" / "site-packages"
    (installed / "nitscale").mkdir(parents=True)
    (installed / "nitscale" / "__init__.py").write_text("")
    assert git_state(installed) == {} and uncommitted_changes(installed) == ""


def test_secrets_stay_out_of_the_variables() -> None:
    found = relevant_variables(
        {
            "NCCL_DEBUG": "INFO",
            "SLURM_JOB_ID": "7",
            "CUDA_VISIBLE_DEVICES": "0",
            "NITSCALE_PROXY": "http://me:hush@proxy:80",
            "AWS_SECRET_ACCESS_KEY": "hush",
            "SLURM_JWT": "hush",
            "NITSCALE_TOKEN": "hush",
            "HOME": "/home/me",
        }
    )
    assert found == {
        "CUDA_VISIBLE_DEVICES": "0",
        "NCCL_DEBUG": "INFO",
        "NITSCALE_PROXY": "http://…@proxy:80",
        "SLURM_JOB_ID": "7",
    }


def test_every_start_is_described_and_the_ones_before_are_kept(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "SOURCE", checkout)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "hush-hush")
    run = tmp_path / "run"
    write_environment(run, start_process())
    (checkout / "nitscale" / "__init__.py").write_text("second = 2\n")
    write_environment(run, start_process())
    starts = [json.loads(line) for line in (run / "environments.jsonl").read_text().splitlines()]
    assert [start["git"]["dirty"] for start in starts] == [False, True]
    newest = json.loads((run / "environment.json").read_text())
    assert newest == starts[1]
    assert "+second = 2" in (run / newest["git"]["diff"]).read_text()
    assert newest["versions"]["torch"] == newest["packages"]["torch"]
    assert list(newest["ranks"]["hosts"].values()) == [[0]] and newest["ranks"]["world_size"] == 1
    assert newest["machine"]["cores"] >= 1 and newest["command"]
    assert not any("hush" in file.read_text() for file in run.iterdir())
