"""Architecture rules, checked on the imports with `ast`: who may import whom, which packages, and where.

LAYERS and PACKAGES are the rules. Changing a dependency's direction means changing these tables, in plain sight.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from naming import naming

import embedft
from embedft.cli import COMMANDS
from embedft.encoders import loading
from embedft.encoders.folder import FAMILIES

ROOT = Path(embedft.__file__).parent
CHECKOUT = Path(__file__).resolve().parents[1]

# All but losses may import these; they import only each other.
LEAVES = ("config", "files", "hub", "progress", "prefetch", "device", "heap", "objects", "vectors")
# A folder or module of embedft: what else of embedft it may import.
LAYERS = {
    "losses": (),
    "api": LEAVES,
    "encoders": (*LEAVES, "api"),
    "corpus": (*LEAVES, "api", "data", "encoders"),
    "data": (*LEAVES, "encoders.packing", "losses.targets"),
    "training": (*LEAVES, "losses", "encoders", "data"),
    "retrieval": (*LEAVES, "encoders", "data"),
    **dict.fromkeys(LEAVES, LEAVES),
}
# These join the parts, so they may import any of them; no part imports these.
TOP = ("__init__", "__main__", "ablation", "cli", "commands", "recipe")


class Package(NamedTuple):
    """Where a third-party package may be imported."""

    parts: tuple[str, ...] | None  # None: anywhere
    in_functions: bool = False  # only where it is used: it is slow to import, or optional


PACKAGES = {
    "torch": Package(None),
    "numpy": Package(None),
    "safetensors": Package(("encoders", "training")),
    "tokenizers": Package(("encoders.tokenization", "encoders.tokenizer_steps")),
    "tqdm": Package(("progress",)),
    "faiss": Package(("retrieval.index", "retrieval.approximate", "retrieval.quantization"), in_functions=True),
    "huggingface_hub": Package(("hub", "encoders.push"), in_functions=True),
    "matplotlib": Package(("retrieval.report",), in_functions=True),
    "openai": Package(("api.client",), in_functions=True),
    "pypdf": Package(("corpus.pdf_page",), in_functions=True),
}
WITHOUT_TORCH = (
    "ablation.effects",
    "ablation.grid",
    "ablation.page",
    "ablation.results",
    "ablation.tables",
    "api.client",
    "api.endpoint",
    "api.sending",
    "retrieval.metrics",
    "retrieval.power",
    "retrieval.run",
    "retrieval.significance",
    "retrieval.bm25",
    "retrieval.fusion",
    "retrieval.report",
    "retrieval.suite",
    "retrieval.tables",
    "corpus.chunks",
    "corpus.cleaning",
    "corpus.kinds",
    "corpus.layout",
    "corpus.pdf_page",
    "corpus.pseudo",
    "corpus.splits",
    "data.dataset",
    "corpus.documents",
    "data.formats",
    "data.pairs",
    "corpus.pdf",
    "corpus.prompts",
    "corpus.questions",
    "data.beir",
    "encoders.store",
    "hub",
    "vectors",
)
# Slow to import, or a peer's: `import embedft` must not load them.
HEAVY = (
    "faiss",
    "huggingface_hub",
    "matplotlib",
    "openai",
    "pandas",
    "pypdf",
    "scipy",
    "sentence_transformers",
    "transformers",
)


FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Import(NamedTuple):
    """`target` is a module of embedft ("losses.targets") or, with `own` false, a package from elsewhere ("torch")."""

    source: str
    target: str
    own: bool
    in_function: bool


def modules_in(root: Path) -> dict[str, ast.Module]:
    """{"losses.targets": its syntax}; a package is named by its folder, embedft itself "__init__"."""
    modules = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        modules[name] = ast.parse(path.read_text(encoding="utf-8"))
    return modules


def imports_of(modules: dict[str, ast.Module], packages: set[str]) -> list[Import]:
    """Every import statement, inside functions and under TYPE_CHECKING too. `packages`: which modules are folders."""
    found = []
    for source, tree in modules.items():
        inside = {id(node) for f in ast.walk(tree) if isinstance(f, FUNCTIONS) for node in ast.walk(f)}
        folder = [] if source in TOP else source.split(".") if source in packages else source.split(".")[:-1]

        def add(names: list[str], node: ast.stmt, source: str = source, inside: set[int] = inside) -> None:
            """The longest of the dotted name's beginnings that is a module here; "" is embedft itself."""
            while names and ".".join(names) not in modules:
                names = names[:-1]
            found.append(Import(source, ".".join(names) or "__init__", True, id(node) in inside))

        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = folder[: len(folder) - node.level + 1] + (node.module.split(".") if node.module else [])
                for alias in node.names:
                    add([*base, alias.name], node)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                dotted = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                for name in dotted:
                    first, *rest = name.split(".")
                    if first == "embedft":
                        more = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else [""]
                        for last in more:
                            add([*rest, last], node)
                    else:
                        found.append(Import(source, first, False, id(node) in inside))
    return found


def belongs(module: str, parts: tuple[str, ...]) -> bool:
    return any(module == part or module.startswith(f"{part}.") for part in parts)


