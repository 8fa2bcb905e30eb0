import json
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import catalogs
from data_prep.items import OversizedImage
from data_prep.sources import open_source
from nitscale.data.storage import LocalStorage, open_storage
from nitscale.errors import UserError
from tests.data.faults import s3_behind_faults
from tests.data_prep.pictures import make_folder, write_tar


def everything(source, images=3):
    """All items of all partitions, in order."""
    return [item for partition in source.partitions(images) for item in source.items(partition)]


def contents(source):
    return {item.name: (item.label, item.read()) for item in everything(source)}


class Remote:
    """A folder that takes itself for an object store."""

    def __init__(self, folder):
        self.local, self.downloads, self.reads = LocalStorage(str(folder)), [], []
        self.prefix = f"s3://bucket/{folder.name}"

    def __getattr__(self, name):
        return getattr(self.local, name)

    def read_range(self, name, offset, length):
        self.reads.append(length)
        return self.local.read_range(name, offset, length)

    def download(self, name, path, size, sha256=None):
        self.downloads.append(name)
        self.local.download(name, path, size, sha256)


CLASSES = {"n01440764": 3, "n01443537": 2, "n02084071": 4}


@pytest.fixture
def class_tars(tmp_path):
    """ImageNet's class tars, in a folder; the images are a few bytes of their name."""
    for wordnet_id, count in CLASSES.items():
        members = [(f"{wordnet_id}_{i}.JPEG", f"{wordnet_id}/{i}".encode()) for i in range(count)]
        write_tar(tmp_path / "classes" / f"{wordnet_id}.tar", [*members, ("notes.txt", b"no image")])
    return tmp_path / "classes"


@pytest.fixture
def imagenet(class_tars):
    """The tar of class tars."""
    tars = sorted(class_tars.iterdir(), reverse=True)
    return write_tar(class_tars.parent / "train.tar", [(tar.name, tar.read_bytes()) for tar in tars])


EXPECTED = {
    f"{wordnet_id}/{wordnet_id}_{i}.JPEG": (label, f"{wordnet_id}/{i}".encode())
    for label, (wordnet_id, count) in enumerate(CLASSES.items())
    for i in range(count)
}


def test_a_tar_of_class_tars_and_a_folder_of_them_give_the_same_images(imagenet, class_tars):
    for source in (open_source(imagenet), open_source(class_tars), open_source(class_tars, "imagenet")):
        assert source.classes == tuple(CLASSES)
        assert contents(source) == EXPECTED
        assert source.ignored == {".txt": 3}
    assert open_source(imagenet).digest == open_source(class_tars).digest


def test_extracted_imagenet_is_a_folder_of_classes(class_tars, tmp_path):
    for tar in class_tars.iterdir():
        with tarfile.open(tar) as file:
            file.extractall(tmp_path / "extracted" / tar.stem, filter="data")
    source = open_source(tmp_path / "extracted", "imagenet")
    assert source.classes == tuple(CLASSES)
    assert contents(source) == EXPECTED


def test_partitions_mix_the_classes_and_hold_every_image_once(imagenet):
    source = open_source(imagenet)
    partitions = source.partitions(4)
    assert [(p.name, p.num_images) for p in partitions] == [("000000", 4), ("000001", 4), ("000002", 1)]
    labels = [item.label for item in source.items(partitions[0])]
    assert len(set(labels)) > 1
    items = everything(source)
    assert sorted(item.name for item in items) == sorted(EXPECTED)
    assert len({item.key for item in items}) == len(items)
    assert not any("." in item.key for item in items)
    assert [item.name for item in everything(open_source(imagenet))] == [item.name for item in items]


def test_a_catalog_spares_the_scan(imagenet, monkeypatch):
    catalog = open_source(imagenet).catalog.to_bytes()
    monkeypatch.setattr("data_prep.sources.scan_class_tars", pytest.fail)
    assert contents(open_source(imagenet, catalog=catalog, kind="imagenet")) == EXPECTED


@pytest.mark.parametrize("change", [lambda c: c[:-40], lambda c: b"", lambda c: c.replace(b"train.tar", b"other.tar")])
def test_a_catalog_of_other_tars_is_refused(imagenet, change):
    catalog = open_source(imagenet).catalog.to_bytes()
    with pytest.raises(UserError, match="catalog of the source is damaged or of other tars"):
        open_source(imagenet, catalog=change(catalog))


