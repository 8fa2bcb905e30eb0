"""The loop against what it promises: exact resume, the same numbers on any number of ranks, a plain reference."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nitscale.checkpoints import published
from nitscale.config import to_yaml
from nitscale.data.loader import read_pack
from nitscale.data.manifest import load_dataset
from nitscale.data.plan import Plan
from nitscale.errors import UserError
from nitscale.models.transformer import PackedTransformer
from nitscale.randomness import bernoulli, torch_generator
from nitscale.train.faults import StopSignals
from nitscale.train.loop import run_training
from nitscale.train.process import start_process
from tests.data.damage import damage
from tests.train.tiny import differences, final_state, metrics, tiny_run


def train(config) -> bool:
    return run_training(config, start_process())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, shapes_dataset) -> Path:
    """A run of 8 steps at ZeRO stage 1."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert train(tiny_run(folder, shapes_dataset))
    return folder


def test_a_resumed_run_and_one_resumed_twice_equal_the_undisturbed_one_bit_for_bit(
    undisturbed, shapes_dataset, tmp_path
):
    # The schedule depends on train.steps, so the run is cut short by a stop request and not by fewer steps.
    for name, stops in {"once": [4], "twice": [3, 5]}.items():
        for stop in stops:
            stop_after(tiny_run(tmp_path / name, shapes_dataset), stop)
        assert train(tiny_run(tmp_path / name, shapes_dataset))
        assert differences(final_state(undisturbed), final_state(tmp_path / name)) == []
        assert [m["data_digest"] for m in metrics(tmp_path / name)] == [m["data_digest"] for m in metrics(undisturbed)]
        assert [m["loss"] for m in metrics(tmp_path / name)] == [m["loss"] for m in metrics(undisturbed)]


def stop_after(config, step: int) -> None:
    """Train until `step` is done, as if SIGTERM had come during it."""
    from nitscale.train.loop import Trainer

    signals = StopSignals()
    trainer = Trainer(config, start_process(), signals)
    do_step = trainer.train_step

    def step_and_stop(packs):
        line = do_step(packs)
        if trainer.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return line

    trainer.train_step = step_and_stop
    with signals:
        assert not trainer.train()
    assert published(Path(config.run) / "checkpoints")[-1].step == step


@pytest.mark.parametrize("stage", [0, 2])
def test_other_zero_stages_give_the_same_numbers(undisturbed, shapes_dataset, tmp_path, stage):
    assert train(tiny_run(tmp_path, shapes_dataset, f"engine.zero_stage={stage}"))
    for ours, theirs in zip(metrics(tmp_path), metrics(undisturbed), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    ours, theirs = (
        published(tmp_path / "checkpoints")[-1].weights(),
        published(undisturbed / "checkpoints")[-1].weights(),
    )
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)


def test_the_loop_equals_a_plain_pytorch_loop_written_here(undisturbed, shapes_dataset):
    config = tiny_run(undisturbed, shapes_dataset)
    dataset = load_dataset(shapes_dataset)
    plan = Plan(dataset, config.data.plan(config.seed, 1))
    model = PackedTransformer(config.model)
    model.initialize(config.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=config.optimizer.betas, eps=config.optimizer.eps, weight_decay=0.01
    )
    averaged = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = plan.start()
    for step in range(8):
        packs, state = plan.step(state)
        total = sum(pack.num_tokens for pack in packs)
        loss_of_step = 0.0
        for pack in packs:
            batch = read_pack(dataset, pack, 1)
            n = len(batch.labels)
            noise = torch.randn(batch.tokens.shape, generator=torch_generator(0, "noise", step, pack.pack))
            normal = torch.randn(n, generator=torch_generator(0, "timestep", step, pack.pack), dtype=torch.float64)
            t = torch.sigmoid(normal).float()
            drop = torch.from_numpy(bernoulli(n, 0.1, 0, "label drop", step, pack.pack))
            t_of_token = t[batch.layout.segment_ids][:, None]
            x = (1 - t_of_token) * batch.tokens + t_of_token * noise
            predicted = model(x, t, torch.where(drop, 8, batch.labels), batch.layout)
            loss = ((predicted - (noise - batch.tokens)) ** 2).mean(1).sum() / total
            loss.backward()
            loss_of_step += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.9, (1 + step) / (10 + step))
        for name, p in model.named_parameters():
            averaged[name].lerp_(p.detach(), 1 - decay)
        line = metrics(undisturbed)[step]
        assert line["loss"] == pytest.approx(loss_of_step, rel=1e-5)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    ema = published(undisturbed / "checkpoints")[-1].weights()
    for name, expected in averaged.items():
        torch.testing.assert_close(ema[name], expected, rtol=1e-4, atol=1e-6)


