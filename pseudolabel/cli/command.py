"""What every command goes through: registered, run, its result printed and its errors told; and the entry point."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from pseudolabel.allocator import keep_freed_memory
from pseudolabel.errors import LaunchError, PseudolabelError
from pseudolabel.training.world import started_together, starts_again

_OPEN_FILES = 1 << 16
_TOGETHER = ("train",)  # what several processes can do together

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Annotate unlabeled shards once with a big teacher, then train small students offline from its soft labels.",
    epilog="SHARDS is a directory, a glob, a brace range such as x-{000..099}.tar, or @list.txt.",
)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {message}", file=sys.stderr)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(version("pseudolabel"))
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="print the version")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: usage errors become JSON, too, if `--json` is given. A scheduler's SIGTERM ends as Ctrl-C does; one
    of several processes ends without a word, as its launcher wants when another has failed.
    """
    together = started_together()
    signal.signal(signal.SIGTERM, signal.SIG_DFL if together else _interrupt)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # or else whoever started us wants it ignored
        signal.signal(signal.SIGINT, _interrupt)
    keep_freed_memory()
    _allow_open_files()
    warnings.showwarning = _show_warning
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal of another encoding must not cost the result
    as_json = "--json" in sys.argv
    if not as_json and not together:
        app()
        return
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except Exception as error:
        if not hasattr(error, "format_message"):  # a usage error of typer's, whichever click it brings
            raise
        _let_one_tell(2)
        _tell("UsageError", error.format_message(), as_json=as_json)
        sys.exit(2)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """Ctrl-C, and what counts as such. Threads that ask a storage which doesn't answer are not waited for."""
    if (asking := sys.modules.get("pseudolabel.storage.asking")) is not None:
        asking.give_up()
    raise KeyboardInterrupt


def _allow_open_files() -> None:
    """As many as this user may have, up to what anyone needs: loaders pass tensors as files."""
    if sys.platform != "win32":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
        if soft != resource.RLIM_INFINITY and soft < most:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


@contextlib.contextmanager
def _stdout_kept_clean() -> Iterator[None]:
    """What the body, a library or a user's own teacher writes to stdout goes to stderr, the C library's output, too."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _flush_stdout() -> None:
    """Now, while a full disk behind it can be reported: at exit Python prints a traceback."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        print(f"error: writing the result to stdout failed: {error.strerror}; the work itself is done", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left unwritten would fail again
        raise typer.Exit(1) from None


def _print_error(kind: str, message: str) -> None:
    print(json.dumps({"error": {"kind": kind, "message": message}}))


def _tell(kind: str, message: str, *, as_json: bool) -> None:
    if as_json and not starts_again():  # stdout has one object, of the command's end
        _print_error(kind, message)
    else:
        print(f"error: {message}", file=sys.stderr)


def _let_one_tell(code: int) -> None:
    """Of several processes the first to fail tells why; any other ends here."""
    if started_together():
        from pseudolabel.training.distributed import first_to_fail

        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which the launcher sends when another has ended
        if not first_to_fail():
            os._exit(code)


def _leave(code: int) -> NoReturn:
    """One of several processes ends on the spot: to take down what joins it to others may wait for those that are
    gone.
    """
    if started_together():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise typer.Exit(code)


def command(function: Callable[..., Mapping[str, Any] | None]) -> Callable[..., None]:
    """Register a command. What it returns is printed by `--json`; known errors end with exit code 1, Ctrl-C with
    130.
    """

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        as_json = bool(kwargs.get("as_json"))
        try:
            if started_together() and function.__name__ not in _TOGETHER:
                raise LaunchError(
                    f"{function.__name__.rstrip('_')} is one process, and {os.environ['WORLD_SIZE']} were started of "
                    "it: start it without torchrun, which is for train"
                )
            with _stdout_kept_clean() if as_json else contextlib.nullcontext():
                result = function(*args, **kwargs)
        except PseudolabelError as error:
            _let_one_tell(1)
            _tell(error.kind, str(error), as_json=as_json)
            _leave(1)
        except (SystemExit, OSError, MemoryError) as error:  # a user's code, or the machine
            if isinstance(error, BrokenPipeError):
                raise
            _let_one_tell(1)
            _tell(type(error).__name__, _outside(error), as_json=as_json)
            _leave(1)
        except Exception as error:  # not ours: the traceback is wanted, and with --json an object all the same
            _let_one_tell(1)
            if as_json:
                _tell(type(error).__name__, str(error), as_json=True)
            if started_together():
                traceback.print_exc()
                _leave(1)
            raise
        except KeyboardInterrupt:
            _let_one_tell(130)
            message = "interrupted; the same command goes on from here"
            print(message, file=sys.stderr)
            if as_json:
                _print_error("Interrupted", message)
            _leave(130)
        failed = bool(result and result.get("ok") is False)
        if as_json and result is not None:
            print(json.dumps(result))
        _flush_stdout()
        if failed:
            raise typer.Exit(1)

    app.command(function.__name__.rstrip("_"))(wrapped)
    return wrapped


def _outside(error: BaseException) -> str:
    """One line for what neither we nor our input did wrong in a way of its own."""
    if isinstance(error, SystemExit):
        return f"code that was called ended the program (SystemExit {error.code}); a teacher or student must not"
    if isinstance(error, MemoryError):
        return "out of memory; use smaller batches, fewer classes or fewer --workers"
    assert isinstance(error, OSError)
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}; check the path, its permissions and the disk"


def for_people(as_json: bool) -> Any:
    """The stream for what people read."""
    return sys.stderr if as_json else sys.stdout
