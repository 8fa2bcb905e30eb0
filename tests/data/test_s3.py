import hashlib
import io
import multiprocessing
import os
import pickle
import signal
import sys
import tarfile
import time
import traceback

import pytest

from nitscale.data import download, s3
from nitscale.data import storage as storage_module
from nitscale.data.storage import RangedFile, StorageError, open_storage
from nitscale.errors import UserError
from tests.data.faults import ACCESS_KEY, SECRET, client, flip_bit, notice_stalls, s3_behind_faults, set_headers

fork = multiprocessing.get_context("fork")
DATA = bytes(range(256)) * 40
SHA256 = hashlib.sha256(DATA).hexdigest()
PART = 5 << 20
"""The least that S3 takes for a part."""


@pytest.fixture(scope="module")
def server():
    with s3_behind_faults() as proxy:
        yield proxy


@pytest.fixture
def proxy(server):
    yield server
    pending = server.pending()
    server.clear()
    assert not pending, "a fault was not met"


@pytest.fixture
def storage(proxy, request):
    storage = open_storage(f"s3://bucket/set of {abs(hash(request.node.name))}")
    storage.write("a", DATA)
    proxy.clear()
    return storage


@pytest.fixture
def small_parts(monkeypatch, tmp_path):
    monkeypatch.setattr(s3, "PART_BYTES", PART)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()


def uploads() -> list[str]:
    return [
        upload["Key"].rpartition("/")[2]
        for upload in client().list_multipart_uploads(Bucket="bucket").get("Uploads", ())
    ]


# What it does when all is well


def test_what_was_written_is_read_whole_and_by_range(storage):
    storage.write("shards/b.tar", b"0123456789")
    assert storage.read("shards/b.tar") == b"0123456789"
    assert storage.read_range("shards/b.tar", 3, 4) == b"3456"
    assert storage.read_range("shards/b.tar", 3, 0) == b""
    assert storage.size("shards/b.tar") == 10
    assert storage.exists("shards/b.tar")
    storage.delete("shards/b.tar")
    storage.delete("shards/b.tar")
    assert not storage.exists("shards/b.tar")


def test_an_empty_object_is_one(storage, tmp_path):
    storage.write("e", b"")
    assert storage.read("e") == b""
    storage.download("e", tmp_path / "e", 0, hashlib.sha256().hexdigest())
    assert (tmp_path / "e").read_bytes() == b""
    assert RangedFile(storage, "e").read() == b""


@pytest.mark.parametrize(
    "name", ["a b/ü+%&?=#'\"$@:;,~!*().tar", "日本/😀", "a\\b", "x=1/y&z", "tab\tx", "end ", "%41", "..."]
)
def test_a_name_with_odd_characters_is_a_name_like_any_other(storage, name):
    storage.write(name, b"1234")
    assert storage.read(name) == b"1234"
    assert storage.read_range(name, 1, 2) == b"23"
    assert not storage.put_if_absent(name, b"other")
    listed = {name: 4} if not name.startswith(".") else {}
    assert storage.list("", recursive=True) == {"a": len(DATA), **listed}
    storage.delete(name)
    assert not storage.exists(name)


def test_a_list_has_all_pages_of_one_folder_or_of_all_below(storage, proxy, monkeypatch):
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "3")
    for name in ("x/1", "x/2", "x/y/3", "x/y/4", "xx/5", "x/.hidden", ".git/z"):
        storage.write(name, b"1")
    for key in ("x/", "x//6", "x/../7"):
        client().put_object(Bucket="bucket", Key=f"{storage._folder}/{key}", Body=b"1")
    assert storage.list("x") == {"x/1": 1, "x/2": 1}
    assert list(storage.list("", recursive=True)) == ["a", "x/1", "x/2", "x/y/3", "x/y/4", "xx/5"]
    assert storage.list("nothing") == {}
    assert len(proxy.requests("GET", "continuation-token")) > 3


def test_a_whole_bucket_is_a_prefix_too(storage):
    bucket = open_storage("s3://bucket")
    bucket.write("top", b"1")
    assert bucket.read("top") == b"1"
    assert bucket.list("") == {"top": 1}
    assert f"{storage._folder}/a" in bucket.list("", recursive=True)


