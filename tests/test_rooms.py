"""The house: a lower room never imports a higher one, and each library with quirks has one file."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = [
    "nitscale.__main__",
    "nitscale.cli",
    "nitscale.demo",
    "nitscale.train",
    "nitscale.generate",
    "nitscale.evaluate",
    "data_prep",
    "nitscale.flow",
    "nitscale.models",
    "nitscale.data",
    "nitscale.autoencoders",
    "nitscale.encoders",
    "nitscale.dct",
    "nitscale.checkpoints",
    "nitscale.slices",
    "nitscale.layout",
    "nitscale.randomness",
    "nitscale.config",
    "nitscale.pictures",
    "nitscale.files",
    "nitscale.errors",
]
"""From the top of the house to its cellar."""
NEIGHBOURS = {
    ("nitscale.train", "nitscale.generate"),
    ("nitscale.models", "nitscale.data"),
    ("nitscale.flow", "nitscale.models"),
}
"""Rooms beside each other: neither imports the other."""
OWNERS = {
    "deepspeed": "nitscale/train/engine.py",
    "megatron": "nitscale/models/parallel.py",
    "boto3": "nitscale/data/storage.py",
    "transformers": "nitscale/encoders.py",
}


def room_of(module: str) -> int | None:
    names = [i for i, room in enumerate(ROOMS) if module == room or module.startswith(room + ".")]
    return names[0] if names else None


def imports() -> list[tuple[Path, str]]:
    """(file, imported module) of every import in the package, also of those inside functions."""
    found = []
    for path in [*ROOT.glob("nitscale/**/*.py"), *ROOT.glob("data_prep/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found += [(path.relative_to(ROOT), alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.append((path.relative_to(ROOT), node.module))
    return found


def test_every_import_points_down_the_house() -> None:
    wrong = []
    for path, module in imports():
        here, there = room_of(".".join(path.with_suffix("").parts)), room_of(module)
        if here is None or there is None:
            continue
        if there < here or (ROOMS[here], ROOMS[there]) in NEIGHBOURS:
            wrong.append(f"{path} imports {module}")
    assert not wrong
    assert len(imports()) > 200


def test_libraries_with_quirks_are_imported_in_one_file() -> None:
    for path, module in imports():
        owner = OWNERS.get(module.split(".")[0])
        assert owner is None or str(path) == owner, f"{path} imports {module}; {owner} is its place"
