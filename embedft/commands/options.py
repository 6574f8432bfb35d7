"""Options shared by commands, as classes to inherit from, and functions that act on them.

@dataclass(frozen=True, kw_only=True)
class Options(Encoder, Data): ...

dataset, embedder = load_data(options.data, options), load_encoder(options)
"""

import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import embedft

from .. import config
from ..api.endpoint import EndpointConfig
from ..config import REQUIRED, option
from ..data.beir import PREFIX as BEIR
from ..data.beir import find_beir
from ..data.dataset import RetrievalDataset
from ..files import JSONL, REPLACING, check_whole, check_writable, read_jsonl, read_lines
from ..retrieval.bm25 import K1, B

DATASETS = "QA JSON, BEIR folder or beir:NAME, JSONL or CSV pairs"
Dtype = Literal["float32", "bfloat16", "float16", "int8", "auto"]
DTYPE = "type of the weights; int8: CPUs with VNNI; auto: the faster of float32 and bfloat16"
DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
# Files that `embedft chunk` writes and other commands read: the first alone, or the two of a split.
CHUNK_FILES = WHOLE, TRAIN, VALIDATION = "chunks", "train", "validation"


@dataclass(frozen=True, kw_only=True)
class Model(config.Options):
    """Model."""

    model: str = option(REQUIRED, "folder, hub id, package, or openai:MODEL", metavar="MODEL", positional=True)
    device: str | None = option(None, "cuda, cuda:1, mps or cpu [the best available]")
    tf32: bool = option(False, "multiply float32 matrices in TF32 on CUDA: faster, with the precision of float16")
    compile: bool = option(False, "compile layers with torch.compile; meant for GPUs, on CPUs slower")
    revision: str | None = option(None, "commit, tag or branch on the hub [the default branch]")
    num_layers: int | None = option(None, "keep only the encoder's first N layers [all]")
    query_prompt: str | None = option(None, "text to put before each query, or a prompt's name [the model's]")
    document_prompt: str | None = option(None, "text to put before each document, or a prompt's name [the model's]")
    allow_pickle: bool = option(False, "read pytorch_model.bin where there are no safetensors: tensors only, no code")


@dataclass(frozen=True, kw_only=True)
class Encoder(Model, EndpointConfig):
    """Encoding."""

    max_length: int | None = option(None, "tokens after which texts are truncated [the model's]")
    dim: int | None = option(None, "leading dimensions to keep [all]")
    dtype: Dtype = option("float32", DTYPE)
    store: str | None = option(None, "keep vectors here, and compute only what is missing", metavar="DIR")


@dataclass(frozen=True, kw_only=True)
class Adapted(Encoder):
    """Adapter."""

    adapter: str | None = option(None, "adapter to apply to the vectors", metavar="DIR")


@dataclass(frozen=True, kw_only=True)
class Data:
    """Data."""

    format: Literal["llamaindex", "beir", "jsonl", "csv"] | None = option(None, "data format [detected]")
    split: str | None = option(None, "split of a BEIR folder [train for training, else test, or the only one]")
    skip_empty: bool = option(False, "drop rows with an empty text instead of refusing them")
    strict: bool = option(False, "refuse judgements of unknown queries and documents instead of warning")


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Long documents, scored by their best window of each size."""

    passages: list[int] | None = option(None, "windows of SIZE tokens, STRIDE apart [whole]", metavar="SIZE STRIDE ...")


@dataclass(frozen=True, kw_only=True)
class Bm25:
    """Terms and weights of BM25."""

    bm25_ngram: int = option(1, "terms are runs of 1 to N tokens; 2: tokens and pairs of neighbours", least=1)
    bm25_k1: float = option(K1, "how much repetition of a term counts", least=0)
    bm25_b: float = option(B, "how much length is penalized", least=0, most=1)

    def bm25_setting(self) -> dict[str, Any]:
        """What a report's setting records: the options that are not at their defaults."""
        return {x.name: getattr(self, x.name) for x in fields(Bm25) if getattr(self, x.name) != x.default}

    def bm25_given(self) -> dict[str, Any]:
        """The same as arguments of `bm25_run` and `Bm25Index`."""
        return {name.removeprefix("bm25_"): value for name, value in self.bm25_setting().items()}


