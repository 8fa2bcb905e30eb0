import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from nitscale.data.overview import inspect_dataset
from nitscale.errors import UserError


def pictures(folder):
    return sorted(path.name for path in folder.glob("*.png"))


def test_a_dataset_is_shown_as_a_table_and_four_pictures(shapes_dataset, tmp_path):
    words = inspect_dataset(shapes_dataset, tmp_path / "out")
    assert re.search(r"samples +64\n", words)
    assert re.search(r"classes +8 of 8 to 8 samples", words)
    assert pictures(tmp_path / "out") == ["classes.png", "images.png", "sizes.png", "tokens.png"]
    page = (tmp_path / "out" / "index.html").read_text()
    assert all(f'src="{name}"' in page for name in pictures(tmp_path / "out"))
    assert "http" not in page
    for name in pictures(tmp_path / "out"):
        with Image.open(tmp_path / "out" / name) as image:
            assert np.asarray(image.convert("L")).std() > 5  # something is on it


def test_without_its_codec_a_dataset_is_shown_without_images(shapes_dataset, tmp_path):
    folder = shutil.copytree(shapes_dataset, tmp_path / "set")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["codec"]["id"] = "<b>unheard of"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    words = inspect_dataset(folder, tmp_path / "out")
    assert "thumbnails  none: autoencoders: this build knows" in words
    assert "images.png" not in pictures(tmp_path / "out")
    assert "<b>" not in (tmp_path / "out" / "index.html").read_text()


def test_what_is_no_dataset_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no dataset"):
        inspect_dataset(tmp_path, tmp_path / "out")