def test_a_catalog_of_tars_that_have_changed_is_refused(class_tars):
    catalog = open_source(class_tars).catalog.to_bytes()
    write_tar(class_tars / "n03000000.tar", [("a.JPEG", b"new")])
    with pytest.raises(UserError, match="the tars have other names or sizes"):
        open_source(class_tars, catalog=catalog)


@pytest.mark.parametrize(
    ("column", "value"), [("offset", -512), ("offset", 10**9), ("label", 3), ("label", -1), ("object_of", -1)]
)
def test_a_catalog_that_points_outside_is_refused(imagenet, column, value):
    catalog = open_source(imagenet).catalog
    getattr(catalog, column)[-1] = value
    with pytest.raises(UserError, match="its columns do not agree"):
        open_source(imagenet, catalog=catalog.to_bytes())


def test_a_catalog_keeps_all_that_was_found(imagenet, class_tars):
    write_tar(class_tars / "n01440764.tar", [("a\nb/c\n.JPEG", b"1"), ("a.JPEG", b"2"), ("a.JPEG", b"3")])
    source = open_source(class_tars)
    again = open_source(class_tars, catalog=source.catalog.to_bytes())
    assert everything(again, 2)[0].name == everything(source, 2)[0].name
    assert [item.key for item in everything(again)] == [item.key for item in everything(source)]
    assert (again.digest, again.ignored, again.classes) == (source.digest, source.ignored, source.classes)
    assert {b"1", b"2", b"3"} < {item.read() for item in everything(again)}


def test_scanning_reads_headers_alone_of_a_local_tar_and_few_ranges_of_a_remote_one(class_tars):
    for path in class_tars.iterdir():
        write_tar(path, [(f"{i}.JPEG", bytes(100_000)) for i in range(10)])
    tars = {path.name: path.stat().st_size for path in sorted(class_tars.iterdir())}
    local, remote = Remote(class_tars), Remote(class_tars)
    local.prefix = str(class_tars)
    assert catalogs.scan_class_tars(local, tars).length.tolist() == [100_000] * 30
    assert sum(local.reads) < 0.1 * sum(tars.values())
    assert (
        catalogs.scan_class_tars(remote, tars).offset.tolist() == catalogs.scan_class_tars(local, tars).offset.tolist()
    )
    assert len(remote.reads) <= 6


@pytest.mark.parametrize("name", ["ILSVRC2012_img_val.tar", "n0144076.tar"])
def test_a_tar_that_is_not_of_a_class_is_named(class_tars, name):
    write_tar(class_tars / name, [("a.JPEG", b"1")])
    with pytest.raises(UserError, match=rf"has {name}, which is no tar of an ImageNet class"):
        open_source(class_tars, "imagenet")


def test_a_class_without_images_is_named(class_tars):
    write_tar(class_tars / "n01440764.tar", [("a.txt", b"1")])
    with pytest.raises(UserError, match=r"tar of class n01440764 in .* has no image"):
        open_source(class_tars)


def test_a_folder_of_images_is_a_source(tmp_path):
    folder = make_folder(tmp_path / "images")
    source = open_source(folder)
    assert source.classes == ("class-0", "class-1")
    assert contents(source) == {
        path.relative_to(folder).as_posix(): (int(path.parent.name[-1]), path.read_bytes())
        for path in folder.rglob("*.*")
    }


