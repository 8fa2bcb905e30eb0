"""Objects of an S3 bucket as a storage: what is asked of the service, and what to do about its answers.

Every request is repeated while the service is overloaded or out of reach. A body that is cut is taken up where it
stopped (Range, and If-Match so that two versions are never mixed); a conditional put whose reply was lost is told from
another writer's; uploads in parts are ended in any case. How a request is made: `nitscale.data.storage`.
"""

import base64
import errno
import functools
import hashlib
import os
import random
import re
import secrets
import tempfile
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeAlias

from nitscale.data.download import DAMAGED_ATTEMPTS, Damaged, download
from nitscale.data.objects import MissingObject, StorageError, check_name, check_size, damaged
from nitscale.errors import UserError
from nitscale.files import disk_errors, remove_leftovers, temporary_path

RETRY_SECONDS = 120.0
"""How long a request is repeated without a byte of progress before we give up; NITSCALE_S3_RETRY_SECONDS changes it."""
FIRST_PAUSE = 0.2
"""Seconds before the first repetition. Each further pause is twice as long; all are shortened by up to half at random,
so that a thousand processes do not come back at once."""
LONGEST_PAUSE = 20.0
NOTICE_SECONDS = 15.0
"""After this many seconds of trying in vain a warning says so."""
RECEIVE_BYTES = 64 << 10
"""Read from a connection at a time. What of it arrived before the connection broke is lost, so that after a failure it
begins with less."""
PART_BYTES = 32 << 20
"""Objects above this size are uploaded in parts of this size (larger ones where 10,000 parts would not do)."""
UPLOAD_THREADS = 4
"""Parts of one object on their way at once."""
UPLOAD_ATTEMPTS = 5
"""Times that an upload is begun when writers of the same name take it for a dead one's."""


class Service(Protocol):
    """Makes single requests. Can be pickled, and holds no secret then."""

    def call(self, operation: str, **parameters: Any) -> Any:
        """One request, made once. Passing, Refused, Hopeless or UserError if it fails."""

    def explain(self, error: Exception) -> Exception:
        """What an error that reading a reply's body raised is: Passing, Damaged, or itself."""

    def sends_checksums(self) -> bool:
        """Whether requests carry a checksum of their body already."""


class Passing(Exception):
    """A failure that may pass: overload, a lost connection, a garbled reply."""


class Hopeless(Exception):
    """A request that cannot be made; says why, and the way out."""


class Refused(Exception):
    """The service's answer is no."""

    def __init__(self, code: str, status: int) -> None:
        super().__init__(code, status)
        self.code, self.status = code, status


Spans: TypeAlias = list[tuple[int, int]]
"""Begin and end of the parts of an object, in bytes."""


