"""The configuration: layers, types, and messages that name the key, its file and the way out."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import torch

from nitscale.config import load_config, to_yaml
from nitscale.errors import UserError
from nitscale.models.transformer import PackedTransformer
from nitscale.train.config import RunConfig

CONFIGS = Path(__file__).parents[1] / "configs"


@dataclass(frozen=True)
class Inner:
    size: int = 1
    rate: float = 0.5
    kind: Literal["plain", "fancy"] = "plain"
    pair: tuple[float, float] = (0.9, 0.99)
    limit: int | None = None


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner = field(default_factory=Inner)


def test_overrides_win_over_the_file_and_the_file_over_its_base(tmp_path):
    (tmp_path / "base.yaml").write_text("name: base\ninner: {size: 2, rate: 1e-4, limit: 5}\n")
    (tmp_path / "run.yaml").write_text("base: base.yaml\nname: run\ninner: {size: 3}\n")
    config = load_config(Outer, tmp_path / "run.yaml", ["inner.size=4", "inner.pair=[0.5,0.6]", "inner.limit=null"])
    assert config == Outer("run", Inner(size=4, rate=1e-4, pair=(0.5, 0.6), limit=None))


def test_the_resolved_configuration_loads_as_itself(tmp_path):
    config = Outer("run", Inner(kind="fancy", limit=3))
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert load_config(Outer, tmp_path / "resolved.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("inner.szie=3", "unknown key 'inner.szie' in override 'inner.szie=3'; did you mean 'inner.size'"),
        ("inner.size=three", "'inner.size' in override 'inner.size=three' must be a whole number, got 'three'"),
        ("inner.size=2.5", "must be a whole number"),
        ("inner.size=true", "must be a whole number"),
        ("inner.kind=fanzy", "one of: plain, fancy, got 'fanzy'; did you mean 'fancy'"),
        ("inner.pair=[1]", "a list of 2 values"),
        ("inner.pair=[1,x]", r"'inner.pair\[1\]' .* must be a number"),
        ("inner=3", "a section with keys of its own"),
        ("inner.size", "not of the form key=value"),
    ],
)
def test_a_wrong_override_is_named(override, message):
    with pytest.raises(UserError, match=message):
        load_config(Outer, None, ["name=x", override])


def test_an_unknown_key_in_a_base_names_the_base_file(tmp_path):
    (tmp_path / "base.yaml").write_text("nmae: base\n")
    (tmp_path / "run.yaml").write_text("base: base.yaml\nname: run\n")
    with pytest.raises(UserError, match=r"unknown key 'nmae' in .*base\.yaml; did you mean 'name'"):
        load_config(Outer, tmp_path / "run.yaml")


def test_missing_files_broken_yaml_and_circles_are_named(tmp_path):
    with pytest.raises(UserError, match=r"no file .*absent\.yaml"):
        load_config(Outer, tmp_path / "absent.yaml")
    (tmp_path / "broken.yaml").write_text("name: [\n")
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(Outer, tmp_path / "broken.yaml")
    (tmp_path / "circle.yaml").write_text("base: circle.yaml\nname: x\n")
    with pytest.raises(UserError, match="its own base"):
        load_config(Outer, tmp_path / "circle.yaml")
    with pytest.raises(UserError, match="'name' is not set"):
        load_config(Outer, None)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads_and_its_model_is_built_on_the_meta_device(path):
    config = load_config(RunConfig, path)
    with torch.device("meta"):
        model = PackedTransformer(config.model)
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters == {"nit_xl_imagenet": 674_861_216}.get(path.stem, parameters)
    with pytest.raises(UserError, match="unknown key"):
        load_config(RunConfig, path, ["train.nonsense=1"])