def test_an_object_as_a_file_is_read_by_tarfile_over_cut_connections(storage, proxy, tmp_path):
    with storage.create("a.tar") as path, tarfile.open(path, "w") as tar:
        for name in ("one", "two"):
            info = tarfile.TarInfo(name)
            info.size = 10_000
            tar.addfile(info, io.BytesIO(name.encode() * 10_000))
    proxy.add(3, method="GET", cut_body=1500)
    with tarfile.open(fileobj=RangedFile(storage, "a.tar", 4000)) as tar:
        assert tar.extractfile("two").read() == (b"two" * 10_000)[:10_000]
        assert tar.extractfile("one").read() == (b"one" * 10_000)[:10_000]


def test_nothing_is_uploaded_when_the_making_of_an_object_fails(storage, small_parts, tmp_path):
    with pytest.raises(RuntimeError), storage.create("big") as path:
        path.write_bytes(b"half")
        raise RuntimeError
    assert not storage.exists("big")
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


# Overload


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429])
def test_bursts_of_overload_are_waited_out(storage, proxy, tmp_path, status):
    def meet(act):
        proxy.add(6, status=status)
        return act()

    assert meet(lambda: storage.read("a")) == DATA
    assert meet(lambda: storage.read_range("a", 7, 70)) == DATA[7:77]
    assert meet(lambda: storage.size("a")) == len(DATA)
    assert meet(lambda: storage.list("")) == {"a": len(DATA)}
    assert meet(lambda: storage.put_if_absent("b", b"1"))
    meet(lambda: storage.write("c", b"2"))
    meet(lambda: storage.download("a", tmp_path / "a", len(DATA), SHA256))
    meet(lambda: storage.delete("c"))
    assert storage.list("") == {"a": len(DATA), "b": 1}


@pytest.mark.parametrize("code", ["SlowDown", "RequestTimeout", "BadDigest", "InternalError"])
def test_an_error_that_may_pass_is_known_by_its_code_too(storage, proxy, code):
    proxy.add(2, status=400, code=code)
    assert storage.read("a") == DATA


def test_giving_up_takes_a_bounded_time_and_says_how_long_it_was_tried(storage, proxy, monkeypatch):
    monkeypatch.setenv("NITSCALE_S3_RETRY_SECONDS", "0.1")
    proxy.add(1000, status=503)
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"gave up s3://bucket/.*/a after \d+ attempts.*SlowDown, 503.*run again"):
        storage.read("a")
    assert time.monotonic() - started < 5
    assert 0 < 1000 - proxy.pending() < 200
    proxy.clear()
    monkeypatch.setenv("NITSCALE_S3_RETRY_SECONDS", "long")
    with pytest.raises(UserError, match="NITSCALE_S3_RETRY_SECONDS is 'long'"):
        storage.read("a")


def test_pauses_grow_and_differ(monkeypatch):
    pauses = []
    monkeypatch.setattr(s3, "LONGEST_PAUSE", 1)
    monkeypatch.setattr(time, "sleep", pauses.append)
    patience = s3.Patience("s3://bucket/a")
    for _ in range(5):
        patience.wait("overload")
    assert [0.5 * s3.FIRST_PAUSE * 2**n <= pause <= s3.FIRST_PAUSE * 2**n for n, pause in enumerate(pauses)] == [
        True
    ] * 5
    patience.progress()
    patience.wait("overload")
    assert pauses[-1] <= s3.FIRST_PAUSE < pauses[2]
    assert len({pause / 2**n for n, pause in enumerate(pauses[:5])}) == 5


def test_a_user_is_told_when_it_takes_long(storage, proxy, monkeypatch):
    monkeypatch.setattr(s3, "NOTICE_SECONDS", 0)
    proxy.add(5, status=503)
    with pytest.warns(UserWarning, match=r"still trying to reach s3://.*/a \(SlowDown") as told:
        storage.read("a")
    assert len(told) == 1


# Cut, stalled and lying replies


