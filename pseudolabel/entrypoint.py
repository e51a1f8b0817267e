"""`python:package.module:function?arg=value`: calling a user's own function for a model, teacher or student."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from torch import nn

from pseudolabel.errors import SpecError
from pseudolabel.specs import Spec


def call_entry_point(spec: Spec, **more: Any) -> nn.Module:
    """Import `module:function` and call it. Raises `SpecError` if it isn't there or returns no `nn.Module`."""
    module_name, colon, function_name = spec.name.partition(":")
    if not all((colon, module_name, function_name)) or module_name.startswith("."):
        raise SpecError(f"{spec}: write python:package.module:function")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise SpecError(f"{spec}: can't import it: {why}; run where the module lies, or install it") from error
    except (SystemExit, SyntaxError) as error:
        raise SpecError(f"{spec}: importing it ends with {error!r}; a script needs `if __name__ == ...`") from error
    try:
        body = function(**dict(spec.args), **more)
    except (TypeError, SystemExit) as error:
        raise SpecError(f"{spec}: {error!r}" if isinstance(error, SystemExit) else f"{spec}: {error}") from error
    if not isinstance(body, nn.Module):
        raise SpecError(f"{spec}: must return an nn.Module, it returned {type(body).__name__}")
    return body