def test_a_prefix_of_images_is_a_source(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "images")
    (folder / "class-0" / "notes.txt").write_text("x")
    remote = Remote(folder)
    monkeypatch.setattr("data_prep.sources.open_storage", lambda uri: remote)
    source = open_source("s3://bucket/images")
    assert (source.classes, source.ignored) == (("class-0", "class-1"), {".txt": 1})
    (folder / "class-0" / "notes.txt").unlink()
    assert contents(source) == contents(open_source(folder))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"no \.jpg, .* below .* \(found nothing\)"),
        (["a/x.gif", "a/y.gif", "b/z.txt"], r"found 2 \.gif, 1 \.txt"),
        (["a/x.jpg", "b/y.txt"], r"class folder .*b has no image"),
        (["a/x.jpg", "y.jpg"], r"images of its own \(such as y\.jpg\) beside class folders"),
    ],
)
def test_a_prefix_that_is_no_image_set_is_refused_as_a_folder_is(tmp_path, monkeypatch, names, message):
    for name in names:
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / name).write_bytes(b"x")
    (tmp_path / "images").mkdir(exist_ok=True)
    monkeypatch.setattr("data_prep.sources.open_storage", lambda uri: Remote(tmp_path / "images"))
    for uri in ("s3://bucket/images", tmp_path / "images"):
        with pytest.raises(UserError, match=message):
            open_source(uri, "folder")


def test_images_that_lie_loose_are_one_class_of_the_name_of_their_folder_or_prefix(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"x")
    assert open_source(tmp_path / "photos").classes == ("photos",)
    monkeypatch.setattr("data_prep.sources.open_storage", lambda uri: Remote(tmp_path / "photos"))
    assert open_source("s3://bucket/photos/").classes == ("photos",)


def test_tars_beside_images_are_taken_for_neither(class_tars):
    (class_tars / "photo.jpg").write_bytes(b"x")
    with pytest.raises(UserError, match=r"both tars \(such as n01440764\.tar\) and images \(such as photo\.jpg\)"):
        open_source(class_tars)
    assert len(everything(open_source(class_tars, "imagenet"))) == len(EXPECTED)
    assert [item.name for item in everything(open_source(class_tars, "folder"))] == ["photo.jpg"]


def test_tars_without_images_are_refused_with_what_they_hold(tmp_path):
    write_tar(tmp_path / "latents" / "0.tar", [("0.latent.npy", b"x"), ("0.json", b"{}")])
    with pytest.raises(UserError, match=r"no image is among the first members of 0\.tar \(0\.latent\.npy, 0\.json\)"):
        open_source(tmp_path / "latents")


@pytest.fixture
def sa1b(tmp_path):
    for number in range(2):
        members = []
        for i in range(number * 3, number * 3 + 3):
            about = json.dumps({"image": {"image_id": i}, "annotations": []}).encode()
            members += [(f"./sa_{i}.jpg", f"image {i}".encode()), (f"./sa_{i}.json", about)]
        write_tar(tmp_path / "sa1b" / f"sa_{number:06d}.tar", members)
    return tmp_path / "sa1b"


def test_sa1b_is_read_tar_by_tar_with_captions_by_image_id(sa1b, tmp_path):
    (tmp_path / "captions.jsonl").write_text(
        "".join(f'{{"image_id": {i}, "caption": "text {i}"}}\n' for i in (0, 1, 4))
    )
    source = open_source(sa1b, captions=tmp_path / "captions.jsonl")
    assert source.classes == ("image",)
    partitions = source.partitions(1000)
    assert [p.name for p in partitions] == ["sa_000000", "sa_000001"]
    items = everything(source)
    assert [item.read() for item in items] == [f"image {i}".encode() for i in range(6)]
    assert [item.text for item in items] == ["text 0", "text 1", "", "", "text 4", ""]
    assert len({item.key for item in items}) == 6
    assert open_source(sa1b).items(partitions[0]).__next__().text is None


def test_the_image_id_stands_in_the_json_where_the_name_has_none(tmp_path):
    about = json.dumps({"image": {"image_id": 3}}).encode()
    members = [("sa_1.jpg", b"1"), ("sa_1.json", b"["), ("x.jpg", b"3"), ("x.json", about), ("y.jpg", b"none")]
    write_tar(tmp_path / "sa1b" / "0.tar", members)
    (tmp_path / "captions.jsonl").write_text("".join(f'{{"id": {i}, "text": "text {i}"}}\n' for i in range(4)))
    one, three, none = everything(open_source(tmp_path / "sa1b", "sa1b", captions=tmp_path / "captions.jsonl"))
    assert (one.text, one.read(), three.text) == ("text 1", b"1", "text 3")
    with pytest.raises(OversizedImage, match=r"neither its name nor its \.json has an image_id"):
        none.read()


