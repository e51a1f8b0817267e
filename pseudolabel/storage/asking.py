"""Asking a storage through fsspec: again after what may pass, each time with a deadline, and one error for the rest.

What may pass is a reset, a 503 or 429, an answer that is slow or cut; the pauses grow and are random. What is wrong for
good (no such bucket, wrong credentials) is not asked again.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import importlib
import os
import re
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

from pseudolabel.errors import StorageError

EXTRAS = {"s3": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "hf": "hf", "http": "http"}
EXTRAS["https"] = "http"  # what to install for a scheme
WEB = ("http", "https")
CHECK_PLACE = "check the name of the bucket and the path"
_TRIES = 7
_LONGEST_PAUSE = 15.0  # seconds between two tries
_DEADLINE = 60.0  # seconds for one try, and one more for each _SLOWEST bytes
_SLOWEST = 1 << 20
_LOOK = 0.2  # seconds between two looks whether it is still wanted
_PASSING_CODES = ("RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch", "OperationAborted")
_PASSING_STATUS = (408, 409, 425, 429)
_CONDITION_CODES = ("PreconditionFailed", "ConditionalRequestConflict", "412")
_FINAL = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError, ImportError)
_FINAL_NAMES = ("Credential", "ProfileNotFound", "ParamValidation", "InvalidRegion")  # parts of, in all libraries
_REFUSED = (TypeError, AttributeError, NotImplementedError, ValueError)  # asking again changes nothing
_WITHOUT_REASON = "An error occurred () when calling the "
_given_up = False


class Unfit(Exception):
    """The storage doesn't know what was asked of it."""


def give_up() -> None:
    """Answer nothing any more: this process is ending. Threads that ask would keep it for as long as they try."""
    global _given_up
    _given_up = True


def ask(
    url: str,
    doing: str,
    verb: str,
    *arguments: Any,
    size: int = 0,
    check: Callable[[Any], Any] | None = None,
    **options: Any,
) -> Any:
    """`verb` of the file system of `url`, tried until it succeeds or can't. `size` is in bytes; `check` gets the answer
    and may raise for one that is no good.

    Raises:
        FileNotFoundError, FileExistsError: what they mean is the caller's to say.
        Unfit: there is no such verb, or option of it.
        StorageError: all else.
    """
    import tenacity

    system = file_system(url.partition("://")[0], os.getpid())
    seconds = _DEADLINE + size / _SLOWEST

    def once() -> Any:
        try:
            found = call(system, verb, seconds, arguments, options)
        except FileNotFoundError as error:  # of the web's files fsspec says so whatever went wrong
            if error.__cause__ is not None and url.startswith(WEB) and _status(error) not in (404, 410):
                raise error.__cause__ from None
            raise
        return found if check is None else check(found)

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_may_pass),
        wait=tenacity.wait_random_exponential(multiplier=0.2, max=_LONGEST_PAUSE),
        stop=tenacity.stop_after_attempt(_TRIES),
        sleep=_sleep,
        reraise=True,
    )
    try:
        return retrying(once)
    except (FileNotFoundError, FileExistsError, StorageError):
        raise
    except Exception as error:  # each storage has errors of its own
        if _code(error) in _CONDITION_CODES:
            raise FileExistsError(url) from error
        if options.get("mode") == "create" and isinstance(error, _REFUSED):
            raise Unfit from error
        raise StorageError(f"{doing} {shown(url)} failed: {one_line(error)}\n{_remedy(error)}") from error


def call(system: Any, verb: str, seconds: float, arguments: tuple[Any, ...] = (), options: Any = None) -> Any:
    """One try. Of a file system that works asynchronously, ended after `seconds`, or when all is given up."""
    options = options or {}
    if not system.async_impl:
        return getattr(system, verb)(*arguments, **options)
    if verb == "ls" and "refresh" in system._ls.__code__.co_varnames:
        options = {**options, "refresh": True}
    if hasattr(system, "retries"):
        system.retries = 1
    answer = asyncio.wait_for(getattr(system, f"_{verb}")(*arguments, **options), seconds)
    future = asyncio.run_coroutine_threadsafe(answer, system.loop)
    while not concurrent.futures.wait([future], _LOOK).done:
        _check_wanted(future)
    return future.result()


def _sleep(seconds: float) -> None:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        _check_wanted()
        time.sleep(min(left, _LOOK))