@pytest.mark.parametrize("how", ["cut_after", "cut_body", "end_body"])
def test_a_reply_cut_at_any_byte_is_taken_up_where_it_stopped(storage, proxy, tmp_path, monkeypatch, how):
    monkeypatch.setattr(s3, "RECEIVE_BYTES", 256)
    for position in [0, 1, 17, 100, 250, 400, 600, 1000, 5000, 9000, len(DATA) - 1]:
        for number, read in enumerate(
            (
                lambda: storage.read("a"),
                lambda: storage.read_range("a", 0, len(DATA)),
                lambda: storage.download("a", tmp_path / "a", len(DATA), SHA256) or (tmp_path / "a").read_bytes(),
            )
        ):
            proxy.clear()
            proxy.add(method="GET", **{how: position})
            assert read() == DATA, (position, number)
            _, again = (headers for method, _, headers, _ in proxy.log if method == "GET")
            if how != "cut_after" and position >= 256:
                begin, end = map(int, again["Range"].removeprefix("bytes=").split("-"))
                assert position - 256 < begin <= position
                assert end == len(DATA) - 1
                assert again["If-Match"] == f'"{hashlib.md5(DATA).hexdigest()}"'


def test_a_reply_cut_again_and_again_is_read_in_the_end(storage, proxy, monkeypatch):
    monkeypatch.setenv("NITSCALE_S3_RETRY_SECONDS", "2")  # without progress; there is some each time
    proxy.add(len(DATA) // 100, method="GET", cut_body=100)
    assert storage.read("a") == DATA
    assert len(proxy.log) == len(DATA) // 100 + 1


@pytest.mark.parametrize("position", [0, 30, 5000])
def test_a_stalled_reply_is_given_up_and_asked_for_again(storage, proxy, monkeypatch, position):
    notice_stalls(monkeypatch)
    proxy.add(method="GET", stall_after=position)
    started = time.monotonic()
    assert storage.read_range("a", 100, 9000) == DATA[100:9100]
    assert 0.3 < time.monotonic() - started < 5


def test_wrong_sizes_are_noticed_and_asked_for_again(storage, proxy):
    def shorter(reply):
        reply.body = reply.body[:-10]
        reply.headers["content-length" if "content-length" in reply.headers else "Content-Length"] = str(
            len(reply.body)
        )

    def longer(reply):
        reply.body += b"x" * 10
        reply.headers["content-length" if "content-length" in reply.headers else "Content-Length"] = str(
            len(reply.body)
        )

    def without_length(reply):
        reply.headers = {n: v for n, v in reply.headers.items() if n.lower() != "content-length"}
        reply.headers["Transfer-Encoding"] = "chunked"
        reply.body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(reply.body), reply.body)

    lies = [
        {"change": shorter},
        {"change": longer},
        {"change": without_length},
        {"change": set_headers(content_length=lambda old: str(int(old) + 7)), "end_body": 1 << 20},
        {"change": set_headers(content_length=lambda old: str(int(old) - 7))},
        {"change": set_headers(content_range=lambda old: old.replace("bytes 100-", "bytes 101-"))},
        {"headers": {"Range": ""}},  # the server then sends the whole object
        {"headers": {"Range": "bytes=0-49"}},
    ]
    for lie in lies:
        proxy.add(2, method="GET", **lie)
        assert storage.read_range("a", 100, 50) == DATA[100:150], lie
        proxy.clear()


def test_a_service_that_keeps_lying_is_an_error(storage, proxy, monkeypatch):
    monkeypatch.setenv("NITSCALE_S3_RETRY_SECONDS", "0.05")
    proxy.add(1000, method="GET", headers={"Range": ""})
    with pytest.raises(StorageError, match=r"gave up .*no range, although one was asked for"):
        storage.read_range("a", 100, 50)
    proxy.clear()


class LyingService:
    """Says that an object has 100 bytes, and then sends `bodies`, one after another."""

    def __init__(self, *bodies):
        self.bodies = list(bodies)

    def call(self, operation, **parameters):
        return {"ContentLength": 100, "ETag": "x", "Body": io.BytesIO(self.bodies.pop(0))}


@pytest.mark.parametrize("wrong", [DATA[:99], DATA[:101], b""])
def test_a_body_of_another_length_than_its_reply_says_is_noticed_here_too(monkeypatch, wrong):
    # botocore notices first what is too short, and never reads what is too long.
    monkeypatch.setattr(s3, "FIRST_PAUSE", 0)
    if len(wrong) > 100:
        assert s3.S3Storage(LyingService(wrong, DATA[:100]), "bucket", "").read("a") == DATA[:100]
    else:
        rest = s3.S3Storage(LyingService(wrong), "bucket", "")
        with pytest.raises(IndexError):  # of the service: the rest was asked for
            rest.read("a")