def broken_rules(imports: list[Import], families: set[str]) -> list[str]:
    """Import violations, one per line."""
    faults = []
    torch_users = {i.source for i in imports if i.target == "torch" and not i.own}
    while more := {i.source for i in imports if i.own and i.target in torch_users} - torch_users:
        torch_users |= more
    for i in imports:
        line = f"{i.source} imports {i.target}"
        part = i.source.partition(".")[0]
        if i.own:
            if part not in TOP and not belongs(i.target, (part, *LAYERS[part])):
                faults.append(line)
            if {i.source, i.target} <= families and i.source != i.target:
                faults.append(f"{line}: families do not import each other")
        elif i.target in PACKAGES:
            package = PACKAGES[i.target]
            if package.parts is not None and not belongs(i.source, package.parts):
                faults.append(f"{line}, which is for {', '.join(package.parts)}")
            if package.in_functions and not i.in_function:
                faults.append(f"{line} outside of a function")
        elif i.target not in sys.stdlib_module_names:
            faults.append(f"{line}, which is no package of ours")
    return faults + [
        f"{module} imports torch, perhaps by way of others" for module in WITHOUT_TORCH if module in torch_users
    ]


MODULES = modules_in(ROOT)
FOLDERS = {".".join(path.parent.relative_to(ROOT).parts) for path in ROOT.rglob("__init__.py")} - {""}
FAMILY_MODULES = {family.__name__.removeprefix("embedft.") for family in FAMILIES.values()}


def test_every_part_has_its_rules():
    assert {name.partition(".")[0] for name in MODULES} == {*LAYERS, *TOP}
    assert MODULES.keys() >= FAMILY_MODULES


def test_imports_keep_the_rules():
    imports = imports_of(MODULES, FOLDERS)
    assert broken_rules(imports, FAMILY_MODULES) == []
    # The reader sees what is there: arrows between parts, beside each other, lazy ones, packages.
    assert Import("training.train", "losses.registry", True, False) in imports
    assert Import("encoders.embedder", "device", True, False) in imports
    assert Import("encoders.embedder", "encoders.folder", True, False) in imports
    assert Import("retrieval.index", "faiss", False, True) in imports
    assert Import("cli", "config", True, True) in imports


@pytest.mark.parametrize(
    ("source", "statement", "fault"),
    [
        ("losses.contrastive", "from ..files import write_json", "losses.contrastive imports files"),
        ("losses.contrastive", "from .. import device", "losses.contrastive imports device"),
        ("losses.contrastive", "import embedft", "losses.contrastive imports __init__"),
        ("losses.contrastive", "from embedft import Targets", "losses.contrastive imports __init__"),
        ("losses.contrastive", "import embedft.encoders.packing", "losses.contrastive imports encoders.packing"),
        ("losses.contrastive", "def f():\n from ..encoders import bert", "losses.contrastive imports encoders.bert"),
        ("training.train", "from ..retrieval.evaluate import evaluate", "training.train imports retrieval.evaluate"),
        ("training.train", "from ..retrieval import evaluate", "training.train imports retrieval.evaluate"),
        ("training", "from .. import retrieval", "training imports retrieval"),
        ("retrieval.index", "from ..training import train", "retrieval.index imports training.train"),
        ("encoders.pooling", "from ..losses.targets import scores", "encoders.pooling imports losses.targets"),
        ("data.batches", "from ..encoders.embedder import Embedder", "data.batches imports encoders.embedder"),
        ("data.batches", "from ..losses import registry", "data.batches imports losses.registry"),
        ("files", "from .data import dataset", "files imports data.dataset"),
        ("training.train", "from ..recipe.finetune import finetune", "training.train imports recipe.finetune"),
        ("encoders.mpnet", "from .bert import Layer", "families do not import each other"),
        ("encoders.mpnet", "from . import bert", "families do not import each other"),
        ("retrieval.metrics", "import torch.nn", "retrieval.metrics imports torch, perhaps"),
        ("retrieval.metrics", "from ..losses.targets import scores", "retrieval.metrics imports torch, perhaps"),
        ("retrieval.significance", "from ..device import seeded", "retrieval.significance imports torch, perhaps"),
        ("retrieval.index", "import faiss", "retrieval.index imports faiss outside of a function"),
        (
            "retrieval.evaluate",
            "def f():\n import faiss",
            "retrieval.evaluate imports faiss, which is for retrieval.index",
        ),
        ("api.client", "from openai import OpenAI", "api.client imports openai outside of a function"),
        ("cli", "def f():\n import openai", "cli imports openai, which is for api.client"),
        ("cli", "import transformers", "cli imports transformers, which is no package of ours"),
        (
            "recipe.job",
            "from sentence_transformers import losses",
            "imports sentence_transformers, which is no package of",
        ),
        (
            "recipe.job",
            "from experiments.report import METRICS",
            "recipe.job imports experiments, which is no package of",
        ),
        ("cli", "if True:\n import pandas as pd", "cli imports pandas, which is no package of ours"),
    ],
)
def test_a_broken_rule_is_found(source, statement, fault):
    modules = {**MODULES, "encoders.mpnet": ast.parse(""), "corpus.questions": ast.parse("")}
    modules[source] = ast.Module([*modules[source].body, *ast.parse(statement).body], [])
    faults = broken_rules(imports_of(modules, FOLDERS), {*FAMILY_MODULES, "encoders.mpnet"})
    assert [line for line in faults if fault in line], faults


