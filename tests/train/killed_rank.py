"""What test_two_ranks.py runs under torchrun: a training of which rank 1 is killed in the sixth step.

killed_rank.py DATASET RUN
"""

import os
import signal
import sys
from pathlib import Path

from nitscale.train.loop import Trainer
from nitscale.train.process import start_process
from tests.train.tiny import tiny_run

process = start_process()
trainer = Trainer(tiny_run(Path(sys.argv[2]), Path(sys.argv[1]), "engine.zero_stage=0"), process)
micro_step = trainer.micro_step


def micro_step_or_death(*arguments, **options):
    if process.rank == 1 and trainer.step == 5:
        trainer.checkpointer.wait()  # of step 4
        os.kill(os.getpid(), signal.SIGKILL)
    return micro_step(*arguments, **options)


trainer.micro_step = micro_step_or_death  # type: ignore[method-assign]
trainer.train()
