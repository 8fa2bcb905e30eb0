"""What test_observed_ranks.py runs under torchrun: validation and previews of one model, spread in several ways.

observed_ranks.py DATASET FOLDER
"""

import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from nitscale.data.manifest import load_dataset
from nitscale.flow.sampling import SamplerConfig
from nitscale.models.transformer import ModelConfig, PackedTransformer
from nitscale.train.engine import EngineConfig, OptimizerConfig, build_engine
from nitscale.train.preview import PreviewConfig, Previewer
from nitscale.train.process import Process, leave_process, start_process
from nitscale.train.validation import ValidationConfig, Validator
from tests.models.tiny import NIT
from tests.train.matrix import lively

MODEL = ModelConfig(**{**NIT, "in_channels": 32, "num_classes": 8})
PREVIEW = PreviewConfig(sizes=((32, 48), (64, 32)), classes=(1, 5), sampling=SamplerConfig(steps=2, guidance=2.0))

process = start_process()
dataset, folder = load_dataset(sys.argv[1]), Path(sys.argv[2])
alone = Process(0, 1, torch.device("cpu"))


def observers(among: Process) -> tuple[Validator, Previewer]:
    held = Validator(
        ValidationConfig(path="heldout", images=23, bands=2),
        dataset, dataset.manifest, MODEL, among, seed=5, token_budget=64,
    )  # fmt: skip
    return held, Previewer(PREVIEW, dataset.manifest, MODEL, among, folder)


plain = PackedTransformer(MODEL)
lively(plain, 1)
validator, previewer = observers(alone)
losses, latents = validator.run(plain), previewer.sample(plain)

for zero_stage, tensor_parallel in ((3, 1), (1, 2), (0, 1)):
    spread = process.spread(tensor_parallel)
    config = EngineConfig(zero_stage=zero_stage, tensor_parallel=tensor_parallel)
    with patch.object(PackedTransformer, "initialize", lively):
        engine = build_engine(MODEL, 1, OptimizerConfig(), config, spread, accumulation=1)
    validator, previewer = observers(spread)
    batch = validator.batches[0]
    arguments = (batch.tokens.float(), torch.full((len(batch.labels),), 0.5), batch.labels, batch.layout)
    for lr in (0.0, 1e-3):  # what is observed must not be in the way of the steps before and after
        assert validator.run(engine.forward) == pytest.approx(losses, rel=1e-6)
        for ours, theirs in zip(previewer.sample(engine.forward), latents, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        sheet = previewer.draw(1, engine.forward)
        assert (sheet is not None) == process.is_main
        engine.backward(engine.forward(*arguments).square().mean())
        engine.step(lr)
    assert bool(engine.finite) and float(engine.grad_norm) > 0
    assert validator.run(engine.forward) != pytest.approx(losses, rel=1e-3)

if process.is_main:
    (folder / "passed").write_text("all cases")
leave_process()
