"""Checkpoints: whole or absent."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nitscale.checkpoints import find_weights, newest_whole, published
from nitscale.errors import UserError
from nitscale.train.loop import run_training
from nitscale.train.process import start_process
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
    file = newest / "slices" / "rank-00000.safetensors"
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
        (checkpoint.folder / "slices" / "rank-00000.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="none of the 2 checkpoints"):
        train(tiny_run(tmp_path / "run", shapes_dataset))
    assert len(published(tmp_path / "run" / "checkpoints")) == 2


FULL_DISK = """
import resource, signal, sys
from pathlib import Path

import torch

from nitscale.checkpoints import write_tensors
from nitscale.errors import UserError
from nitscale.files import disk_errors
from nitscale.train.process import start_process
from nitscale.train.loop import run_training
from tests.train.tiny import tiny_run

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))  # no file may grow beyond 100 kB
run, dataset = map(Path, sys.argv[1:])
for write in (
    lambda: run_training(tiny_run(run, dataset), start_process()),
    lambda: write_tensors(run / "weights", {"a": torch.zeros(100_000)}),
):
    try:
        with disk_errors(run):
            write()
    except UserError as error:
        print(error)
"""


def test_a_disk_that_takes_no_more_while_saving_keeps_the_checkpoint_before(finished, shapes_dataset, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000008")
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "run"), str(shapes_dataset)]
    output = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2])
    assert output.stdout.count("the disk is full: cannot write") == 2, output.stdout + output.stderr
    assert [c.step for c in published(tmp_path / "run" / "checkpoints")] == [4]
    assert train(tiny_run(tmp_path / "run", shapes_dataset))
    assert differences(final_state(finished), final_state(tmp_path / "run")) == []


def test_a_newer_damaged_checkpoint_does_not_push_out_good_ones(finished, shapes_dataset, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    (folder / "step-00000008" / "slices" / "rank-00000.safetensors").write_bytes(b"")
    options = ("train.keep_last=1", "train.checkpoint_every=2", "train.steps=6")
    train(tiny_run(tmp_path / "run", shapes_dataset, *options))
    assert [c.folder.name for c in published(folder)] == ["step-00000006", "step-00000008"]
    assert newest_whole(folder).step == 6


def test_what_killed_runs_left_is_removed(finished, shapes_dataset, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    for name in (".staging-step-00000003", ".trash-step-00000001"):
        (tmp_path / "run" / "checkpoints" / name).mkdir()
    train(tiny_run(tmp_path / "run", shapes_dataset, "train.steps=9"))
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_another_model_is_refused_with_the_differing_field(finished, shapes_dataset):
    with pytest.raises(UserError, match=r"model\.depth is 3, was 2"):
        train(tiny_run(finished, shapes_dataset, "model.depth=3", "train.steps=9"))
    assert "depth: 2" in (finished / "config.yaml").read_text()


def test_a_manifest_that_is_valid_json_but_not_a_manifest_is_named(finished, tmp_path):
    shutil.copytree(published(finished / "checkpoints")[-1].folder, tmp_path / "step-00000008")
    for content, words in {"{}": "is damaged", '{"files": {}, "format": 99}': "format 99"}.items():
        (tmp_path / "step-00000008" / "manifest.json").write_text(content)
        with pytest.raises(UserError, match=words):
            find_weights(tmp_path / "step-00000008")


def test_checkpoints_of_round_steps_are_kept_for_ever(shapes_dataset, tmp_path):
    options = ("train.checkpoint_every=1", "train.keep_last=1", "train.keep_every=3")
    assert train(tiny_run(tmp_path, shapes_dataset, *options))
    assert [c.step for c in published(tmp_path / "checkpoints")] == [3, 6, 8]


def test_only_the_newest_checkpoints_are_kept(shapes_dataset, tmp_path):
    assert train(tiny_run(tmp_path, shapes_dataset, "train.checkpoint_every=2", "train.keep_last=2"))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-00000006", "step-00000008"]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_run_goes_on_at_another_zero_stage(finished, shapes_dataset, tmp_path, stage):
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000008")
    assert train(tiny_run(tmp_path / "run", shapes_dataset, f"engine.zero_stage={stage}"))
    ours, theirs = (published(folder / "checkpoints")[-1] for folder in (tmp_path / "run", finished))
    for which in ("ema", "model"):
        for name, expected in theirs.weights(which).items():
            torch.testing.assert_close(ours.weights(which)[name], expected, rtol=2e-5, atol=1e-7)


def test_weights_of_a_checkpoint_are_chosen_by_name(finished, shapes_dataset, tmp_path):
    train(tiny_run(tmp_path, shapes_dataset, "ema.decays=[0.5,0]", "train.steps=2"))
    (checkpoint,) = published(tmp_path / "checkpoints")
    assert checkpoint.averages() == ["0.5", "0"]
    model, last = checkpoint.weights("model"), checkpoint.weights("0")
    assert all(torch.equal(model[name], last[name]) for name in model)
    assert not all(torch.equal(model[name], value) for name, value in checkpoint.weights().items())
    with pytest.raises(UserError, match=r"no weights '0\.9'; choose 0\.5, 0 or model"):
        checkpoint.weights("0.9")


def test_a_folder_without_a_checkpoint_says_what_to_give(tmp_path):
    with pytest.raises(UserError, match="give a run folder"):
        find_weights(tmp_path)
