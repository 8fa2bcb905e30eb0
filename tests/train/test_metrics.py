"""What rank 0 writes down: lines of each kind, pictures, and what a resumed run takes back."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nitscale.train.metrics import MetricsWriter
from nitscale.train.process import Process

PROCESS = Process(0, 1, torch.device("cpu"))


def lines(path: Path) -> list[dict]:
    return [json.loads(text) for text in path.read_text().splitlines()]


def board(run: Path) -> EventAccumulator:
    return EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0}).Reload()


def test_lines_of_each_kind_have_their_own_file_and_tags(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, PROCESS, 0, 10)
    writer.write({"step": 1, "loss": 0.5, "tokens_per_s": 10.0})
    writer.write({"step": 1, "loss": 0.7, "loss_tokens_129-256": 0.6}, "validation")
    writer.close()
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5, "tokens_per_s": 10.0}]
    assert lines(tmp_path / "validation.jsonl") == [{"step": 1, "loss": 0.7, "loss_tokens_129-256": 0.6}]
    tags = board(tmp_path).Tags()["scalars"]
    assert {"train/loss", "validation/loss", "validation/loss_tokens_129-256"} <= set(tags)


def test_numbers_that_json_does_not_have_are_null(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, PROCESS, 0, 10)
    writer.write({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "tokens_per_s": 1.0})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 1, "loss": null, "grad_norm": null, "tokens_per_s": 1.0}\n'
    )


def test_a_picture_is_in_tensorboard_pixel_for_pixel(tmp_path: Path) -> None:
    pixels = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    writer = MetricsWriter(tmp_path, PROCESS, 0, 10)
    writer.add_image("preview", Image.fromarray(pixels), 4)
    writer.close()
    (event,) = board(tmp_path).Images("preview")
    (tmp_path / "found.png").write_bytes(event.encoded_image_string)
    assert event.step == 4 and (np.asarray(Image.open(tmp_path / "found.png")) == pixels).all()


def test_a_resumed_run_takes_back_the_lines_of_steps_that_come_again(tmp_path: Path) -> None:
    for kind in ("metrics", "validation"):
        (tmp_path / f"{kind}.jsonl").write_text('{"step": 4}\n{"step": 8}\n{"ste')
    MetricsWriter(tmp_path, PROCESS, 4, 10).close()
    for kind in ("metrics", "validation"):
        assert lines(tmp_path / f"{kind}.jsonl") == [{"step": 4}]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, Process(1, 2, torch.device("cpu")), 0, 10)
    writer.write({"step": 1, "loss": 0.5, "tokens_per_s": 10.0})
    writer.add_image("preview", Image.new("RGB", (2, 2)), 1)
    writer.close()
    assert list(tmp_path.iterdir()) == []
