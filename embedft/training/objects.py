"""What a run records of the Python objects it was given: name, hash of the source code, settings.

    describe_object(my_loss)      # {"name": "__main__.my_loss", "sha256": "9f86...", "values": {}}

A run resumes only if these are the same (runs.py). Not recorded: tensors, dicts, attributes that begin with "_", and
code that the object's own code calls.
"""

import contextlib
import functools
import hashlib
import inspect
import types
from typing import Any

LONGEST = 200  # characters of a value written out; of a longer one, its SHA-256


def describe_object(value: Any, *, depth: int = 3) -> Any:
    """A number, text, None, or list of these as it is; of a function or object, a dict of

    - name: module and qualified name, of an object those of its class;
    - sha256: of the source code; of an object with a `sha256` method (a dataset, an Embedder) what that returns;
    - values: closure variables, defaults, bound arguments or attributes, described likewise, `depth` levels down.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return _short(value)
    if isinstance(value, list | tuple):
        described = [describe_object(entry, depth=depth) for entry in value]
        return described if len(repr(described)) <= LONGEST else _short(described)
    if isinstance(value, functools.partial):
        return describe_object(value.func, depth=depth) | {
            "values": _values({"args": value.args, **value.keywords}, depth)
        }
    if isinstance(value, types.MethodType):
        return describe_object(value.__func__, depth=depth) | {"values": _values({"self": value.__self__}, depth)}
    if isinstance(value, types.FunctionType):
        found = {}
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
            with contextlib.suppress(ValueError):  # a variable without a value yet
                found[name] = cell.cell_contents
        defaults = {n: p.default for n, p in inspect.signature(value).parameters.items() if p.default is not p.empty}
        return {"name": _name(value), "sha256": _sha256(value), "values": _values(found | defaults, depth)}
    if isinstance(value, type) or inspect.isroutine(value):
        return {"name": _name(value), "sha256": _sha256(value), "values": {}}
    described = {"name": _name(type(value))}
    if callable(getattr(value, "sha256", None)):
        return described | {"sha256": value.sha256(), "values": {}}
    attributes = vars(value) if hasattr(value, "__dict__") else {}
    attributes = {**attributes, **getattr(value, "_modules", {})}
    return described | {"sha256": _sha256(type(value)), "values": _values(attributes, depth)}


def _values(found: dict[str, Any], depth: int) -> dict[str, Any]:
    if depth == 0:
        return {}
    kept = {}
    for name, value in found.items():
        skipped = isinstance(value, dict) or type(value).__module__.partition(".")[0] in ("torch", "numpy")
        if not name.startswith("_") and not skipped and not isinstance(value, types.ModuleType):
            kept[name] = describe_object(value, depth=depth - 1)
    return kept


def _short(value: Any) -> Any:
    text = repr(value)
    if len(text) > LONGEST:
        return f"sha256 {hashlib.sha256(text.encode()).hexdigest()}"
    return text if isinstance(value, float) and value - value != 0 else value  # JSON has no NaN or infinity


def _name(code: Any) -> str:
    return f"{getattr(code, '__module__', None)}.{getattr(code, '__qualname__', type(code).__name__)}"


def _sha256(code: Any) -> str:
    """Of the source; where there is none, of a function's byte code, else of the name."""
    try:
        text = inspect.getsource(code)
    except (OSError, TypeError):
        compiled = getattr(code, "__code__", None)
        constants = [c for c in compiled.co_consts if not isinstance(c, types.CodeType)] if compiled else []
        text = repr((compiled.co_code, compiled.co_names, constants)) if compiled else _name(code)
    return hashlib.sha256(text.encode()).hexdigest()
