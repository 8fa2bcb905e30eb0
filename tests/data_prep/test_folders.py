import os

import pytest

from data_prep.folders import find_images
from nitscale.errors import UserError


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return root


def test_sub_folders_are_classes_sorted_by_name(tmp_path):
    folder = find_images(touch(tmp_path, "dog/b.JPEG", "dog/a.png", "cat/deep/er/c.webp", "cat/a.jpg"))
    assert folder.classes == ("cat", "dog")
    assert [(image.name, image.label) for image in folder.images] == [
        ("cat/a.jpg", 0),
        ("cat/deep/er/c.webp", 0),
        ("dog/a.png", 1),
        ("dog/b.JPEG", 1),
    ]


def test_a_folder_without_sub_folders_is_one_class_of_its_name(tmp_path):
    folder = find_images(touch(tmp_path / "photos", "a.jpg", "b.jpg"))
    assert folder.classes == ("photos",)
    assert [image.label for image in folder.images] == [0, 0]


def test_other_files_are_counted_and_hidden_ones_passed_over(tmp_path):
    folder = find_images(
        touch(tmp_path, "a/1.jpg", "a/notes.txt", "a/2.HEIC", "a/.3.jpg", ".thumbnails/1.jpg", "README")
    )
    assert [image.name for image in folder.images] == ["a/1.jpg"]
    assert folder.ignored == {".txt": 1, ".heic": 1, "without suffix": 1}


def test_keys_have_no_dots_and_are_unique(tmp_path):
    names = ["a/x.jpg", "a/x.png", "a/x.y.jpg", "a/x_y.jpg", "a b/über.jpg", "a/x-2.jpg"]
    keys = [image.key for image in find_images(touch(tmp_path, *names)).images]
    assert len(set(keys)) == len(names)
    assert not any("." in key for key in keys)
    assert "a_b/über" in keys


def test_names_that_are_not_utf_8_are_readable(tmp_path):
    folder = touch(tmp_path, "a/ok.jpg")
    open(os.path.join(os.fsencode(folder), b"a", b"bad\xff.jpg"), "wb").close()
    names = [image.name for image in find_images(folder).images]
    assert names == ["a/bad?.jpg", "a/ok.jpg"]


def test_the_digest_tells_another_set_of_images_from_this_one(tmp_path):
    digest = find_images(touch(tmp_path, "a/1.jpg", "a/2.jpg")).digest()
    assert find_images(tmp_path).digest() == digest
    (tmp_path / "a" / "2.jpg").write_bytes(b"longer")
    changed = find_images(tmp_path).digest()
    touch(tmp_path, "a/3.jpg")
    assert len({digest, changed, find_images(tmp_path).digest()}) == 3


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"no \.jpg, .* below .* \(found nothing\)"),
        (["a/x.gif", "a/y.gif", "b/z.txt"], r"found 2 \.gif, 1 \.txt"),
        (["a/x.jpg", "b/y.txt"], r"class folder .*b has no image"),
        (["a/x.jpg", "y.jpg"], r"images of its own \(such as y\.jpg\) beside class folders \(such as a\)"),
    ],
)
def test_a_folder_that_is_no_image_set_is_refused_with_the_reason(tmp_path, names, message):
    with pytest.raises(UserError, match=message):
        find_images(touch(tmp_path, *names))


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        find_images(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file is not a folder"):
        find_images(tmp_path / "file")


def test_links_to_nowhere_and_special_files_are_no_images(tmp_path):
    touch(tmp_path, "a/1.jpg")
    (tmp_path / "a" / "2.jpg").symlink_to(tmp_path / "nowhere.jpg")
    os.mkfifo(tmp_path / "a" / "3.jpg")
    assert [image.name for image in find_images(tmp_path).images] == ["a/1.jpg"]