def load_model(options: Model, **more: Any) -> "embedft.Embedder":
    """Loads a command's model, on its device and with its prompts; openai:MODEL becomes an `ApiEmbedder`."""
    given = {"query": options.query_prompt, "document": options.document_prompt}
    prompts = {role: text for role, text in given.items() if text is not None} or None
    if prompts and not options.model.startswith("openai:"):
        from ..encoders.folder import MODEL_CONFIG_FILE, read_fields
        from ..encoders.loading import find_folder, whole_folder
        from ..encoders.prompts import choose_prompts

        folder = find_folder(options.model, revision=options.revision, allow_pickle=options.allow_pickle)
        named = read_fields(whole_folder(folder) / MODEL_CONFIG_FILE).get("prompts") or {}
        prompts = choose_prompts(named) | {role: _text(named, role, text) for role, text in prompts.items()}
    settings = {"device": options.device, "revision": options.revision, "prompts": prompts}
    settings |= {"allow_pickle": True} if options.allow_pickle else {}
    settings["num_layers"] = options.num_layers
    if options.tf32:
        from .. import device as devices

        name = (settings | more)["device"]
        devices.use_tf32(devices.find_device(name) if name else devices.default_device())
    embedder = embedft.load_embedder(options.model, **settings | more)
    if options.compile:
        from ..encoders.compiled import compile_layers

        compile_layers(embedder)
    return embedder


def _text(named: Mapping[str, str], role: str, given: str) -> str:
    """The prompt that an option gives by name or text. Raises `ValueError` for one word that is no name, though the
    model has names: it is mistyped rather than a text, which would touch the first word of every query."""
    if named and given not in named and re.fullmatch(r"[A-Za-z0-9_.-]+", given):
        names = f"expected a text that ends in a blank, or one of {', '.join(named)}"
        raise ValueError(f"{role}_prompt is {given!r}, {names}{config.suggestion(given, named)}")
    return named.get(given, given)


def load_encoder(options: Encoder, **more: Any) -> "embedft.Embedder":
    """Loads the model of a command that encodes, with its store and, if the command has that option, its adapter."""
    given = {field: getattr(options, field.name) for field in fields(EndpointConfig) if field.name != "model"}
    # Not the defaults: a model that is not behind an API refuses these options.
    more |= {field.name: value for field, value in given.items() if value not in (field.default, {})}
    more |= {"max_length": options.max_length, "dtype": options.dtype, "store": options.store}
    embedder = load_model(options, adapter=getattr(options, "adapter", None), **more)
    if options.dtype == "auto":
        from ..encoders.dtypes import dtype_of

        print(f"{options.model}: dtype is {dtype_of(embedder)}", file=sys.stderr)
    return embedder


def named_sources(given: str | Sequence[str]) -> dict[str, str]:
    """{name: path} from NAME=PATH, or from a path, named after its file up to the first dot, or as BEIR names it."""
    sources: dict[str, str] = {}
    for text in [given] if isinstance(given, str) else given:
        name, equals, path = text.partition("=")
        if not equals or Path(text).exists():
            name, path = Path(text).resolve().name.partition(".")[0], text
            name = text.removeprefix(BEIR).partition("@")[0].replace("/", "-") if text.startswith(BEIR) else name
        if not path:  # which would be the current folder
            raise ValueError(f"DATA is {text!r}, expected the path of a dataset, or NAME=DATA")
        if name in sources:
            raise ValueError(f"{path} and {sources[name]} are both called {name!r}: name them with NAME=DATA")
        sources[name] = path
    if not sources:
        raise ValueError("no DATA is given, expected at least one")
    return sources


def load_data(path: str, options: Data, *, split: str | None = None, merge: bool = True) -> RetrievalDataset:
    """Loads a dataset, and notes on stderr how many rows --skip-empty dropped."""
    given = {name: getattr(options, name) for name in ("format", "skip_empty", "strict")}
    try:
        dataset = RetrievalDataset.load(path, merge=merge, split=split or options.split, **given)
    except ValueError:
        if not (options.format or options.split) and (source := source_kind(Path(path))):
            steps = {"chunks": "run `embedft questions`", "documents": "run `embedft chunk`, then `embedft questions`"}
            raise ValueError(f"{path}: has {source}, expected questions about them; {steps[source]} first") from None
        raise
    if dataset.num_skipped and os.environ.get("RANK", "0") == "0":
        print(f"{path}: dropped {dataset.num_skipped} rows with empty texts", file=sys.stderr)
    return dataset


def load_training_data(path: str, options: Data) -> RetrievalDataset:
    """Loads the training split of a dataset."""
    has_train = options.split is None and "train" in find_beir(path)[1]
    return load_data(path, options, split="train" if has_train else None)


def read_texts(path: str) -> Iterator[tuple[int, str]]:
    """Yields (line, text) of a file: its lines or, of .jsonl, strings or the `text` of objects."""
    if path.endswith(JSONL):
        found = ((n, x.get("text") if isinstance(x, dict) else x) for n, x in read_jsonl(path))
    else:
        found = enumerate((line.rstrip("\r\n") for line in read_lines(path)), start=1)
    for line, text in found:
        if not isinstance(text, str):
            raise ValueError(f"{path} line {line}: expected a string, or an object with a string `text`")
        yield line, text


