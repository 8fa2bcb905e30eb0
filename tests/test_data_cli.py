import json

import pytest
from typer.testing import CliRunner

from nitscale.cli import app
from nitscale.errors import UserError
from tests.train.tiny import metrics


def run(*arguments):
    return CliRunner().invoke(app, ["data", *map(str, arguments)], catch_exceptions=False).stdout


def test_a_plan_of_sizes_is_one_json_line(tmp_path):
    table = tmp_path / "sizes.csv"
    table.write_text("width,height,count\n500,375,80\n375,500,10\n200,100,5\n64,32,5\n2000,1500,1\n")
    options = ("--sizes", table, "--images", 20000, "--world-size", 4, "--packs-per-rank", 2, "--json")
    report = json.loads(run("plan", *options, "--packer", "balanced"))
    assert (report["images"], report["packs_per_step"], report["world_size"]) == (20000, 8, 4)
    assert report["fill"] > 0.99
    assert 1 <= report["imbalance"] < 1.01
    assert report["steps"] == -(-report["packs"] // 8)
    assert {"entropy", "seconds"} < report.keys()
    assert json.loads(run("plan", *options, "--packer", "lpfhp"))["imbalance"] > report["imbalance"]


def test_a_plan_of_a_dataset_is_told_in_words(shapes_dataset):
    words = run("plan", "--data", shapes_dataset, "--token-budget", 64, "--world-size", 2)
    assert "64 of " in words
    assert "shards fetched an epoch" in words


@pytest.mark.parametrize("options", [(), ("--data", "somewhere", "--sizes", "some.csv")])
def test_a_plan_is_of_either_a_dataset_or_sizes(options):
    with pytest.raises(UserError, match="either --data PREFIX or --sizes"):
        run("plan", *options)


def test_digests_are_those_that_a_run_has_logged(trained_run):
    lines = run("digest", trained_run / "config.yaml", "--steps", "2..8").splitlines()[1:]
    logged = metrics(trained_run)
    assert [line.split()[0] for line in lines] == [str(step) for step in range(2, 8)]
    assert [line.split()[2] for line in lines] == [line["data_digest"] for line in logged[2:8]]


@pytest.mark.parametrize("steps", ["5..5", "7..2", "100", "a..b"])
def test_steps_that_cannot_be_are_refused(trained_run, steps):
    with pytest.raises(UserError, match=r"must be two numbers, e\.g\. 0\.\.1000"):
        run("digest", trained_run / "config.yaml", "--steps", steps)
