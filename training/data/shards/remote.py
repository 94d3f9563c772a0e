"""Bytes of files that lie elsewhere: ranges over HTTP(S), of files on the Hub, and in the stores that fsspec knows.

A remote file is named by its URL, after which may follow the version that is to be read:

    https://host/00000.tar#0123456789abcdef
    hf://datasets/user/name@<commit>/data/00000.parquet
    s3://bucket/00000.tar#0123456789abcdef

Requests that fail for a time are made again. What fails for good is a `RemoteError`, and not an `OSError`: an image
that could not be received is not a broken one, which might be skipped.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar
from urllib.parse import urljoin, urlsplit

from pipelines.tools.cli import cause, printable
from training.data.errors import WorkerError

if TYPE_CHECKING:
    import requests

T = TypeVar("T")

logger = logging.getLogger("halftone")

HUB = "hf://datasets/"
STORES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs"}
"""Protocols of fsspec that are read, and the package that each of them needs"""
PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)
"""Seconds before a failed request is made again, two minutes in all"""
PAUSES_AT_START = PAUSES[:3]
LONGEST_PAUSE = 300.0
"""Limit in seconds of a pause that a server asks for"""
CONNECT_SECONDS, READ_SECONDS = 10, 30
_MOST_REDIRECTS = 5
_BUSY = (408, 425, 429)
_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, ValueError, NotImplementedError, ImportError)
"""Errors of a store that another request would not cure, and those of the libraries for S3, Google and Azure that have
found no valid login"""
_WITHOUT_LOGIN = {
    *("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError"),
    *("DefaultCredentialsError", "RefreshError", "ClientAuthenticationError"),
}
_VERSION = re.compile(r"#([0-9a-f]{16})$")


class RemoteError(WorkerError):
    """A remote file cannot be read, or has changed."""


class RemoteState(NamedTuple):
    """Size in bytes of a remote file, and its version: 16 hexadecimal digits that change with its content."""

    size: int
    version: str


def is_remote(name: str) -> bool:
    """Return whether a name is the URL of files that can be read in ranges."""
    return name.startswith(("http://", "https://", "hf://")) or name.partition("://")[0] in STORES and "://" in name


def split_version(url: str) -> tuple[str, str | None]:
    """Return a URL without the version after it, and this version; None if the URL has none."""
    found = _VERSION.search(url)
    return (url[: found.start()], found[1]) if found else (url, None)


def state_of(url: str, *, patient: bool = False) -> RemoteState:
    """Return the size and the version of a remote file, after one request of its first byte.

    Args:
        patient: whether to wait for minutes for a host that does not answer, as in a training, and not for seconds.

    Raises:
        RemoteError: the file does not exist or cannot be read in ranges, or its host does not answer.
    """
    return _range(url, 0, 1, PAUSES if patient else PAUSES_AT_START)[1]


def read_range(url: str, start: int, stop: int) -> bytes:
    """Return the bytes `start <= byte < stop` of a remote file; fewer if it ends before.

    Raises:
        RemoteError: the file cannot be read, or has changed since the version in its URL.
    """
    return _range(url, start, stop, PAUSES)[0] if stop > start else b""


class _Failed(Exception):
    """A request failed in a way that may pass."""

    def __init__(self, reason: str, pause: float = 0.0):
        super().__init__(reason)
        self.pause = pause


def _range(url: str, start: int, stop: int, pauses: tuple[float, ...]) -> tuple[bytes, RemoteState]:
    address, version = split_version(url)
    read = _stored if address.partition("://")[0] in STORES else _over_http
    got = bytearray()
    state = _repeated(lambda: read(address, start, stop, got, version), address, pauses, got)
    return bytes(got), state


def _repeated(request: Callable[[], T], address: str, pauses: tuple[float, ...], got: Sequence[Any] = ()) -> T:
    """Return the result of a request, which is made again if it fails in a way that may pass.

    Args:
        pauses: seconds before each further request.
        got: what requests have received. It is not asked for again, and the pauses begin from the first if it grows.
    """
    tried = 0
    while True:
        before = len(got)
        try:
            return request()
        except _Failed as failure:
            tried = 0 if len(got) > before else tried
            if tried == len(pauses):
                raise RemoteError(
                    f"{printable(address)} cannot be read ({failure}, {tried + 1} times); check the network and the "
                    "server, and run the command again"
                ) from None
            pause = min(LONGEST_PAUSE, max(pauses[tried], failure.pause))
            logger.warning("%s: %s; it is read again in %.0f s", printable(address), failure, pause)
            time.sleep(pause)
            tried += 1


def _require_version(address: str, state: RemoteState, version: str | None) -> None:
    if version is not None and state.version != version:
        raise RemoteError(
            f"the shard {printable(address)} has changed since the training data were opened; restore it, or start a "
            "new run with the data as they are now"
        )


def _over_http(address: str, start: int, stop: int, got: bytearray, version: str | None) -> RemoteState:
    """Append the bytes from `start + len(got)` on to `got`; those that arrived stay there if the rest does not."""
    import requests

    first = start + len(got)
    try:
        with _answer(address, first, stop) as response:
            state = _state(address, response, first)
            _require_version(address, state, version)
            wanted = min(stop, state.size) - start
            for part in response.iter_content(2**18):
                got += part
        if len(got) < wanted:
            raise _Failed("the connection was closed early")
        del got[wanted:]
        return state
    except requests.RequestException as error:  # among them timeouts and connections that are cut
        raise _Failed(_reason(error)) from None


def _reason(error: Exception) -> str:
    """Return what happened, without the URL and the nested exceptions that messages of `requests` repeat."""
    import requests

    if isinstance(error, requests.Timeout):
        return "the server does not answer"
    if isinstance(error, requests.exceptions.SSLError):
        return f"no secure connection: {cause(_innermost(error))[:150]}"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection was cut"
    found = re.search(r"\[Errno -?\d+\] [^\"')]+|Name or service not known|RemoteDisconnected", str(error))
    return f"no connection: {found[0] if found else type(error).__name__}"


def _innermost(error: BaseException) -> BaseException:
    """Return the error that the libraries for HTTP have wrapped, whose message has no URL."""
    for inner in (getattr(error, "reason", None), *error.args):
        if isinstance(inner, BaseException):
            return _innermost(inner)
    return error


@contextmanager
def _answer(address: str, start: int, stop: int) -> Iterator[requests.Response]:
    """Request a range, following redirects: from the Hub anywhere, and otherwise on the same host."""
    url, headers = _hub_request(address) if address.startswith("hf://") else (address, {})
    for _ in range(_MOST_REDIRECTS):
        response = _session().get(
            url,
            headers={**headers, "Range": f"bytes={start}-{stop - 1}"},
            stream=True,
            timeout=(CONNECT_SECONDS, READ_SECONDS),
            allow_redirects=False,
            auth=_unchanged if address.startswith("hf://") else None,
        )
        with response:
            if not response.is_redirect:
                _require_content(address, response)
                yield response
                return
            target = urljoin(url, response.headers["Location"])
        if not address.startswith("hf://"):
            _require_same_host(address, url, target)
        if urlsplit(target)[:2] != urlsplit(url)[:2]:
            headers = {}  # a token is for the Hub, and not for the storage that its files are in
        url = target
    raise RemoteError(f"{printable(address)} redirects more than {_MOST_REDIRECTS} times; give another URL")


def _require_same_host(address: str, url: str, target: str) -> None:
    """Raise RemoteError for a redirect from `url` to `target` that `requests` must not follow: it would send the
    password in ~/.netrc, to another host or without encryption."""
    before, after = urlsplit(url), urlsplit(target)
    if after.hostname != before.hostname:
        raise RemoteError(
            f"{printable(address)} redirects to another host ({printable(after.hostname)}); redirects to other hosts "
            "are not followed: give the URL at that host"
        )
    if after.scheme != before.scheme and (before.scheme, after.scheme) != ("http", "https"):
        raise RemoteError(
            f"{printable(address)} redirects from {before.scheme} to {printable(after.scheme)}, which is not followed; "
            "give another URL"
        )


def _unchanged(request: Any) -> Any:
    """Keep `requests` from replacing the token by what ~/.netrc has."""
    return request


def _require_content(address: str, response: requests.Response) -> None:
    status = response.status_code
    if status == 206:
        return
    if status in _BUSY or status >= 500:
        raise _Failed(f"the server answers with status {status}", _pause_asked_for(response))
    on_hub = address.startswith("hf://")
    reason = {
        200: "its server does not send parts of files (range requests), which streaming needs; download the shards",
        401: "it needs a login (status 401)",
        403: "access is refused (status 403)",
        404: "it does not exist (status 404); check the URL",
        410: "it does not exist any more (status 410)",
        416: "it is shorter than it was, or empty (status 416); restore it",
    }.get(status, f"the server answers with status {status}; check the URL")
    if status in (401, 403):
        reason += (
            ": run `hf auth login`, and accept the terms of the dataset on its page"
            if on_hub
            else (": check the URL, and give user and password for its host in ~/.netrc if it needs them")
        )
    raise RemoteError(f"the shard {printable(address)} cannot be read: {reason}")


def _pause_asked_for(response: requests.Response) -> float:
    """Return for how many seconds a server asks to wait; the Hub says when its limit of requests ends."""
    found = re.fullmatch(r"\s*(\d+)\s*", response.headers.get("Retry-After", ""))
    found = found or re.search(r"\bt=(\d+)", response.headers.get("RateLimit", ""))
    return float(found[1]) if found else 0.0


def _state(address: str, response: requests.Response, start: int) -> RemoteState:
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
    if not found or int(found[1]) != start:
        raise RemoteError(
            f"the shard {printable(address)} cannot be read: its server sends another part of the file than it is "
            "asked for; download the shards"
        )
    size = int(found[2])
    tag = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
    return RemoteState(size, version_of(size, tag))


def version_of(size: int, tag: str) -> str:
    """Return the version of a file, from its size and what its server says of its content: an ETag, or a time."""
    return hashlib.sha256(f"{size} {tag.removeprefix('W/')}".encode()).hexdigest()[:16]


def _hub_request(address: str) -> tuple[str, dict[str, str]]:
    """Return the URL of a file on the Hub, and the headers with which it is requested."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    if constants.HF_HUB_OFFLINE:
        raise RemoteError(f"{printable(address)} cannot be read, because HF_HUB_OFFLINE is set; unset it")
    repo, _, rest = address.removeprefix(HUB).partition("@")
    revision, _, path = rest.partition("/")
    return hf_hub_url(repo, path, repo_type="dataset", revision=revision), build_hf_headers()