def test_a_remote_tar_is_brought_to_a_scratch_folder_that_goes_with_its_images(sa1b, monkeypatch, tmp_path):
    remote = Remote(sa1b)
    monkeypatch.setattr("data_prep.sources.open_storage", lambda uri: remote)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    source = open_source("s3://bucket/sa1b")
    items = list(source.items(source.partitions(9)[1]))
    assert remote.downloads == ["sa_000001.tar"]
    assert len(list((tmp_path / "scratch").iterdir())) == 1
    assert [item.read() for item in items] == [f"image {i}".encode() for i in (3, 4, 5)]
    del items
    assert not list((tmp_path / "scratch").iterdir())


def webdataset(tmp_path, *samples):
    members = [(f"{i:04d}.{suffix}", data) for i, sample in enumerate(samples) for suffix, data in sample.items()]
    return write_tar(tmp_path / "web" / "a.tar", members).parent


def test_labels_and_texts_of_a_webdataset_are_found_in_its_members(tmp_path):
    folder = webdataset(
        tmp_path,
        {"jpg": b"0", "cls": b"7"},
        {"png": b"1", "json": b'{"label": 3, "caption": "three"}'},
        {"webp": b"2", "txt": "Bär".encode()},
        {"jpeg": b"3", "json": b'{"class": "12"}', "txt": b"text"},
        {"npy": b"no image"},
    )
    source = open_source(folder)
    assert source.classes is None
    assert [(i.label, i.text, i.read()) for i in everything(source)] == [
        (7, None, b"0"), (3, "three", b"1"), (0, "Bär", b"2"), (12, "text", b"3"),
    ]  # fmt: skip


def test_classes_by_name_need_their_list(tmp_path):
    folder = webdataset(tmp_path, {"jpg": b"0", "cls": b"dog"}, {"jpg": b"1", "cls": b"wolf"}, {"jpg": b"2"})
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    source = open_source(folder, classes=tmp_path / "classes.txt")
    assert source.classes == ("cat", "dog")
    dog, wolf, none = everything(source)
    assert (dog.label, dog.read()) == (1, b"0")
    with pytest.raises(OversizedImage, match="class 'wolf' is not in the list"):
        wolf.read()
    with pytest.raises(OversizedImage, match=r"neither \.cls nor"):
        none.read()


@pytest.mark.parametrize(
    ("classes", "label"), [(["cat", "dog"], "2"), (["cat", "dog"], "-1"), (None, "²"), (None, "1.5")]
)
def test_a_label_of_no_class_fails_its_image(tmp_path, classes, label):
    (item,) = everything(open_source(webdataset(tmp_path, {"jpg": b"0", "cls": label.encode()}), classes=classes))
    with pytest.raises(OversizedImage, match=rf"class '{label}' is not in the list of classes"):
        item.read()


def test_a_name_that_comes_twice_is_two_samples(tmp_path):
    members = [("0.jpg", b"0"), ("0.cls", b"1"), ("0.jpg", b"1"), ("0.cls", b"2")]
    write_tar(tmp_path / "web" / "a.tar", members)
    items = everything(open_source(tmp_path / "web"))
    assert [(item.label, item.read()) for item in items] == [(1, b"0"), (2, b"1")]
    assert len({item.key for item in items}) == 2


def test_hidden_members_are_passed_over(tmp_path):
    members = [("./._0.jpg", b"x"), ("./0.jpg", b"0"), ("./._0.cls", b"x"), ("./0.cls", b"5"), (".b/1.jpg", b"x")]
    write_tar(tmp_path / "web" / "a.tar", members)
    assert [(item.label, item.read()) for item in everything(open_source(tmp_path / "web"))] == [(5, b"0")]


@pytest.mark.parametrize("json_bytes", [b"{", b"[]", b"\xff", b'{"caption": ' + b"[" * 2000])
def test_a_description_that_cannot_be_read_fails_its_image_alone(tmp_path, json_bytes):
    folder = webdataset(tmp_path, {"jpg": b"0", "json": json_bytes}, {"jpg": b"1", "cls": b"1"})
    bad, good = everything(open_source(folder))
    assert good.read() == b"1"
    with pytest.raises(OversizedImage, match="its description cannot be used"):
        bad.read()