class S3Storage:
    """Objects of a bucket whose keys begin with `folder`/."""

    def __init__(self, service: Service, bucket: str, folder: str) -> None:
        self.prefix = f"s3://{bucket}/{folder}" if folder else f"s3://{bucket}"
        self._service, self._bucket, self._folder = service, bucket, folder
        self._versions: dict[str, str] = {}
        """ETags of the objects that ranges were read from."""
        self._bucket_seen = False
        if folder:
            check_name(folder, f"s3://{bucket}")

    def __repr__(self) -> str:
        return f"S3Storage({self.prefix!r})"

    def read(self, name: str) -> bytes:
        for _ in range(DAMAGED_ATTEMPTS):
            data = bytearray()
            with suppress(Damaged):
                self._receive(name, data.extend, 0, None, whole=True)
                return bytes(data)
        raise damaged(self._uri(name))

    def read_range(self, name: str, offset: int, length: int) -> bytes:
        if length == 0:
            return b""
        data = bytearray()
        try:
            self._versions[name] = self._receive(
                name, data.extend, offset, offset + length, self._versions.get(name, "")
            )
        except OSError:
            self.forget(name)  # a retry takes the object as it then is
            raise
        return bytes(data)

    def write(self, name: str, data: bytes) -> None:
        view = memoryview(data)
        self._upload(name, len(data), lambda begin, end: bytes(view[begin:end]))

    def put_if_absent(self, name: str, data: bytes) -> bool:
        patience, writer = Patience(self._uri(name)), secrets.token_hex(16)
        parameters = {"Key": self._key(name), "IfNoneMatch": "*", "Metadata": {WRITER: writer}, **self._body(data)}
        try:
            self._request("put_object", name, parameters, (412,), patience)
        except Refused:
            # A request that took effect although its reply was lost is answered so when it is repeated.
            return patience.failures > 0 and self._is_from(name, writer, data)
        self.forget(name)
        return True

    @contextmanager
    def create(self, name: str) -> Iterator[Path]:
        self._key(name)  # complain about a wrong name before the work rather than after it
        path = temporary_path(scratch_folder() / "upload")
        with disk_errors(path):
            remove_leftovers(path.parent)
            try:
                yield path
                with open(path, "rb") as file:
                    self._upload(name, os.fstat(file.fileno()).st_size, functools.partial(part_of_file, file))
            finally:
                path.unlink(missing_ok=True)

    def download(self, name: str, path: Path, size: int, sha256: str | None = None) -> None:
        head, uri = self._head(name), self._uri(name)
        check_size(uri, head["ContentLength"], size)
        etag = head["ETag"]

        def receive(take: Callable[[bytes], object], begin: int) -> None:
            self._receive(name, take, begin, size, etag, whole=True)

        version = hashlib.sha256(f"{uri} {etag} {size}".encode()).hexdigest()[:16]
        download(uri, version, path, size, sha256, receive)

    def exists(self, name: str) -> bool:
        try:
            self._head(name)
        except MissingObject:
            return False
        return True

    def size(self, name: str) -> int:
        head = self._head(name)
        self._versions[name] = head["ETag"]
        return int(head["ContentLength"])

    def list(self, folder: str, recursive: bool = False) -> dict[str, int]:
        root = f"{self._folder}/" if self._folder else ""
        begin = f"{self._key(folder)}/" if folder else root
        parameters = {"Prefix": begin} | ({} if recursive else {"Delimiter": "/"})
        found = {}
        while True:
            page = self._request("list_objects_v2", folder, parameters)
            for item in page.get("Contents", ()):
                # Nor what a folder could not hold: "a//b", or "a/", as some tools mark a folder.
                if not re.search(r"(^|/)(\.|/|$)", item["Key"][len(begin) :]):
                    found[item["Key"][len(root) :]] = int(item["Size"])
            if not page.get("IsTruncated"):
                return dict(sorted(found.items()))
            parameters["ContinuationToken"] = page["NextContinuationToken"]

    def delete(self, name: str) -> None:
        self._request("delete_object", name, {"Key": self._key(name)})
        self.forget(name)

    def forget(self, name: str) -> None:
        self._versions.pop(name, None)

    def exclusive(self, purpose: str) -> AbstractContextManager[None]:
        return nullcontext()

    def _uri(self, name: str) -> str:
        return f"{self.prefix}/{name}" if name else self.prefix

    def _key(self, name: str) -> str:
        check_name(name, self.prefix)
        return f"{self._folder}/{name}" if self._folder else name

    def _request(
        self,
        operation: str,
        name: str,
        parameters: dict[str, Any],
        expected: Collection[int | str] = (),
        patience: "Patience | None" = None,
    ) -> Any:
        """One request, repeated until it is answered. Refused if the answer is one of `expected` (a status or an S3
        error code), StorageError or UserError for any other no."""
        patience = patience or Patience(self._uri(name))
        while True:
            try:
                return self._service.call(operation, Bucket=self._bucket, **parameters)
            except (Passing, Hopeless, Refused) as error:
                if isinstance(error, Refused) and (error.code in expected or error.status in expected):
                    raise
                self._wait_or_raise(error, name, patience)

    def _receive(
        self,
        name: str,
        take: Callable[[bytes], object],
        begin: int,
        end: int | None,
        etag: str = "",
        whole: bool = False,
    ) -> str:
        """Pass bytes `begin` to `end` of the object to `take`, in order and each once, over as many requests as it
        takes, all of one version, whose ETag is returned. `whole`: `end` is the object's (None if not yet known).
        Damaged if the service's own checksum does not match."""
        patience, position, key = Patience(self._uri(name)), begin, self._key(name)
        at_once = RECEIVE_BYTES
        while True:
            parameters = {"IfMatch": etag} if etag else {}
            ranged = position > 0 or not whole
            if ranged:
                parameters["Range"] = f"bytes={position}-" if end is None else f"bytes={position}-{end - 1}"
            try:
                reply = self._service.call("get_object", Bucket=self._bucket, Key=key, **parameters)
                with closing(reply["Body"]) as body:
                    end = self._check_reply(reply, name, position, end, ranged)
                    etag = etag or reply["ETag"]
                    while chunk := self._read(body, at_once):  # to the very end, where checksums are compared
                        if position + len(chunk) > end:
                            raise Passing(f"more than the {end - begin:,} bytes asked for")
                        take(chunk)
                        position += len(chunk)
                        patience.progress()
                        at_once = min(2 * at_once, RECEIVE_BYTES)
                if position != end:
                    raise Passing(f"{position - begin:,} of {end - begin:,} bytes")
                return etag
            except (Passing, Hopeless, Refused) as error:
                self._wait_or_raise(error, name, patience)
                at_once = max(at_once // 4, 64)

    def _read(self, body: Any, length: int) -> bytes:
        try:
            return bytes(body.read(length))
        except Exception as error:
            raise self._service.explain(error) from None

    def _check_reply(self, reply: Any, name: str, position: int, end: int | None, ranged: bool) -> int:
        """Where the reply's bytes end. Passing unless they are those that were asked for."""
        length = reply.get("ContentLength")
        if not ranged:
            if length is None or end not in (None, length):
                raise Passing(f"{length} bytes instead of {end}")
            return int(length)
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", reply.get("ContentRange") or "")
        if match is None:
            raise Passing("no range, although one was asked for")
        first, last, total = map(int, match.groups())
        end = total if end is None else end
        if total < end:
            raise self._truncated(name, f"it has {total:,} bytes where {end:,} were expected")
        if (first, last + 1, length) != (position, end, end - position):
            raise Passing(f"bytes {first}-{last} ({length}) instead of {position}-{end - 1}")
        return end

    def _head(self, name: str) -> Any:
        """What the service knows of the object. MissingObject if there is none."""
        try:
            head = self._request("head_object", name, {"Key": self._key(name)}, (404,))
        except Refused:
            # The answer to HEAD has no body, which would tell a missing bucket from a missing object.
            if not self._bucket_seen:
                with suppress(Refused):
                    self._request("list_objects_v2", name, {"Prefix": self._key(name), "MaxKeys": 1}, (403,))
            self._bucket_seen = True
            raise self._missing(name) from None
        self._bucket_seen = True
        return head

    def _is_from(self, name: str, writer: str, data: bytes) -> bool:
        """Whether the object is the one that this writer put there."""
        try:
            metadata = self._head(name).get("Metadata")
            # A store that keeps no metadata leaves the bytes to compare.
            return metadata.get(WRITER) == writer if metadata else self.read(name) == data
        except MissingObject:
            return False

    def _body(self, data: bytes) -> dict[str, Any]:
        """Parameters for a body, with a checksum in any case: the MD5 that every store knows where the newer ones are
        not wanted."""
        if self._service.sends_checksums():
            return {"Body": data}
        return {
            "Body": data,
            "ContentMD5": base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode(),
        }

    def _upload(self, name: str, size: int, part: Callable[[int, int], bytes]) -> None:
        """Create or replace the object whose bytes begin … end are `part(begin, end)`."""
        if size <= PART_BYTES:
            self._request("put_object", name, {"Key": self._key(name), **self._body(part(0, size))})
            return self.forget(name)
        length = max(PART_BYTES, -(-size // 10_000))
        spans: Spans = [(begin, min(begin + length, size)) for begin in range(0, size, length)]
        hasher = hashlib.sha256()
        for span in spans:
            hasher.update(part(*span))
        for _ in range(UPLOAD_ATTEMPTS):
            try:
                self._upload_parts(name, spans, part, hasher.hexdigest())
            except Refused:
                # There is no such upload any more. Either it was completed and the reply was lost, or a writer of this
                # name who was done first took it for a dead one's.
                if not self._has_content(name, hasher.hexdigest()):
                    continue
            self.forget(name)
            return self._abort_others(name)
        raise StorageError(errno.EIO, f"storage: other writers of {self._uri(name)} kept ending this upload; stop them")

    def _upload_parts(self, name: str, spans: Spans, part: Callable[[int, int], bytes], sha256: str) -> None:
        """An upload in parts, ended in any case. Refused if somebody else ended it."""
        key, gone = {"Key": self._key(name)}, ("NoSuchUpload",)
        algorithm = {"ChecksumAlgorithm": "CRC32"} if self._service.sends_checksums() else {}
        begin = {**key, "Metadata": {CONTENT: sha256}, **algorithm}
        upload = {**key, "UploadId": self._request("create_multipart_upload", name, begin)["UploadId"]}

        def send(number: int, span: tuple[int, int]) -> dict[str, Any]:
            parameters = {**upload, "PartNumber": number, **self._body(part(*span))}
            reply = self._request("upload_part", name, parameters, gone)
            return {
                "PartNumber": number,
                **{field: reply[field] for field in ("ETag", "ChecksumCRC32") if field in reply},
            }

        try:
            with ThreadPoolExecutor(UPLOAD_THREADS) as pool:
                futures = [pool.submit(send, number, span) for number, span in enumerate(spans, 1)]
                try:
                    parts = [future.result() for future in futures]
                except BaseException:
                    pool.shutdown(wait=True, cancel_futures=True)  # a part that came after the end would stay for ever
                    raise
            self._request("complete_multipart_upload", name, {**upload, "MultipartUpload": {"Parts": parts}}, gone)
        except Refused:
            raise
        except BaseException:
            with suppress(OSError, UserError, Refused):
                self._request("abort_multipart_upload", name, upload, gone)
            raise

    def _has_content(self, name: str, sha256: str) -> bool:
        try:
            return bool(self._head(name).get("Metadata", {}).get(CONTENT) == sha256)
        except MissingObject:
            return False

    def _abort_others(self, name: str) -> None:
        """End the uploads that killed writers of this name left: nobody sees them, but they are paid for. Only now that
        the object is there: a living writer of the name then finds it, and two never end each other's for ever."""
        parameters: dict[str, Any] = {"Prefix": self._key(name)}
        with suppress(OSError, UserError, Refused):  # to list uploads is a right of its own, and this only tidies up
            while True:
                page = self._request("list_multipart_uploads", name, parameters)
                for upload in page.get("Uploads", ()):
                    if upload["Key"] == self._key(name):
                        with suppress(Refused):
                            ended = {"Key": upload["Key"], "UploadId": upload["UploadId"]}
                            self._request("abort_multipart_upload", name, ended, ("NoSuchUpload",))
                if not page.get("IsTruncated"):
                    return
                parameters |= {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def _wait_or_raise(self, error: Exception, name: str, patience: "Patience") -> None:
        """After a failed request: wait for the next attempt, or raise what the caller is to see. The service's own
        words are not passed on, because some quote the signed request."""
        uri = self._uri(name)
        if isinstance(error, Passing):
            return patience.wait(str(error))
        if isinstance(error, Hopeless):
            raise UserError(f"storage: cannot ask for {uri}: {error}") from None
        assert isinstance(error, Refused)
        code, status = error.code, error.status
        if code in REPEATED or status in REPEATED:
            return patience.wait(f"{code}, {status}")
        if code == "NoSuchBucket":
            advice = "check its name, AWS_ENDPOINT_URL and AWS_PROFILE"
            raise UserError(f"storage: there is no bucket {self._bucket!r} for {uri}; {advice}") from None
        if status == 404:
            raise self._missing(name) from None
        if status == 412:
            raise StorageError(
                errno.EIO, f"storage: {uri} was replaced while it was being read; read it anew once its writer is done"
            ) from None
        if status == 416:
            raise self._truncated(name, "it ends before the first byte that was asked for") from None
        advice = ADVICE.get(code) or ADVICE.get(status) or "check the name, AWS_ENDPOINT_URL and AWS_REGION"
        raise UserError(f"storage: the service refuses {uri} ({code}, {status}): {advice}") from None

    def _missing(self, name: str) -> MissingObject:
        return MissingObject(
            errno.ENOENT, f"storage: there is no object {self._uri(name)}; check the name, or make it first"
        )

    def _truncated(self, name: str, reason: str) -> StorageError:
        advice = "copy it again or make it anew"
        return StorageError(errno.EIO, f"storage: {self._uri(name)} is truncated: {reason}; {advice}")


WRITER, CONTENT = "nitscale-writer", "nitscale-sha256"
"""Metadata of objects, by which a writer knows its own."""
REPEATED: set[int | str] = {408, 429, 500, 502, 503, 504} | {
    "SlowDown",
    "InternalError",
    "ServiceUnavailable",
    "RequestTimeout",
    "Throttling",
    "ThrottlingException",
    "RequestLimitExceeded",
    "BandwidthLimitExceeded",
    "OperationAborted",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "BadDigest",
    "XAmzContentChecksumMismatch",
    "XAmzContentSHA256Mismatch",
}
"""Statuses and S3 error codes of requests to repeat: too many at once, or damaged on the way."""
ADVICE: dict[int | str, str] = {
    "InvalidAccessKeyId": "the access key is unknown there; check AWS_PROFILE, AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL",
    "SignatureDoesNotMatch": "the secret does not belong to the access key; check AWS_PROFILE or AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "the credentials have expired; get new ones and run again",
    "InvalidToken": "the session token is wrong; check AWS_SESSION_TOKEN",
    "RequestTimeTooSkewed": "this machine's clock is wrong; set it",
    "InvalidObjectState": "the object is archived; restore it first",
    "NotImplemented": "this object store lacks what is needed, conditional writes perhaps; use a newer version of it",
    401: "check AWS_PROFILE or the AWS_… variables",
    403: "not allowed; check AWS_PROFILE and the rights of that user (without s3:ListBucket a missing object is "
    "answered so, too)",
}
"""What a user can do about S3 error codes and statuses."""


class Patience:
    """Waits between the attempts at one thing, longer and longer, until nothing has come of it for RETRY_SECONDS."""

    def __init__(self, uri: str) -> None:
        self.failures = 0
        self._uri, self._pauses, self._since, self._warned = uri, 0, time.monotonic(), False
        text = os.environ.get("NITSCALE_S3_RETRY_SECONDS")
        try:
            self._seconds = float(text) if text else RETRY_SECONDS
        except ValueError:
            raise UserError(f"storage: NITSCALE_S3_RETRY_SECONDS is {text!r}; give a number of seconds") from None

    def progress(self) -> None:
        """Something came of it: the time starts anew."""
        self._pauses, self._since = 0, time.monotonic()

    def wait(self, reason: str) -> None:
        """Wait for the next attempt. StorageError if there is to be none."""
        self.failures += 1
        pause = min(FIRST_PAUSE * 2**self._pauses, LONGEST_PAUSE) * _jitter.uniform(0.5, 1)
        self._pauses += 1
        waited = time.monotonic() - self._since
        if waited + pause > self._seconds:
            raise StorageError(
                errno.EIO,
                f"storage: gave up {self._uri} after {self.failures} attempts, the last {waited:.0f} s in vain "
                f"({reason}); check the network and AWS_ENDPOINT_URL, then run again",
            ) from None
        if waited > NOTICE_SECONDS and not self._warned:
            self._warned = True
            warnings.warn(f"storage: still trying to reach {self._uri} ({reason})", stacklevel=2)
        time.sleep(pause)


_jitter = random.SystemRandom()
"""Not Python's shared generator: its state belongs to whoever seeded it, and forked processes would all wait alike."""


def scratch_folder() -> Path:
    """The folder in which this user's objects wait for their upload: on the disk of TMPDIR."""
    folder = Path(tempfile.gettempdir(), f"nitscale-{os.getuid()}")
    with disk_errors(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise UserError(f"storage: {folder} belongs to somebody else; set TMPDIR to a folder of your own")
    return folder


def part_of_file(file: BinaryIO, begin: int, end: int) -> bytes:
    """Bytes `begin` to `end` of a local file, read without moving its position."""
    data = b""
    while more := os.pread(file.fileno(), end - begin - len(data), begin + len(data)):
        data += more
    return data