@pytest.mark.parametrize(("offset", "length"), [(len(DATA) - 5, 6), (len(DATA), 1), (10**9, 10)])
def test_a_range_beyond_the_end_is_an_error_and_not_a_short_read(storage, offset, length):
    with pytest.raises(StorageError, match=r"s3://bucket/.*/a is truncated"):
        storage.read_range("a", offset, length)


def test_bytes_corrupted_on_the_way_are_fetched_again(storage, proxy, tmp_path):
    for offset in (0, 5000, len(DATA) - 1):
        proxy.add(method="GET", change=flip_bit(offset))
        storage.download("a", tmp_path / "a", len(DATA), SHA256)
        assert (tmp_path / "a").read_bytes() == DATA
        proxy.add(method="GET", change=flip_bit(offset))
        assert storage.read("a") == DATA  # by the checksum that the service keeps


def test_bytes_that_stay_corrupted_are_an_error_and_leave_nothing(storage, proxy, tmp_path):
    storage.write("b", DATA[:-1] + b"x")
    with pytest.raises(StorageError, match=rf"s3://bucket/.*/b is damaged: its sha256 is \w+ instead of {SHA256}"):
        storage.download("b", tmp_path / "x" / "b", len(DATA), SHA256)
    assert len(proxy.requests("GET")) == download.DAMAGED_ATTEMPTS
    proxy.add(100, method="GET", change=flip_bit(7))
    for act in (lambda: storage.read("a"), lambda: storage.download("a", tmp_path / "x" / "a", len(DATA))):
        with pytest.raises(StorageError, match="/a is damaged: it does not match its store's checksum"):
            act()
    proxy.clear()
    for path in (tmp_path / "x").iterdir():
        assert path.name.endswith(".tmp") and path.stat().st_size == 0


def test_corruption_in_the_part_before_a_cut_is_caught_too(storage, proxy, tmp_path):
    proxy.add(method="GET", change=flip_bit(10), cut_body=6000)
    storage.download("a", tmp_path / "a", len(DATA), SHA256)
    assert (tmp_path / "a").read_bytes() == DATA


def test_an_object_of_another_size_is_not_downloaded(storage, proxy, tmp_path):
    with pytest.raises(StorageError, match="has 10,240 bytes instead of 9"):
        storage.download("a", tmp_path / "a", 9)
    assert not proxy.requests("GET")
    proxy.add(method="HEAD", change=set_headers(content_length=lambda old: "9"))
    with pytest.raises(StorageError, match="has 9 bytes instead of 10,240"):
        storage.download("a", tmp_path / "a", len(DATA))


def test_an_object_replaced_while_it_is_read_is_an_error_and_then_read_anew(storage, proxy, tmp_path):
    def replace():
        client().put_object(Bucket="bucket", Key=f"{storage._folder}/a", Body=DATA[::-1])

    for read in (lambda: storage.read("a"), lambda: storage.download("a", tmp_path / "a", len(DATA))):
        storage.write("a", DATA)
        proxy.add(method="GET", cut_body=100)
        proxy.add(method="GET", before=replace)
        with pytest.raises(StorageError, match=r"/a was replaced while it was being read"):
            read()
    assert not (tmp_path / "a").exists()
    storage.write("a", DATA)
    assert storage.read_range("a", 0, 10) == DATA[:10]
    replace()
    with pytest.raises(StorageError, match="was replaced"):
        storage.read_range("a", 10, 10)
    assert storage.read_range("a", 10, 10) == DATA[::-1][10:20]


# Downloads


def wait_for(condition):
    """What `condition()` gives once it is true; for processes and threads of a test."""
    deadline = time.monotonic() + 20
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return found


def run_in_processes(count, act) -> list:
    """What act(number) gives in each of `count` processes that begin together."""
    start, results = fork.Event(), fork.SimpleQueue()

    def run(number):
        start.wait(20)
        results.put((number, act(number)))

    processes = [fork.Process(target=run, args=(number,)) for number in range(count)]
    for process in processes:
        process.start()
    start.set()
    found = dict(results.get() for _ in processes)
    for process in processes:
        process.join()
    return [found[number] for number in range(count)]