def load_texts(path: str, options: Data) -> RetrievalDataset:
    """A dataset of bare texts, each a query and a document, from .txt or from .jsonl with `text`; or any dataset."""
    is_file = Path(path).is_file() and not options.format
    row = next(read_jsonl(path), (0, None))[1] if is_file and path.endswith(JSONL) else None
    if not (is_file and (path.endswith((".txt", ".txt.gz")) or (isinstance(row, dict) and "text" in row))):
        return load_training_data(path, options)
    texts: dict[str, str] = {}
    for line, text in read_texts(path):
        if text.strip():
            texts.setdefault(text, str(line))
        elif not options.skip_empty:
            raise ValueError(f"{path} line {line}: is empty; --skip-empty drops such lines")
    if not texts:
        raise ValueError(f"{path}: has no texts")
    texts = {line: text for text, line in texts.items()}
    return RetrievalDataset(texts, texts, {})


def source_kind(path: Path) -> Literal["chunks", "documents"] | None:
    """What a file or folder has, if that is what `embedft chunk` writes or reads."""
    from ..corpus.documents import SUFFIXES

    files = list(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    if any(file.name.startswith("corpus.jsonl") for file in files):
        return None  # BEIR's folder, which may have a README.md
    if path.is_dir() and not {name + end for name in CHUNK_FILES for end in JSONL}.isdisjoint(x.name for x in files):
        return "chunks"
    if path.is_file() and path.name.endswith(JSONL):
        _, first = next(read_jsonl(path), (0, None))
        return "chunks" if isinstance(first, dict) and {"id", "text"} <= first.keys() else None
    return "documents" if any(file.suffix.lower() in SUFFIXES for file in files) else None


def load_chunk_files(path: Path) -> dict[str, list]:
    """{file name without suffix: its `Chunk`s}, from one file or a folder that `embedft chunk` wrote."""
    from ..corpus.chunks import load_chunks

    check_whole(path, path.parent)
    if source_kind(path) == "documents":
        raise ValueError(f"{path}: has documents, expected chunks; run `embedft chunk` first")
    if path.is_dir():
        found = {name: file for name in CHUNK_FILES for end in JSONL[::-1] if (file := path / f"{name}{end}").is_file()}
        if not found:
            raise ValueError(f"{path}: contains neither {WHOLE}.jsonl nor {TRAIN}.jsonl")
        return {name: load_chunks(file) for name, file in found.items()}
    if not path.is_file():
        raise ValueError(f"{path}: no such file or folder")
    return {Path(path.name.removesuffix(".gz")).stem: load_chunks(path)}


def check_output(out: str, files: Iterable[Path] | None = None, *, overwrite: bool, why: str = "") -> None:
    """Raises `ValueError` if a command cannot write to `out`, or would replace a file without --overwrite.
    `files` are those that it would replace in the folder `out`; None: `out` is the file."""
    check_writable(out, file=files is None)
    there = [path for path in ([Path(out)] if files is None else files) if path.exists()]
    # A command that was killed while it replaced them was allowed to.
    if there and not overwrite and not (Path(out) / REPLACING).exists():
        raise ValueError(f"{there[0]}: is there already{why}; choose another place, or replace it with --overwrite")


def best_step(values: Mapping[int, float]) -> int | None:
    """The step whose weights training kept, from {step: value in validation}: the first of equals; 0 is the start."""
    return max(values, key=values.__getitem__, default=None)


def validated(records: Iterable[dict[str, Any]], select: str) -> dict[int, float]:
    """{step: value in validation}, from the log of a training."""
    return {record["step"]: record["metrics"][select] for record in records if "metrics" in record}


def summary(records: Iterable[dict[str, Any]], select: str, start: str) -> str:
    """Which weights training kept, from its log: those of the best step, or of `start`."""
    values = validated(records, select)
    best = best_step(values)
    kept = f"the weights of step {best:,} of {max(values):,}" if best else f"{start}, which no step improved on"
    return f"kept {kept} ({select} {values[0]:.4f} -> {values[best]:.4f})"


def print_costs(embedder: "embedft.Embedder") -> None:
    """Prints store hits, computed texts and cost to stderr."""
    if hasattr(embedder, "endpoint"):
        print(f"{embedder.endpoint.name}: {embedder.costs}", file=sys.stderr)
    if (store := embedder.store) is not None:
        size = format_bytes(store.num_bytes())
        print(f"{store.folder}: {store.hits:,} texts found, {store.misses:,} computed; {size} on disk", file=sys.stderr)


def format_bytes(number: int) -> str:
    """A number of bytes with three digits, in powers of 1024: "1.46 GiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:.3g} TiB"