class _Local(threading.local):
    session: requests.Session | None = None


_LOCAL = _Local()


def _session() -> requests.Session:
    """Return the connections of this thread, which are kept open."""
    import requests

    if _LOCAL.session is None:
        _LOCAL.session = requests.Session()
        _LOCAL.session.headers["Accept-Encoding"] = "identity"  # places are those of the file as it is stored
    return _LOCAL.session


def _forget_in_child() -> None:
    """A forked process has connections of its own."""
    global _LOCAL
    _LOCAL = _Local()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)


def store_of(url: str) -> tuple[Any, str]:
    """Return the file system of fsspec for a URL, and the path there.

    Raises:
        RemoteError: its package is not installed, or it cannot be opened.
    """
    import fsspec

    protocol = url.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError:
        raise RemoteError(
            f"{protocol}:// needs the package {STORES[protocol]}; install it with `pip install {STORES[protocol]}`"
        ) from None
    except Exception as error:  # each store has errors of its own
        raise RemoteError(f"{printable(url)} cannot be opened ({cause(error)}); check the URL and the login") from None


def tag_of(about: dict[str, Any]) -> str:
    """Return what a store says about the content of a file: an ETag, or when it was written."""
    names = ("ETag", "etag", "LastModified", "mtime", "created")
    return str(next((about[name] for name in names if about.get(name) is not None), ""))


