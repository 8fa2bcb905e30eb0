"""What test_two_ranks.py runs under torchrun: several cases in one start of two processes.

two_ranks.py DATASET FOLDER
"""

import sys
from pathlib import Path

import pytest

from nitscale.checkpoints import published
from nitscale.errors import UserError
from nitscale.train import checkpoint
from nitscale.train.loop import Trainer, run_training
from nitscale.train.process import leave_process, start_process
from tests.train.tiny import differences, final_state, tiny_run

process = start_process()
dataset, folder = Path(sys.argv[1]), Path(sys.argv[2])


def check(condition: bool, words: str) -> None:
    """All ranks fail, with rank 0's words, if the condition does not hold on rank 0."""
    process.decide(lambda: None if condition or not process.is_main else pytest.fail(words))


for stage in (1, 2):
    option = f"engine.zero_stage={stage}"
    whole, halves = folder / f"whole{stage}", folder / f"halves{stage}"
    assert run_training(tiny_run(whole, dataset, option), process)

    # A stop that only rank 1 was asked for ends both, after the same step.
    trainer = Trainer(tiny_run(halves, dataset, option, "data.workers=1"), process)
    step = trainer.train_step

    def step_and_ask(packs, trainer=trainer, step=step):
        line = step(packs)
        if process.rank == 1 and trainer.step == 3:
            trainer.signals.name = "SIGTERM"
        return line

    trainer.train_step = step_and_ask
    assert not trainer.train()
    check(published(halves / "checkpoints")[-1].step == 3, "stopped after another step")
    assert run_training(tiny_run(halves, dataset, option), process)
    check(differences(final_state(whole), final_state(halves)) == [], "a resumed run on two ranks differs")

# A file that one rank cannot write is an error of both, and leaves what was published.
trainer = Trainer(tiny_run(folder / "whole1", dataset, "train.steps=12"), process)
if process.rank == 1:

    def refuse(*arguments):
        raise OSError(28, "No space left on device")

    checkpoint.write_tensors = refuse
with pytest.raises(UserError, match="disk is full" if process.rank == 1 else "rank 1: .*disk is full"):
    trainer.train()
check([c.step for c in published(folder / "whole1" / "checkpoints")] == [4, 8], "a checkpoint was lost or half written")

# A lock that rank 0 cannot get is an error of both.
process.decide(lambda: (folder / "locked" / ".lock").mkdir(parents=True))
with pytest.raises(UserError, match=r"\.lock"):
    run_training(tiny_run(folder / "locked", dataset), process)

if process.is_main:
    (folder / "passed").write_text("all cases")
leave_process()