def test_a_killed_download_is_taken_up_where_it_stopped(storage, proxy, tmp_path, monkeypatch):
    monkeypatch.setattr(s3, "RECEIVE_BYTES", 256)
    target = tmp_path / "a"
    proxy.add(method="GET", stall_after=9900)
    process = fork.Process(target=storage.download, args=("a", target, len(DATA), SHA256))
    process.start()
    (partial,) = wait_for(lambda: [path for path in tmp_path.iterdir() if path.stat().st_size > 0])
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    kept = partial.stat().st_size
    assert not target.exists()
    proxy.clear()
    storage.download("a", target, len(DATA), SHA256)
    assert target.read_bytes() == DATA
    ranges = [headers.get("Range") for method, _, headers, _ in proxy.log if method == "GET"]
    assert ranges == [f"bytes={kept}-{len(DATA) - 1}"]
    assert list(tmp_path.iterdir()) == [target]


def test_what_a_killed_download_left_of_another_version_is_not_used(storage, proxy, tmp_path, monkeypatch):
    monkeypatch.setenv("NITSCALE_S3_RETRY_SECONDS", "0")
    target = tmp_path / "a"
    proxy.add(method="GET", end_body=9000)
    with pytest.raises(StorageError, match="gave up"):
        storage.download("a", target, len(DATA))
    assert [path.stat().st_size for path in tmp_path.iterdir()] == [9000]
    storage.write("a", DATA[::-1])
    storage.download("a", target, len(DATA))
    assert target.read_bytes() == DATA[::-1]


def test_processes_that_download_to_one_path_do_not_disturb_each_other(storage, proxy, tmp_path):
    proxy.add(3, method="GET", cut_body=5000)
    run_in_processes(4, lambda number: storage.download("a", tmp_path / "a", len(DATA), SHA256))
    assert (tmp_path / "a").read_bytes() == DATA
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_a_download_that_another_process_has_just_finished_is_left_alone(storage, tmp_path, monkeypatch):
    target = tmp_path / "a"

    def finish_just_before(file, flags):
        monkeypatch.undo()
        os.write(file.fileno(), DATA)
        os.replace(file_path(file), target)

    def file_path(file):
        return os.readlink(f"/proc/self/fd/{file.fileno()}")

    monkeypatch.setattr(download, "lockf", finish_just_before)
    storage.download("a", target, len(DATA), SHA256)
    assert target.read_bytes() == DATA
    assert list(tmp_path.iterdir()) == [target]


def test_a_full_disk_is_named_and_what_arrived_is_removed(storage, tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download, "fsync", full)
    with pytest.raises(UserError, match=r"disk is full: cannot write .*/a "):
        storage.download("a", tmp_path / "a", len(DATA))
    assert list(tmp_path.iterdir()) == []


# Puts


@pytest.mark.parametrize("position", [0, 1, 5000, len(DATA) - 1])
def test_a_put_that_is_cut_is_repeated(storage, proxy, position):
    proxy.add(2, method="PUT", cut_request=position)
    storage.write("b", DATA)
    proxy.add(method="PUT", cut_request=position)
    assert storage.put_if_absent("c", DATA)
    assert storage.read("b") == storage.read("c") == DATA


def test_a_put_whose_reply_was_lost_is_known_as_ones_own(storage, proxy, monkeypatch):
    notice_stalls(monkeypatch)
    for loss in ({"lose_reply": True}, {"stall_after": 0}, {"cut_after": 9}):
        proxy.add(method="PUT", **loss)
        assert storage.put_if_absent(f"b/{loss}", b"mine")
        assert storage.read(f"b/{loss}") == b"mine"
        proxy.add(method="PUT", **loss)
        storage.write("c", b"mine")
    assert storage.read("c") == b"mine"


def test_anothers_object_is_not_taken_for_ones_own_though_it_holds_the_same(storage, proxy):
    assert storage.put_if_absent("b", b"same")
    assert not storage.put_if_absent("b", b"same")
    proxy.add(method="PUT", lose_reply=True)
    assert not storage.put_if_absent("b", b"same")
    proxy.add(method="PUT", cut_request=2)
    assert not storage.put_if_absent("b", b"other")