def _stored(address: str, start: int, stop: int, got: bytearray, version: str | None) -> RemoteState:
    store, path = store_of(address)
    try:
        store.invalidate_cache()
        about = store.info(path)
        if about.get("type") == "directory":
            raise IsADirectoryError("it is a folder")
        state = RemoteState(about["size"], version_of(about["size"], tag_of(about)))
        _require_version(address, state, version)
        got[:] = store.cat_file(path, start=start, end=min(stop, state.size))
        return state
    except RemoteError:
        raise
    except Exception as error:  # each store has errors of its own
        _raise_of_store(error, f"the shard {printable(address)}")


def find_in_store(url: str) -> list[str]:
    """Return the URLs of the files that match a URL with *, ? or [, or that are in a folder.

    Raises:
        RemoteError: the store cannot be read.
    """
    start, _, rest = url.partition("://")
    place = f"{start}://{rest.partition('/')[0]}/"  # with the account, which paths in the store do not have

    def found() -> list[str]:
        store, path = store_of(url)
        try:
            files = store.glob(path) if has_wildcard(path) else store.find(path)
        except Exception as error:  # each store has errors of its own
            _raise_of_store(error, printable(url))
        return [place + file.lstrip("/").partition("/")[2] for file in files]

    return _repeated(found, url, PAUSES_AT_START)


def has_wildcard(name: str) -> bool:
    """Return whether a name is a pattern of files."""
    return any(character in name for character in "*?[")


def _raise_of_store(error: Exception, what: str) -> NoReturn:
    """Raise RemoteError for an error of a store that stays, and _Failed for any other: those of a network have as many
    types as there are stores."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, _PERMANENT) or names & _WITHOUT_LOGIN:
        raise RemoteError(f"{what} cannot be read ({cause(error)}); check the URL and the login") from None
    raise _Failed(cause(error)) from None
