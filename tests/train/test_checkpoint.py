"""Checkpoints: whole or absent."""

import errno
import shutil
from pathlib import Path

import pytest

from nitscale.errors import UserError
from nitscale.train import checkpoint as module
from nitscale.train.checkpoint import find_checkpoint, published
from nitscale.train.engine import start_process
from nitscale.train.loop import run_training
from tests.train.tiny import differences, final_state, tiny_run


def train(config) -> bool:
    return run_training(config, start_process())


@pytest.fixture(scope="module")
def finished(tmp_path_factory, shapes_dataset) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    assert train(tiny_run(folder, shapes_dataset))
    return folder


def test_a_flipped_bit_is_noticed_and_the_checkpoint_before_is_used(finished, shapes_dataset, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    newest = published(tmp_path / "run" / "checkpoints")[-1].folder
    file = next((newest / "engine").glob("zero*"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert train(tiny_run(tmp_path / "run", shapes_dataset))
    assert "is damaged (sha256 differs)" in capsys.readouterr().out
    assert differences(final_state(finished), final_state(tmp_path / "run")) == []


def test_a_half_written_checkpoint_and_an_unreadable_pointer_are_passed_over(finished, shapes_dataset, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(folder / "step-00000008", folder / ".staging-step-00000012")
    (folder / "step-00000008" / "manifest.json").unlink()
    (folder / "latest").write_bytes(b"\xff\x00")
    assert train(tiny_run(tmp_path / "run", shapes_dataset))
    assert differences(final_state(finished), final_state(tmp_path / "run")) == []


def test_a_run_whose_checkpoints_are_all_damaged_says_so_and_deletes_nothing(finished, shapes_dataset, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    for checkpoint in published(tmp_path / "run" / "checkpoints"):
        (checkpoint.folder / "ema.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="none of the 2 checkpoints"):
        train(tiny_run(tmp_path / "run", shapes_dataset))
    assert len(published(tmp_path / "run" / "checkpoints")) == 2


def test_a_full_disk_while_saving_keeps_the_checkpoint_before(finished, shapes_dataset, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000008")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(UserError, match="the disk is full"):
        train(tiny_run(tmp_path / "run", shapes_dataset))
    assert [c.step for c in published(tmp_path / "run" / "checkpoints")] == [4]
    monkeypatch.undo()
    assert train(tiny_run(tmp_path / "run", shapes_dataset))
    assert differences(final_state(finished), final_state(tmp_path / "run")) == []


def test_only_the_newest_checkpoints_are_kept(shapes_dataset, tmp_path):
    assert train(tiny_run(tmp_path, shapes_dataset, "train.checkpoint_every=2", "train.keep_last=2"))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-00000006", "step-00000008"]


def test_a_checkpoint_of_another_zero_stage_is_refused(finished, shapes_dataset):
    with pytest.raises(UserError, match="zero_stage=1, this run has zero_stage=2"):
        train(tiny_run(finished, shapes_dataset, "engine.zero_stage=2", "train.steps=9"))


def test_a_folder_without_a_checkpoint_says_what_to_give(tmp_path):
    with pytest.raises(UserError, match="give a run folder"):
        find_checkpoint(tmp_path)