def test_where_a_store_keeps_no_metadata_ones_own_object_is_known_by_its_bytes(storage, proxy):
    def forget_metadata(reply):
        reply.headers = {n: v for n, v in reply.headers.items() if not n.lower().startswith("x-amz-meta")}

    for data, found in [(b"mine", b"mine"), (b"yours", b"mine")]:
        proxy.add(method="PUT", lose_reply=True)
        proxy.add(method="HEAD", change=forget_metadata)
        assert storage.put_if_absent("b", data) == (data == found)


def test_a_conflict_with_another_put_is_repeated(storage, proxy):
    proxy.add(3, method="PUT", status=409, code="ConditionalRequestConflict")
    assert storage.put_if_absent("b", b"1")


@pytest.mark.parametrize("losses", [0, 8])
def test_of_many_processes_that_put_one_object_exactly_one_wins(storage, proxy, losses):
    proxy.add(losses, method="PUT", lose_reply=True)
    won = run_in_processes(16, lambda number: storage.put_if_absent("commit", b"%d" % number))
    assert sum(won) == 1
    assert storage.read("commit") == b"%d" % won.index(True)


def test_every_body_is_sent_with_a_checksum(storage, proxy, monkeypatch, small_parts):
    def checksums(name):
        sent = [headers for method, path, headers, _ in proxy.log if method == "PUT" and name in path][-1]
        sent = {n.lower(): v for n, v in sent.items()}
        return sent.get("x-amz-checksum-crc32"), sent.get("content-md5")

    storage.write("b", b"1234")
    assert checksums("/b") == ("m+Pgow==", None)
    monkeypatch.setenv("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    storage.write("c", b"1234")
    assert checksums("/c") == (None, "gdyb21LQTcIANtvYMT7QVQ==")
    storage.write("d", bytes(PART + 1))
    assert checksums("partNumber=2") == (None, "k7iFrf4NoInN9jSQT9WfcQ==")
    assert storage.size("d") == PART + 1


# Uploads in parts

BIG = os.urandom(2 * PART + 1000)


def make(storage, name, data=BIG):
    with storage.create(name) as path:
        path.write_bytes(data)


def test_a_large_object_goes_in_parts_and_is_visible_only_when_whole(storage, proxy, small_parts, tmp_path):
    seen = []
    proxy.add(method="POST", containing="uploadId", before=lambda: seen.append(storage.exists("big")))
    make(storage, "big")
    assert seen == [False]
    assert storage.read("big") == BIG
    assert len(proxy.requests("PUT", "partNumber")) == 3
    assert not [p for p in (tmp_path / "scratch").rglob("*") if p.is_file()]


def test_an_upload_in_parts_survives_what_a_network_does(storage, proxy, small_parts):
    proxy.add(method="POST", containing="?uploads", status=503)
    proxy.add(method="POST", containing="?uploads", lose_reply=True)
    proxy.add(2, method="PUT", status=500)
    proxy.add(method="PUT", cut_request=1 << 20)
    proxy.add(method="PUT", lose_reply=True)
    proxy.add(method="POST", containing="?uploadId", status=503)
    proxy.add(method="POST", containing="?uploadId", lose_reply=True)
    make(storage, "big")
    assert storage.read("big") == BIG
    assert uploads() == []


def test_an_upload_that_fails_is_aborted(storage, proxy, small_parts, tmp_path):
    proxy.add(method="PUT", containing="partNumber=2", status=403, code="AccessDenied")
    with pytest.raises(UserError, match=r"refuses s3://.*/big \(AccessDenied, 403\)"):
        make(storage, "big")
    assert uploads() == []
    assert not storage.exists("big")
    assert not [p for p in (tmp_path / "scratch").rglob("*") if p.is_file()]


def test_what_killed_writers_left_of_a_name_goes_when_it_is_written_again(storage, proxy, small_parts, tmp_path):
    proxy.add(method="PUT", containing="partNumber=2", stall_after=0)
    process = fork.Process(target=make, args=(storage, "big"))
    process.start()
    wait_for(lambda: not proxy.pending())
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    client().create_multipart_upload(Bucket="bucket", Key=f"{storage._folder}/big.other")
    assert sorted(uploads()) == ["big", "big.other"]
    assert not storage.exists("big")
    assert [p for p in (tmp_path / "scratch").rglob("*") if p.is_file()]
    make(storage, "big")
    assert not [p for p in (tmp_path / "scratch").rglob("*") if p.is_file()]
    assert uploads() == ["big.other"]
    assert storage.read("big") == BIG
    (other,) = client().list_multipart_uploads(Bucket="bucket")["Uploads"]
    client().abort_multipart_upload(Bucket="bucket", Key=other["Key"], UploadId=other["UploadId"])


def end_uploads() -> None:
    for upload in client().list_multipart_uploads(Bucket="bucket").get("Uploads", ()):
        client().abort_multipart_upload(Bucket="bucket", Key=upload["Key"], UploadId=upload["UploadId"])


@pytest.mark.parametrize("moment", ["partNumber=2", "?uploadId"])
def test_an_upload_that_another_writer_of_the_name_ended_is_begun_anew(storage, proxy, small_parts, moment):
    proxy.add(containing=moment, before=end_uploads)
    make(storage, "big")
    assert storage.read("big") == BIG
    assert uploads() == []


def test_an_upload_is_not_repeated_when_another_writer_was_first_with_the_same(storage, proxy, small_parts):
    proxy.add(method="POST", containing="?uploadId", before=lambda: make(storage, "big"))
    make(storage, "big")
    assert len(proxy.requests("PUT", "partNumber")) == 2 * 3
    assert storage.read("big") == BIG


def test_tidying_up_is_no_reason_to_fail(storage, proxy, small_parts):
    proxy.add(method="GET", containing="uploads", status=403, code="AccessDenied")
    make(storage, "big")
    assert storage.exists("big")


# What a user has to mend


@pytest.mark.parametrize(
    ("status", "code", "way_out"),
    [
        (403, "AccessDenied", "check AWS_PROFILE and the rights"),
        (403, "InvalidAccessKeyId", "check AWS_PROFILE, AWS_ACCESS_KEY_ID"),
        (403, "SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY"),
        (400, "ExpiredToken", "get new ones"),
        (403, "RequestTimeTooSkewed", "clock is wrong; set it"),
        (403, "InvalidObjectState", "restore it first"),
        (501, "NotImplemented", "use a newer version"),
        (404, "NoSuchBucket", "no bucket 'bucket' for"),
        (400, "Strange", "check the name, AWS_ENDPOINT_URL and AWS_REGION"),
    ],
)
def test_a_refusal_names_the_object_and_the_way_out(storage, proxy, status, code, way_out):
    acts = [lambda: storage.read("a"), lambda: storage.read_range("a", 0, 1), lambda: storage.put_if_absent("a", b"")]
    for act in acts:
        proxy.add(status=status, code=code)
        with pytest.raises(UserError, match=rf"s3://bucket/.*/a.*{way_out}|{way_out}.*s3://bucket/.*/a") as caught:
            act()
        assert not isinstance(caught.value, OSError)  # which a loader would take for one bad sample


@pytest.mark.parametrize("status", [403, 401])
def test_a_refusal_without_a_reason_names_the_object_too(storage, proxy, status):
    proxy.add(method="HEAD", status=status)
    with pytest.raises(UserError, match=rf"refuses s3://bucket/.*/a \({status}, {status}\): .*AWS_PROFILE"):
        storage.exists("a")


def test_a_missing_object_is_told_from_a_missing_bucket(storage, tmp_path):
    for act in (storage.read, storage.size, lambda name: storage.read_range(name, 0, 1)):
        with pytest.raises(FileNotFoundError, match=r"no object s3://bucket/.*/nothing") as caught:
            act("nothing")
        assert isinstance(caught.value, UserError)
    with pytest.raises(FileNotFoundError):
        storage.download("nothing", tmp_path / "a", 1)
    missing = open_storage("s3://nowhere/set")
    for act in (missing.exists, missing.read, missing.list):
        with pytest.raises(UserError, match="no bucket 'nowhere' for s3://nowhere/set/a") as caught:
            act("a")
        assert not isinstance(caught.value, OSError)
    with pytest.raises(UserError, match="cannot have that name"):
        open_storage("s3://No such bucket/set").read("a")


def test_no_credentials_and_no_profile_are_errors_with_a_way_out(storage, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(UserError, match=r"s3://bucket/.*/a: .*nobody.*AWS_PROFILE"):
        storage.read("a")
    monkeypatch.delenv("AWS_PROFILE")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(UserError, match=r"s3://bucket/.*/a: no credentials; set AWS_PROFILE, or AWS_ACCESS_KEY_ID"):
        storage.read("a")


def test_an_endpoint_that_does_not_answer_is_an_error_with_a_way_out(storage, monkeypatch):
    monkeypatch.setenv("NITSCALE_S3_RETRY_SECONDS", "0.1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:password@127.0.0.1:9")
    with pytest.raises(
        StorageError, match=r"gave up s3://.*/a .*127\.0\.0\.1:9.*check the network and AWS_END"
    ) as caught:
        storage.read("a")
    assert "password" not in str(caught.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost")
    with pytest.raises(UserError, match=r"http\(s\)://host:port"):
        storage.read("a")


def test_without_boto3_the_extra_is_named(storage, monkeypatch):
    monkeypatch.setattr(storage_module, "_clients", {})
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(UserError, match=r"needs boto3; install it by: pip install 'nitscale\[s3\]'"):
        storage.read("a")


def test_secrets_reach_neither_errors_nor_representations(storage, proxy, monkeypatch, caplog):
    shown = [repr(storage), str(storage), repr(pickle.dumps(storage)), repr(vars(storage))]
    monkeypatch.setenv("NITSCALE_S3_RETRY_SECONDS", "0")
    for fault in ({"status": 403, "code": "SignatureDoesNotMatch"}, {"status": 503}, {"cut_after": 3}):
        proxy.add(**fault)
        shown.append(trace_of(lambda: storage.read("a")))
    monkeypatch.setenv("AWS_SESSION_TOKEN", "a token\n")
    shown.append(trace_of(lambda: storage.read("a")))
    assert "look for line breaks" in shown[-1]
    for text in [*shown, caplog.text]:
        assert not [secret for secret in (SECRET, ACCESS_KEY, "a token", "Signature=") if secret in text]


def trace_of(act) -> str:
    with pytest.raises(UserError) as caught:
        act()
    return "".join(traceback.format_exception(caught.value))


# Settings and processes


@pytest.mark.parametrize(("value", "style"), [("1", "path"), ("0", "virtual"), ("", None)])
def test_the_path_style_is_a_setting(storage, monkeypatch, value, style):
    monkeypatch.setenv("NITSCALE_S3_PATH_STYLE", value)
    assert (client().meta.config.s3 or {}).get("addressing_style") == style
    monkeypatch.setenv("NITSCALE_S3_PATH_STYLE", "yes")
    with pytest.raises(UserError, match="NITSCALE_S3_PATH_STYLE is 'yes'; give 1"):
        storage.read("a")


def test_a_profile_gives_endpoint_and_credentials(storage, monkeypatch, tmp_path):
    (tmp_path / "config").write_text(
        f"[profile store]\nendpoint_url = {os.environ['AWS_ENDPOINT_URL']}\nregion = eu-west-1\n"
    )
    (tmp_path / "credentials").write_text("[store]\naws_access_key_id = other\naws_secret_access_key = secret\n")
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "store")
    assert storage.read("a") == DATA
    assert client().meta.region_name == "eu-west-1"


def test_a_storage_works_in_forked_and_in_spawned_processes(storage):
    assert storage.read_range("a", 0, 5) == DATA[:5]
    reads = run_in_processes(3, lambda number: [storage.read_range("a", i * number, 9) for i in range(30)])
    assert reads == [[DATA[i * number : i * number + 9] for i in range(30)] for number in range(3)]
    assert storage.read_range("a", 0, 5) == DATA[:5]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(storage.read, ("a",)) == DATA


def test_no_client_serves_two_processes(storage, monkeypatch):
    mine = id(client())
    lock = storage_module._clients_lock
    with lock:  # as another thread of this process may hold it
        others = run_in_processes(2, lambda _: (id(client()), os.getpid(), storage.read("a") == DATA))
    assert {process for _, process, _ in others}.isdisjoint({os.getpid()})
    assert mine not in {identity for identity, _, _ in others}
    assert [right for *_, right in others] == [True, True]
