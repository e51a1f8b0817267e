"""Specs as URIs: `scheme:name?arg=value&arg=value`, as teachers and students are named on the command line.

A `?`, `%` or `@` that is part of a name or value is written %3F, %25 or %40, as `str(Spec(…))` does.

>>> parse("small:resnet8?width=16")
Spec(scheme='small', name='resnet8', args=(('width', 16),))
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, quote, unquote

from pseudolabel.errors import SpecError

CLASSES = range(1, (1 << 20) + 1)  # what a number of classes may be: larger ones are ids
SEEDS = range(1 << 63)
SIDES = range(1, 1 << 14)  # pixels
_PLAIN = "/:.,~"  # characters of values that need no escape
_SPECIAL = re.compile("[%?@]")  # characters of names that do


@dataclass(frozen=True)
class Spec:
    """A parsed URI. `args` keep their order; numbers and true/false are converted."""

    scheme: str
    name: str
    args: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        query = "&".join(f"{key}={quote(str(value), safe=_PLAIN)}" for key, value in self.args)
        name = _SPECIAL.sub(lambda match: quote(match[0], safe=""), self.name)
        scheme = f"{self.scheme}:" if self.scheme else ""
        return f"{scheme}{name}" + (f"?{query}" if query else "")

    def only(self, allowed: Iterable[str], whole: Mapping[str, range] | None = None) -> dict[str, Any]:
        """The arguments as a dict. Raises `SpecError` for one that isn't `allowed`, naming the nearest that is, and
        for one named in `whole` that isn't a whole number in the range given there.
        """
        allowed = list(allowed)
        for key, _ in self.args:
            if key not in allowed:
                raise SpecError(
                    f"{self}: unknown argument {key!r}{nearest(key, allowed)}; it takes {', '.join(allowed) or 'none'}"
                )
        args = dict(self.args)
        for name, allows in (whole or {}).items():
            if name in args and (type(args[name]) is not int or args[name] not in allows):
                raise SpecError(f"{self}: {name} must be a whole number from {allows[0]} to {allows[-1]}")
        return args


def parse(text: str) -> Spec:
    """Split a URI. Raises `SpecError` if it has no scheme or no name."""
    scheme, colon, rest = text.partition(":")
    name, _, query = rest.partition("?")
    if not colon or not scheme or not name:
        raise SpecError(
            f"{text!r} is not a spec; write scheme:name?arg=value, such as torchvision:resnet50?weights=IMAGENET1K_V2"
        )
    return Spec(scheme, unquote(name), tuple((key, _value(value)) for key, value in _arguments(text, query)))


def parse_named(text: str) -> Spec:
    """Split `name?arg=value`, a spec of a kind that needs no scheme; its values stay text. Raises `SpecError`."""
    name, _, query = text.partition("?")
    return Spec("", unquote(name), tuple(_arguments(text, query)))


def _arguments(text: str, query: str) -> list[tuple[str, str]]:
    try:
        query = query.replace("+", "%2B")  # a plus in a path is a plus, not a space as in a form
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True) if query else []
    except ValueError as error:
        raise SpecError(f"{text!r}: can't read the arguments after '?' ({error}); write arg=value&arg=value") from error
    if len(dict(pairs)) != len(pairs):
        raise SpecError(f"{text!r}: an argument is given twice")
    return pairs


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the closest of `known`, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def missing_package(spec: Spec, error: ImportError, extra: str) -> SpecError:
    """What to install for a source whose package can't be imported."""
    return SpecError(f"{spec}: {error}; install it with: pip install 'pseudolabel[{extra}]'")


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
