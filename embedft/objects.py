"""Describes the Python objects passed to a run, for its records: name, source hash, settings; finds some by name.

    describe_object(my_loss)      # {"name": "__main__.my_loss", "sha256": "9f86...", "values": {}}

Not recorded: tensors, attributes and keys that begin with "_", other objects as keys, and code that its code calls.
"""

import ast
import functools
import hashlib
import importlib
import inspect
import textwrap
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def describe_object(value: Any, *, depth: int = 3) -> Any:
    """Returns numbers, strings, None, and lists and dicts of these as they are; for a function or object, a dict of

    - name: module and qualified name of the function, or of the object's class;
    - sha256: of the source code without comments, inherited code included, or the result of its own `sha256()`;
    - values: closure variables, defaults, bound arguments or attributes, described likewise, `depth` levels deep."""
    if value is None or isinstance(value, bool | int | float | str):
        return _short(value)
    if isinstance(value, list | tuple):
        return _short([describe_object(entry, depth=depth) for entry in value])
    if not isinstance(value, type) and callable(getattr(value, "sha256", None)):
        return {"name": _name(type(value)), "sha256": value.sha256(), "values": {}}
    code, values = split_object(value, depth=depth)
    if isinstance(value, dict):
        return _short(values)
    bases = [base for base in getattr(code, "__mro__", ())[1:] if base.__module__.partition(".")[0] != "torch"]
    sources = "\n".join(source(part)[0] for part in (code, *bases))
    return {"name": _name(code), "sha256": hashlib.sha256(sources.encode()).hexdigest(), "values": values}


def split_object(value: Any, *, depth: int = 3) -> tuple[Any, dict[str, Any]]:
    """The function or class whose code an object runs, and the `values` of `describe_object`."""
    code, values = value, value if isinstance(value, dict) else {}
    if isinstance(value, functools.partial):
        code, values = value.func, {"func": value.func, "args": value.args, **value.keywords}
        code = code if isinstance(code, type) or inspect.isroutine(code) else type(code)
    elif isinstance(value, types.MethodType):
        code, values = value.__func__, {"self": value.__self__}
    elif isinstance(value, types.FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        values = {name: cell.cell_contents for name, cell in cells if cell != types.CellType()}  # not empty
        values |= {name: p.default for name, p in inspect.signature(value).parameters.items()}
    elif not isinstance(value, type | dict) and not inspect.isroutine(value):
        code = type(value)
        values = {**getattr(value, "__dict__", {}), **getattr(value, "_modules", {})}
    return code, {name: describe_object(x, depth=depth - 1) for name, x in values.items() if depth and _counts(name, x)}


def _counts(name: Any, value: Any) -> bool:
    is_tensor = type(value).__module__.partition(".")[0] in ("torch", "numpy")
    is_named = isinstance(name, str | int | float) and not str(name).startswith("_")
    return is_named and not (is_tensor or value is inspect.Parameter.empty or isinstance(value, types.ModuleType))


def _short(value: Any, *, longest: int = 200) -> Any:
    """The value in JSON-compatible form, or its SHA-256 if its repr is long."""
    text = repr(value)
    if len(text) > longest:
        return f"sha256 {hashlib.sha256(text.encode()).hexdigest()}"
    return text if isinstance(value, float) and value - value != 0 else value  # JSON has no NaN or infinity


def _name(code: Any) -> str:
    return f"{getattr(code, '__module__', None)}.{getattr(code, '__qualname__', type(code).__name__)}"


@functools.lru_cache(maxsize=1024)  # inspect parses the whole module of a class
def source(thing: Any) -> tuple[str, tuple[str, ...]]:
    """The code of a class or function without comments and docstrings, and the names that it uses."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
    except (OSError, TypeError, SyntaxError):  # it was typed into a shell, or is part of a larger expression
        return repr(_compiled(thing)), ()
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            node.body = body[1:] or [ast.Pass()]
    return ast.unparse(tree), tuple(sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}))


def _compiled(thing: Any) -> Any:
    """The compiled code of a function, or of each method of a class."""
    if inspect.isclass(thing):
        return [(name, _compiled(value)) for name, value in sorted(vars(thing).items()) if hasattr(value, "__code__")]
    code = getattr(thing, "__code__", thing)
    if not inspect.iscode(code):
        return repr(type(thing))
    # Sets are ordered differently in each process.
    constants = [sorted(value, key=repr) if isinstance(value, frozenset) else value for value in code.co_consts]
    return code.co_code, code.co_names, [_compiled(value) if inspect.iscode(value) else value for value in constants]


def find_object(path: Any) -> Any:
    """What is at "module.name". Importing the module runs it, so what no program can import is refused before."""
    module, _, name = str(path).rpartition(".")
    if not all(part.isidentifier() and part != "__main__" for part in (*module.split("."), name)):
        raise ValueError(f"{path!r} cannot be imported by another program, expected module.name")
    with in_one_line(f"{path} cannot be imported here"):
        return getattr(importlib.import_module(module), name)


@contextmanager
def in_one_line(what: str) -> Iterator[None]:
    """Turns anything that a user's code raises, `sys.exit` included, into a `ValueError`."""
    try:
        yield
    except (Exception, SystemExit) as error:
        found = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        hint = "; add its folder to PYTHONPATH" if isinstance(error, ModuleNotFoundError) else ""
        hint = "; expected a name at the top of a module" if "is not a package" in found else hint
        raise ValueError(f"{what} ({found}{hint})") from error
