"""Which modules the texts of each role pass through: modules.json, and the Router in it, if there is one.

    read_modules(folder)["query"]      # [Module("Transformer", folder), Module("Pooling", folder / "1_Pooling"), ...]

A sequence is a Transformer and a Pooling, or a StaticEmbedding, and then any of Dense, LayerNorm and Normalize. A
Router may come anywhere, with a route for each role; a module that both routes name is shared.
"""

from pathlib import Path
from typing import Any, NamedTuple

from ..files import read_json, read_object, write_json
from .adapter import CONFIG_FILE as ADAPTER_CONFIG_FILE
from .adapter import ROLES
from .head import PARTS
from .prompts import names_of
from .schema import CONFIG_FILE, MODULES_FILE, PLACE, SCHEMAS, check

TRANSFORMER, POOLING, STATIC, ROUTERS = "Transformer", "Pooling", "StaticEmbedding", ("Router", "Asym")
PACKAGE = "sentence_transformers."  # a type elsewhere is code that comes with the model, which never runs
MODULE_TYPE = PACKAGE + "models."  # the names before version 6, which it still reads
# An adapter may follow, saved twice: as our own files, and as a Router with routes for queries and documents.
ADAPTER_FOLDER, ROUTER_CONFIG_FILE = "adapter", "router_config.json"

Routes = dict[str, list[tuple[str, str]]]  # {role: (class name, subfolder) of each module}


class Module(NamedTuple):
    """A module of sentence-transformers: its class, and the folder of its files."""

    kind: str
    folder: Path


def read_modules(folder: Path) -> dict[str, list[Module]]:
    """{role: its modules in order}, all empty for a Hugging Face folder, which has no modules.json.
    An adapter's Router and what follows it are left out, because the adapter is read from its own folder."""
    path = folder / MODULES_FILE
    sequences: dict[str, list[Module]] = {role: [] for role in ROLES}
    if not path.is_file():
        return sequences
    found = read_json(path)
    modules = []
    for module in found if isinstance(found, list) else [found]:
        if not (isinstance(module, dict) and SCHEMAS[MODULES_FILE].keys() <= module.keys()):
            raise ValueError(f'{path}: a module is {repr(module)[:60]}, expected an object with "type" and "path"')
        check(path, module, SCHEMAS[MODULES_FILE])
        modules.append(Module(_kind(path, module["type"]), folder / module["path"]))
    routers = [place for place, module in enumerate(modules) if module.kind in ROUTERS]
    if routers and (folder / ADAPTER_FOLDER / ADAPTER_CONFIG_FILE).is_file():
        modules = modules[: routers[-1]]
    for module in modules:
        routes = _read_routes(module.folder) if module.kind in ROUTERS else {}
        for role in ROLES:
            sequences[role] += routes.get(role, [module])
    for role in reversed(ROLES):
        _check_order(path, [module.kind for module in sequences[role]])
    return sequences


def split_modules(folder: Path) -> tuple[dict[str, tuple[Module, ...]], dict[str, list[Module]]]:
    """({role: its encoder and pooling, or static embeddings}, {role: what follows}), from `read_modules`.
    Raises `ValueError` where the roles share an encoder but not its pooling."""
    modules = read_modules(folder)
    numbers = {role: 1 if sequence and sequence[0].kind == STATIC else 2 for role, sequence in modules.items()}
    bases = {role: tuple(modules[role][: numbers[role]]) for role in ROLES}
    query, document = bases.values()
    if query != document and {*query} & {*document}:
        raise ValueError(f"{folder}: queries and documents share a module before pooling, but not all of them")
    return bases, {role: modules[role][numbers[role] :] for role in ROLES}


def _kind(path: Path, type_name: Any) -> str:
    name = str(type_name)
    if not name.startswith(PACKAGE):
        shown = name.encode("unicode_escape").decode()[:80]
        raise ValueError(f"{path}: type is {shown}, expected one of {PACKAGE}*; a model's own code is never run")
    return name.rsplit(".", 1)[-1]


def _check_order(path: Path, kinds: list[str]) -> None:
    num_first = 1 if kinds[:1] == [STATIC] else 2
    if kinds[:num_first] in ([STATIC], [TRANSFORMER, POOLING]) and PARTS.keys() >= {*kinds[num_first:]}:
        return
    known = {TRANSFORMER, POOLING, STATIC, *PARTS}
    unknown = "".join(f"; {kind} is not supported" for kind in kinds[:20] if kind not in known)[:200]
    found = ", ".join(kinds).encode("unicode_escape").decode()[:200]
    wanted = f"{TRANSFORMER}, {POOLING} or {STATIC}, then any of {', '.join(PARTS)}"
    raise ValueError(f"{path}: modules are {found}, expected {wanted}{unknown.encode('unicode_escape').decode()}")


def _read_routes(folder: Path) -> dict[str, list[Module]]:
    """The modules of each role's route. Raises `ValueError` for a Router that needs more than a role to choose."""
    path = folder / ROUTER_CONFIG_FILE
    if not path.is_file():
        path = folder / CONFIG_FILE  # of an Asym, the Router's name before version 5
    if not path.is_file():
        raise ValueError(f"{folder}: no {ROUTER_CONFIG_FILE}, which says what the routes are")
    values = read_object(path)
    types, structure, parameters = (values.get(name) or {} for name in ("types", "structure", "parameters"))
    for name, value in (("types", types), ("structure", structure), ("parameters", parameters)):
        if not isinstance(value, dict):
            raise ValueError(f"{path}: {name} is {repr(value)[:60]}, expected an object")
    if mappings := parameters.get("route_mappings"):
        raise ValueError(f"{path}: route_mappings is {repr(mappings)[:60]}, expected none: routes are chosen by role")
    routes = {}
    for role in ROLES:
        names = names_of(role, structure)
        if len(names) != 1:
            found = repr(list(structure))[:80]
            raise ValueError(f"{path}: structure has the routes {found}, expected one for each of {', '.join(ROLES)}")
        routes[role] = [_routed(path, types, place) for place in _list(path, names[0], structure[names[0]])]
    return routes


def _list(path: Path, name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{path}: the route {name} is {repr(value)[:60]}, expected a list of modules")
    return value


def _routed(path: Path, types: dict[str, Any], place: Any) -> Module:
    expected, is_inside = PLACE
    if not is_inside(place):
        raise ValueError(f"{path}: a module is {repr(place)[:60]}, expected {expected}")
    if place not in types:
        raise ValueError(f"{path}: types has no {repr(place)[:60]}, which a route has")
    return Module(_kind(path, types[place]), path.parent / place)


def write_modules(folder: Path, modules: list[tuple[str, str]]) -> None:
    """Writes modules.json. `modules`: (class name, subfolder) of each, in order."""
    entries = [
        {"idx": i, "name": str(i), "path": place, "type": MODULE_TYPE + kind} for i, (kind, place) in enumerate(modules)
    ]
    write_json(folder / MODULES_FILE, entries)


def write_routes(folder: Path, routes: Routes) -> None:
    """Writes router_config.json; the default route is that of documents."""
    types = {place: MODULE_TYPE + kind for route in routes.values() for kind, place in route}
    structure = {role: [place for _, place in route] for role, route in routes.items()}
    parameters = {"default_route": "document", "allow_empty_key": True}
    write_json(folder / ROUTER_CONFIG_FILE, {"types": types, "structure": structure, "parameters": parameters})
