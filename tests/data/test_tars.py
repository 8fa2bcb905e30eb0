import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nitscale.data.tars import DamagedTar, scan


def tar_of(members, format=tarfile.USTAR_FORMAT):
    """A tar of (name, contents)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, contents in members:
            info = tarfile.TarInfo(name)
            info.size = len(contents)
            tar.addfile(info, io.BytesIO(contents))
    return buffer.getvalue()


def tar_with(info, contents=b""):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(info, io.BytesIO(contents))
    return buffer.getvalue()


def read(data):
    return [(member.name, data[member.offset :][: member.size]) for member in scan(io.BytesIO(data))]


names = st.text("abcdäß文/-_. ", min_size=1, max_size=180).filter(
    lambda name: not name.startswith("/") and ".." not in name.split("/") and not name.endswith("/")
)


@settings(max_examples=60, deadline=None)
@given(
    members=st.lists(st.tuples(names, st.binary(max_size=1500)), max_size=5),
    format=st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_members_are_those_that_were_written(members, format):
    assert read(tar_of(members, format)) == members


def test_ustar_names_have_their_prefix():
    members = [("folder" * 12 + "/" + "name" * 20, b"contents")]
    assert read(tar_of(members)) == members


def test_folders_are_passed_over_and_large_sizes_are_read():
    folder = tarfile.TarInfo("folder")
    folder.type = tarfile.DIRTYPE
    assert read(tar_with(folder)) == []
    large = tarfile.TarInfo("large")
    large.size = 9 * 2**30  # base-256 in the header
    buffer = io.BytesIO(large.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(DamagedTar, match="9,663,676,416 bytes, more than the file"):
        list(scan(buffer))


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 4 * 512 - 1))
def test_a_tar_that_was_cut_anywhere_is_damaged(cut):
    data = tar_of([("a", b"x" * 600), ("b", b"y")])
    assert len(read(data[: 5 * 512 + 512])) == 2
    with pytest.raises(DamagedTar):
        read(data[:cut])


def test_a_tar_that_was_cut_between_two_members_is_damaged():
    data = tar_of([("a", b"x"), ("b", b"y")])
    found = scan(io.BytesIO(data[:1024]))
    assert next(found).name == "a"
    with pytest.raises(DamagedTar, match="without an end-of-archive mark"):
        next(found)


@settings(max_examples=100, deadline=None)
@given(byte=st.integers(0, 511), bit=st.integers(0, 7))
def test_a_flipped_bit_in_a_header_is_noticed(byte, bit):
    data = bytearray(tar_of([("a", b"x")]))
    data[byte] ^= 1 << bit
    if 148 <= byte < 156 and read_or_none(bytes(data)) == [("a", b"x")]:
        return  # the padding of the checksum itself
    with pytest.raises(DamagedTar):
        read(bytes(data))


def read_or_none(data):
    try:
        return read(data)
    except DamagedTar:
        return None


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(kind):
    info = tarfile.TarInfo("passwd")
    info.type, info.linkname = kind, "/etc/passwd"
    with pytest.raises(DamagedTar, match="'passwd' is a link, a device"):
        read(tar_with(info))


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside", "a/../../outside", "a/.."])
@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_that_lead_out_are_refused(name, format):
    with pytest.raises(DamagedTar, match="leads out of the archive"):
        read(tar_of([(name, b"x")], format))
    with pytest.raises(DamagedTar, match="leads out of the archive"):
        read(tar_of([("x" * 150 + "/../../" + name, b"x")], format))


@pytest.mark.parametrize("kind", [b"L", b"x"])
def test_names_of_gigabytes_are_refused_before_they_are_read(kind):
    info = tarfile.TarInfo("bomb")
    info.type, info.size = kind, 2**17

    class Counting(io.BytesIO):
        most = 0

        def read(self, size=-1):
            Counting.most = max(Counting.most, size)
            return super().read(size)

    with pytest.raises(DamagedTar, match="131,072 bytes of names"):
        list(scan(Counting(info.tobuf(tarfile.GNU_FORMAT) + bytes(2**17 + 1024))))
    assert Counting.most <= 512


@pytest.mark.parametrize("content", [b"99 path=a\n", b"x path=a\n", b"10 path=abc", b"9 pathabc\n", b"7 size=\n"])
def test_a_damaged_pax_header_is_refused(content):
    info = tarfile.TarInfo("pax")
    info.type, info.size = b"x", len(content)
    data = info.tobuf() + content.ljust(512, b"\0") + tar_of([("a", b"x")])
    with pytest.raises(DamagedTar):
        read(data)