def test_two_ranks_under_torchrun_see_the_same_packs_and_losses_as_one(undisturbed, shapes_dataset, tmp_path):
    """A run on two ranks with a loader process each, as a cluster would start it."""
    config = tiny_run(tmp_path / "run", shapes_dataset, "data.workers=1")
    (tmp_path / "run.yaml").write_text(to_yaml(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*command, "-m", "nitscale", "train", str(tmp_path / "run.yaml")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    for ours, theirs in zip(metrics(tmp_path / "run"), metrics(undisturbed), strict=True):
        assert ours["data_digest"] == theirs["data_digest"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    ours = published(tmp_path / "run" / "checkpoints")[-1].weights()
    for name, theirs in published(undisturbed / "checkpoints")[-1].weights().items():
        torch.testing.assert_close(ours[name], theirs, rtol=1e-4, atol=1e-6)


def test_the_log_line_holds_what_the_documentation_promises(undisturbed):
    line = metrics(undisturbed)[-1]
    promised = "step tokens images loss loss_t0 loss_t3 grad_norm lr tokens_per_s mfu fill imbalance_predicted"
    promised += " imbalance_observed data_wait memory_gib data_digest"
    assert set(promised.split()) <= line.keys()
    assert line["step"] == 8 and line["tokens"] > 0 and 0.5 < line["fill"] <= 1
    assert list((undisturbed / "tensorboard").iterdir())


def test_resuming_with_other_data_parameters_is_refused_with_the_differing_field(undisturbed, shapes_dataset):
    with pytest.raises(UserError, match="token_budget is 80, was 64"):
        train(tiny_run(undisturbed, shapes_dataset, "data.token_budget=80", "train.steps=9"))


def test_a_model_that_does_not_fit_the_data_is_refused(shapes_dataset, tmp_path):
    with pytest.raises(UserError, match=r"in_channels=16.* 32 channels"):
        train(tiny_run(tmp_path, shapes_dataset, "model.in_channels=16"))
    with pytest.raises(UserError, match=r"num_classes=3.* 8 classes"):
        train(tiny_run(tmp_path, shapes_dataset, "model.num_classes=3"))


def test_a_token_budget_smaller_than_an_image_is_refused_by_name(shapes_dataset, tmp_path):
    with pytest.raises(UserError, match=r"packing: image '.*' has 16 tokens, more than token_budget=8"):
        train(tiny_run(tmp_path, shapes_dataset, "data.token_budget=8"))


def test_two_trainings_at_once_in_one_folder_are_refused(undisturbed, shapes_dataset):
    from nitscale.files import exclusive_lock

    with exclusive_lock(undisturbed / ".lock", "training"), pytest.raises(UserError, match="already training"):
        train(tiny_run(undisturbed, shapes_dataset))


def test_an_unreadable_sample_keeps_its_place_and_is_listed(undisturbed, shapes_dataset, tmp_path):
    broken = tmp_path / "data"
    shutil.copytree(shapes_dataset, broken)
    damage(broken, load_dataset(broken), 5)
    assert train(tiny_run(tmp_path / "run", broken))
    ours, theirs = metrics(tmp_path / "run"), metrics(undisturbed)
    assert [m["data_digest"] for m in ours] == [m["data_digest"] for m in theirs]
    ledger = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert {entry["sample"] for entry in ledger} == {5}
    assert "checksum" in ledger[0]["reason"]
    for checkpoint in published(tmp_path / "run" / "checkpoints"):
        saved = (checkpoint.folder / "quarantine.jsonl").read_text()
        assert [json.loads(line) for line in saved.splitlines()] == [e for e in ledger if e["step"] < checkpoint.step]


def test_the_ledger_goes_back_to_the_checkpoint_that_a_run_goes_on_from(shapes_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("nitscale.data.loader.RETRY_DELAYS", ())
    broken, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(shapes_dataset, broken)
    for sample in range(0, 64, 9):
        damage(broken, load_dataset(broken), sample)
    assert train(tiny_run(run, broken))
    ledger = (run / "quarantine.jsonl").read_text()
    shutil.rmtree(run / "checkpoints" / "step-00000008")
    assert train(tiny_run(run, broken))
    assert (run / "quarantine.jsonl").read_text() == ledger
    assert len(ledger.splitlines()) > 4


def test_a_data_set_that_cannot_be_read_stops_the_run(shapes_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("nitscale.data.loader.RETRY_DELAYS", ())
    shutil.copytree(shapes_dataset, tmp_path / "data")
    for shard in (tmp_path / "data" / "shards").iterdir():
        shard.write_bytes(b"x" * shard.stat().st_size)
    with pytest.raises(UserError, match=r"images could not be read, see .*quarantine\.jsonl"):
        train(tiny_run(tmp_path / "run", tmp_path / "data"))
    assert not published(tmp_path / "run" / "checkpoints")


def test_a_loss_that_is_not_finite_stops_the_run_before_a_checkpoint(shapes_dataset, tmp_path):
    with pytest.raises(UserError, match=r"gradients of the last 1\d steps to step 1\d were not finite; what .* Lower"):
        train(tiny_run(tmp_path, shapes_dataset, "optimizer.lr=1e30", "train.steps=20"))
    assert not published(tmp_path / "checkpoints")
    assert [line["skipped"] for line in metrics(tmp_path)][:3] == [0, 1, 1]
    assert metrics(tmp_path)[1]["loss"] is None