def _check_wanted(future: concurrent.futures.Future[Any] | None = None) -> None:
    if _given_up:
        if future is not None:
            future.cancel()
        raise StorageError("interrupted; the same command goes on from here")


@lru_cache(maxsize=16)
def file_system(scheme: str, process: int) -> Any:
    """One for each process: connections don't survive a fork."""
    try:
        import fsspec

        return fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False, **_options(scheme))
    except ImportError as error:
        missing = f"pip install 'pseudolabel[{EXTRAS[scheme]}]'"
        raise StorageError(f"{scheme}:// needs a package that is not installed: {missing}") from error
    except Exception as error:  # of a storage's own kind: no credentials, a broken configuration
        raise StorageError(f"{scheme}:// can't be used: {one_line(error)}\n{_remedy(error)}") from error


def _options(scheme: str) -> dict[str, Any]:
    """Time limits, and no retries of the library's own: they would multiply with those here."""
    from fsspec.config import conf

    known: dict[str, Any] = conf.get(scheme, {})
    if scheme == "s3":
        own: dict[str, Any] = {"connect_timeout": 10, "read_timeout": 30, "retries": {"total_max_attempts": 1}}
        own["response_checksum_validation"] = "when_required"  # some servers give a piece the sum of the whole
        importlib.import_module("s3fs")
        return {"config_kwargs": {**own, **known.get("config_kwargs", {})}}
    if scheme in WEB:
        aiohttp = importlib.import_module("aiohttp")
        limits = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=30)
        return {"client_kwargs": {"timeout": limits, "trust_env": True, **known.get("client_kwargs", {})}}
    return {}


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _code(error: BaseException) -> str:
    """What S3 calls the error, or ''."""
    for one in _causes(error):
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def _status(error: BaseException) -> int:
    """The HTTP status, or 0."""
    for one in _causes(error):
        response = getattr(one, "response", None)
        facts = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
        found = facts.get("HTTPStatusCode") or getattr(one, "status", None) or getattr(one, "status_code", None)
        if isinstance(found, int):
            return found
    return 0


def _may_pass(error: BaseException) -> bool:
    """Whether asking again may help."""
    if not isinstance(error, Exception) or isinstance(error, (StorageError, MemoryError, *_FINAL)):
        return False
    if _code(error) in _PASSING_CODES:
        return True
    status = _status(error)
    if status:
        return status >= 500 or status in _PASSING_STATUS or status < 300
    if any(name in type(one).__name__ for one in _causes(error) for name in _FINAL_NAMES):
        return False
    return not isinstance(error, _REFUSED)


def is_refused(error: BaseException) -> bool:
    """Whether the storage doesn't let this user have it. Some say so of what isn't there, too."""
    return any(isinstance(one, PermissionError) for one in _causes(error)) or _status(error) in (401, 403)


def is_missing_bucket(error: BaseException) -> bool:
    return _code(error) == "NoSuchBucket"


def _remedy(error: BaseException) -> str:
    if is_refused(error) or any("Credential" in type(one).__name__ for one in _causes(error)):
        return "check the credentials in your environment, and what they are allowed to do there"
    if not _may_pass(error):
        return "check the address, and the configuration of the storage"
    return f"it was tried {_TRIES} times; check the network and the service, then run the same command again"


def shown(url: str) -> str:
    """A URL for people and logs: what may be a secret in it is left out."""
    scheme, separator, rest = url.partition("://")
    if scheme.lower() in WEB and "?" in rest:
        rest = rest.partition("?")[0] + "?…"
    host, slash, path = rest.partition("/")
    if "@" in host and scheme not in ("az", "abfs"):
        host = "…@" + host.rpartition("@")[2]
    return f"{scheme}{separator}{host}{slash}{path}"


def one_line(error: BaseException) -> str:
    """The error in one line, without what may be a secret."""
    said = str(error) or type(error).__name__
    if _WITHOUT_REASON in said:  # an answer that isn't S3's: of a proxy, or another server
        asked = said.rpartition(_WITHOUT_REASON)[2].partition(" ")[0]
        said = f"the answer to {asked} was {_status(error)}, with no reason"
    first, *more = said.splitlines()
    text = f"{first} {more[0].strip()}" if more and first.endswith(":") else first
    text = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\")]+", r"\1?…", text)
    return re.sub(r"://[^\s/@]+@", "://…@", text)[:300]
