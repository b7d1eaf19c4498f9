"""A user's own Python: networks and methods in a file or an installed module, named as FILE.py:factory."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from dau_fast.errors import UserError, exists


def load_module(name: str) -> ModuleType:
    """The module in a file `name` that ends in .py, or the installed one of that name; its code is run.

    Modules beside the file can be imported by it. Raises UserError for what cannot be found or raises itself.
    """
    if not name.endswith(".py"):
        return _run(name, lambda: importlib.import_module(name))
    path = Path(name).resolve()
    if not exists(path, "file"):
        raise UserError(f"'{name}' is not a file: name a Python file or an installed module")
    known = f"dau_fast_user_{path.stem}_{abs(hash(path)):x}"
    if known in sys.modules:
        return sys.modules[known]
    spec = importlib.util.spec_from_file_location(known, path)
    assert spec is not None
    assert spec.loader is not None
    module, loader = importlib.util.module_from_spec(spec), spec.loader
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    sys.modules[known] = module  # dataclasses and pickling look it up there
    try:
        _run(name, lambda: loader.exec_module(module))
    except UserError:
        del sys.modules[known]
        raise
    return module


def load_factory(field: str, spec: str) -> Callable[..., Any]:
    """What `spec`, MODULE:NAME or FILE.py:NAME, names: called without arguments. field: for messages."""
    module, _, name = spec.rpartition(":")
    if not module or not name:
        raise UserError(f"`{field}={spec}`: expected FILE.py:factory or module:factory")
    loaded = load_module(module)
    found = getattr(loaded, name, None)
    if not callable(found):
        near = ", ".join(key for key, value in vars(loaded).items() if callable(value) and key[0] != "_")
        raise UserError(f"`{field}={spec}`: '{module}' has no function '{name}', but {near or 'none at all'}")
    return found


def build_network(field: str, spec: str) -> nn.Module:
    """The network that the factory `spec` makes. Raises UserError where it makes none."""
    factory = load_factory(field, spec)
    made = _run(spec, factory)
    if not isinstance(made, nn.Module):
        raise UserError(f"`{field}={spec}` made a {type(made).__name__}: expected a torch.nn.Module")
    return made


def _run(name: str, work: Callable[[], Any]) -> Any:
    """What `work`, a user's code, gives; what it raises becomes one line."""
    try:
        return work()
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"'{name}' cannot be loaded: {reason}") from error