def test_tars_with_members_of_one_name_give_keys_of_their_own(tmp_path):
    for name in ("a/x.tar", "b/x.tar", "a-x.tar"):
        write_tar(tmp_path / "web" / name, [("0.jpg", b"0"), ("0.cls", b"0"), ("1.a.jpg", b"1"), ("1.b.jpg", b"2")])
    source = open_source(tmp_path / "web")
    items = everything(source)
    assert len({item.key for item in items}) == len(items)
    assert len({p.name for p in source.partitions(1)}) == 3


@pytest.mark.parametrize("kind", ["imagenet", "webdataset"])
def test_a_tar_that_was_cut_is_named(tmp_path, class_tars, kind):
    folder = class_tars if kind == "imagenet" else webdataset(tmp_path, {"jpg": bytes(2000)}, {"jpg": bytes(2000)})
    victim = sorted(folder.iterdir())[0]
    victim.write_bytes(victim.read_bytes()[:1536])
    with pytest.raises(UserError, match=rf"{victim.name}.* is damaged .*it was cut"):
        everything(open_source(folder))


def test_a_tar_that_was_cut_between_two_images_fails_after_them(tmp_path):
    folder = webdataset(tmp_path, {"jpg": bytes(512)}, {"jpg": bytes(512)})
    (tar,) = folder.iterdir()
    tar.write_bytes(tar.read_bytes()[:1024])
    source = open_source(folder)
    items = source.items(source.partitions(1)[0])
    with pytest.raises(UserError, match=r"a\.tar is damaged .*without an end-of-archive mark"):
        list(items)


def test_a_tar_of_links_is_refused(tmp_path):
    (tmp_path / "web").mkdir()
    with tarfile.open(tmp_path / "web" / "a.tar", "w") as tar:
        info = tarfile.TarInfo("0.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(UserError, match="is a link"):
        open_source(tmp_path / "web")


def test_an_image_of_gigabytes_is_not_read(tmp_path, monkeypatch):
    folder = webdataset(tmp_path, {"jpg": bytes(5000), "cls": b"1"})
    monkeypatch.setattr("data_prep.items.LARGEST_IMAGE", 4999)
    (item,) = everything(open_source(folder))
    with pytest.raises(OversizedImage, match="5,000 bytes are more than 4,999"):
        item.read()


@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        ("nowhere", "auto", "does not exist"),
        ("none.tar", "auto", "there is no tar"),
        ("empty", "auto", "no .jpg"),
        ("empty", "webdataset", "no .tar below"),
        ("empty", "mosaic", "unknown kind of source 'mosaic'"),
    ],
)
def test_what_is_no_source_is_refused_with_the_way_out(tmp_path, what, kind, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        open_source(tmp_path / what, kind)


def test_two_tars_of_one_class_are_refused(class_tars):
    (class_tars / "again").mkdir()
    (class_tars / "again" / "n01440764.tar").write_bytes((class_tars / "n01440764.tar").read_bytes())
    with pytest.raises(UserError, match="two tars of class n01440764"):
        open_source(class_tars)


@given(st.lists(st.text(st.characters(exclude_characters="/\0."), min_size=1, max_size=4), min_size=1, max_size=8))
def test_every_image_has_a_key_of_its_own_without_dots(names):
    with tempfile.TemporaryDirectory() as folder:
        for tar in ("a.tar", "b.tar"):
            write_tar(Path(folder) / tar, [(f"{name}.jpg", b"x") for name in names])
        items = everything(open_source(folder))
    keys = {item.key for item in items}
    assert len(items) == len(keys) == 2 * len(names)
    assert not any("." in key for key in keys)


def test_sources_in_an_object_store(imagenet, sa1b, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with s3_behind_faults() as proxy:
        store = open_storage("s3://bucket/in")
        store.write("train.tar", imagenet.read_bytes())
        for path in sa1b.iterdir():
            store.write(f"sa1b/{path.name}", path.read_bytes())
        source = open_source("s3://bucket/in/train.tar")
        assert contents(source) == EXPECTED
        assert source.digest == open_source(imagenet).digest
        assert contents(open_source("s3://bucket/in/sa1b/")) == contents(open_source(sa1b))
        del proxy