# What a module looks like.


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_says_what_it_is(name):
    """The Options of a command say it option by option, and in the docstring of the command's module."""
    tree = MODULES[name]
    assert ast.get_docstring(tree), "the module has no docstring"
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    public = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    documented = {"Options"} if name.startswith("commands.") else set()
    assert [node.name for node in public if not ast.get_docstring(node) and node.name not in documented] == []


@pytest.mark.parametrize("name", MODULES)
def test_modules_and_functions_stay_short(name):
    """At most 350 lines per module and 60 per function, docstrings included."""
    assert max((node.end_lineno for node in MODULES[name].body), default=0) <= 350
    functions = [node for node in ast.walk(MODULES[name]) if isinstance(node, FUNCTIONS)]
    assert [f.name for f in functions if f.end_lineno - f.lineno >= 60] == []


def test_names_say_what_is_inside():
    vague = {"utils", "util", "helpers", "helper", "base", "common", "misc", "manager", "engine", "core"}
    assert not vague & {part for name in MODULES for part in name.split(".")}


def test_no_folder_has_imports_in_its_init():
    """So that importing one module of a folder does not import the others."""
    for name in FOLDERS:
        assert [type(node) for node in MODULES[name].body] == [ast.Expr], name


# Importing embedft.


def test_importing_changes_nothing_and_stays_light(tmp_path):
    """In a separate process where torch is already loaded: what embedft adds."""
    script = """
import json, os, random, sys, warnings
import numpy, torch

def state():
    return [
        torch.get_num_threads(), torch.get_num_interop_threads(), str(torch.get_default_dtype()),
        torch.is_grad_enabled(), torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(),
        torch.get_rng_state().tolist(), str(random.getstate()), str(numpy.random.get_state()),
        dict(os.environ), os.getcwd(), sys.path, len(warnings.filters), os.listdir(),
    ]

before = state()
import embedft
everything = [getattr(embedft, name) for name in embedft.__all__]
print(json.dumps({"changed": before != state(), "modules": sorted(sys.modules)}))
"""
    command = [sys.executable, "-B", "-c", script]
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    assert done.stderr == ""
    assert not result["changed"]
    assert list(tmp_path.iterdir()) == []
    assert not {name.partition(".")[0] for name in result["modules"]} & set(HEAVY)
    assert "embedft.retrieval.index" in result["modules"]


def modules_after(code: str) -> set[str]:
    """The modules loaded in a separate process after running some code."""
    script = f"{code}\nimport sys\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-B", "-c", script], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def test_names_of_the_public_face_are_imported_when_used():
    assert not modules_after("import embedft") & {"torch", "numpy", "embedft.recipe.finetune"}
    loaded = modules_after("from embedft import Report")
    assert "embedft.retrieval.report" in loaded
    assert not loaded & {"torch", "embedft.recipe.finetune"}
    assert set(embedft.__all__) <= set(dir(embedft))
    with pytest.raises(AttributeError, match=naming("'embedft'", "'nothing'")):
        embedft.nothing  # noqa: B018


def test_a_store_is_listed_without_torch(tmp_path):
    loaded = modules_after(f"from embedft.cli import main\nassert main(['store', {str(tmp_path)!r}]) == 0")
    assert "embedft.encoders.store" in loaded
    assert "torch" not in loaded


def test_a_first_vector_is_quick(minilm_folder):
    """On the way to it, nothing slow is loaded: not torch's compiler, which drawing on the meta device would take."""
    name = next(iter(loading.PACKAGES))
    loaded = modules_after(f"from embedft import load_embedder\nload_embedder({name!r}, device='cpu').encode(['a'])")
    assert not loaded & {"torch._dynamo", "sympy", "faiss", "openai", "huggingface_hub.file_download"}
    assert "embedft.encoders.embedder" in loaded


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_quick(command):
    """Help loads nothing slow: not torch and, for the list of commands, not NumPy."""
    loaded = modules_after(f"from embedft.cli import main\nmain({[*command.split(), '--help']})")
    trains = command in ("finetune", "ablate", "adapter")  # their settings belong to the training code
    assert trains or not loaded & {"torch", "safetensors", "faiss", "openai", "pypdf"}
    assert command or not loaded & {"numpy", "embedft.commands"}


def test_ci_runs_the_command_of_the_readme():
    """Both contain the same line, so the README's command is the one tested."""
    (command,) = (line for line in (CHECKOUT / "README.md").read_text().splitlines() if "&& python -m pytest" in line)
    assert command in (CHECKOUT / ".ci" / "run").read_text().splitlines()


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff_is_content(command):
    done = subprocess.run([sys.executable, "-m", "ruff", *command, str(CHECKOUT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
