"""Where data lies: a prefix that names a local folder or an S3 bucket, and the storage behind it.

This file is where boto3's quirks are kept. It is told to try each request once (its own repetitions are few, and none
once a body has begun); its clients are not shared between processes; and its errors become words that hold no secret.
"""

import functools
import os
import re
import threading
from pathlib import Path
from typing import Any

from nitscale.data.download import Damaged
from nitscale.data.folder import LocalStorage
from nitscale.data.objects import MissingObject, RangedFile, Storage, StorageError
from nitscale.data.s3 import Hopeless, Passing, Refused, S3Storage
from nitscale.errors import UserError

__all__ = ["MissingObject", "RangedFile", "Storage", "StorageError", "open_object", "open_storage"]

CONNECT_SECONDS = 5.0
STALL_SECONDS = 20.0
"""A connection that brings nothing for so long is given up, and the request repeated."""
CONNECTIONS = 16
"""That one process keeps open."""
SCHEME = r"([A-Za-z][A-Za-z0-9+.-]+):/+"
"""One slash will do: a Path swallows the other."""


def open_storage(prefix: str | Path) -> Storage:
    """The storage behind `prefix`: a folder, or `s3://bucket/prefix`. UserError for any other scheme."""
    text = str(prefix)
    match = re.match(SCHEME, text)
    if match is None:
        return LocalStorage(text)
    if match[1].lower() != "s3":
        raise UserError(
            f"storage: {text!r} is neither a folder nor s3://bucket/prefix; for another object store that speaks "
            "S3 write s3://… and set AWS_ENDPOINT_URL"
        )
    bucket, _, folder = text[match.end() :].strip("/").partition("/")
    if not bucket:
        raise UserError(f"storage: {text!r} names no bucket; write s3://bucket/prefix")
    return S3Storage(_Boto(), bucket, folder)


def open_object(uri: str | Path) -> tuple[Storage, str]:
    """The storage of the folder that holds the object `uri`, and its name there. UserError if it names none."""
    text = str(uri)
    folder, slash, name = text.rpartition("/")
    if name in ("", ".", "..") or re.fullmatch(SCHEME, folder + slash):
        raise UserError(f"storage: {text!r} names no object; write folder/name or s3://bucket/folder/name")
    return open_storage(folder or slash or "."), name


class _Boto:
    """S3 by boto3. Endpoint, profile, credentials and the rest come from the environment, so that forked and spawned
    processes have them."""

    def call(self, operation: str, **parameters: Any) -> Any:
        try:
            return getattr(_client(), operation)(**parameters)
        except UserError:
            raise
        except Exception as error:
            # None: tracebacks go to logs, and the original error may quote the signed request.
            raise self.explain(error) from None

    def sends_checksums(self) -> bool:
        # AWS_REQUEST_CHECKSUM_CALCULATION is for stores that do not know the newer ones.
        return str(_client().meta.config.request_checksum_calculation).lower() != "when_required"

    def explain(self, error: Exception) -> Exception:
        from botocore import exceptions, parsers

        if isinstance(error, exceptions.ClientError):
            code = error.response.get("Error", {}).get("Code", "")
            return Refused(str(code), int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)))
        if isinstance(error, exceptions.FlexibleChecksumError):
            return Damaged()
        text = re.sub(r"//[^/@\s]*@", "//", str(error))  # no user:password@ of an endpoint
        if isinstance(error, exceptions.HTTPClientError) and isinstance(error.kwargs.get("error"), ValueError):
            return Hopeless(
                "credentials or endpoint hold what HTTP forbids; look for line breaks in the AWS_… variables"
            )
        if isinstance(error, exceptions.SSLError) and "CERTIFICATE_VERIFY_FAILED" in text:
            return Hopeless("the endpoint's certificate is not trusted; set AWS_CA_BUNDLE to the file of its authority")
        passing = (
            exceptions.ConnectionError,
            exceptions.HTTPClientError,
            exceptions.IncompleteReadError,
            parsers.ResponseParserError,
            ConnectionError,
            TimeoutError,
        )
        if isinstance(error, passing):
            return Passing(f"{type(error).__name__}: {text}")
        if isinstance(error, (exceptions.NoCredentialsError, exceptions.PartialCredentialsError)):
            return Hopeless("no credentials; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
        if isinstance(error, exceptions.ParamValidationError):
            return Hopeless("bucket or object cannot have that name; choose another")
        if isinstance(error, exceptions.BotoCoreError):
            return Hopeless(f"{text}; check AWS_PROFILE, AWS_ENDPOINT_URL and the name of the bucket")
        if isinstance(error, ValueError) and "endpoint" in text:
            return Hopeless(f"{text}; write AWS_ENDPOINT_URL as http(s)://host:port")
        return error


def _client() -> Any:
    """This process's client for the settings in the environment. A client never serves two processes: connections
    inherited by fork would mix up their replies."""
    settings = [item for item in os.environ.items() if item[0].startswith(("AWS_", "NITSCALE_S3_"))]
    key = (os.getpid(), hash(frozenset(settings)))  # a hash, to keep no secrets
    client = _clients.get(key)
    if client is None:
        with _clients_lock:  # to make a client is not thread-safe, to use one is
            client = _clients.get(key)
            if client is None:
                client = _clients[key] = _make_client()
    return client


def _make_client() -> Any:
    try:
        import boto3
        import botocore.session
        from botocore.config import Config
    except ImportError:
        raise UserError("storage: s3:// needs boto3; install it by: pip install 'nitscale[s3]'") from None
    style = os.environ.get("NITSCALE_S3_PATH_STYLE") or ""
    if style not in ("", "0", "1"):
        raise UserError(
            f"storage: NITSCALE_S3_PATH_STYLE is {style!r}; give 1 (endpoint/bucket/key), 0 (bucket.endpoint/key), or "
            "nothing to let boto3 choose"
        )
    config = Config(
        connect_timeout=CONNECT_SECONDS,
        read_timeout=STALL_SECONDS,
        retries={"total_max_attempts": 1, "mode": "standard"},
        max_pool_connections=CONNECTIONS,
        tcp_keepalive=True,
        s3={"addressing_style": "path" if style == "1" else "virtual"} if style else None,
    )
    # Most of a client's making is reading the description of S3, which forked processes may well share.
    base = botocore.session.get_session()
    base.register_component("data_loader", _descriptions())
    # boto3 1.44 reads AWS_DEFAULT_REGION, but not the AWS_REGION that other tools set.
    session = boto3.session.Session(botocore_session=base, region_name=os.environ.get("AWS_REGION"))
    return session.client("s3", config=config)


@functools.cache
def _descriptions() -> Any:
    from botocore.loaders import create_loader

    return create_loader(os.environ.get("AWS_DATA_PATH"))


_clients: dict[tuple[int, int], Any] = {}
_clients_lock = threading.Lock()
_inherited: list[Any] = []
"""Clients of parent processes, kept so that nothing closes their connections."""


def _after_fork() -> None:
    """A thread of the parent may have held the lock when this process came to be."""
    global _clients, _clients_lock
    _inherited.append(_clients)
    _clients, _clients_lock = {}, threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
