"""`embedft finetune | encode | info`: what a model is, does and learns.

Each command is a pair of functions: one adds its arguments to a parser, one runs it.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from .. import config as configs
from ..api.endpoint import TOO_LONG
from ..data.dataset import RetrievalDataset
from ..data.formats import FORMATS
from ..encoders.embedder import ROLES, WINDOW_TEXTS, Embedder
from ..encoders.loading import API_PREFIX, load_embedder
from ..encoders.openai_api import ApiEmbedder
from ..files import atomic_write, check_writable, read_jsonl, read_lines
from ..losses.registry import describe_losses
from ..recipe import VALIDATION, VALIDATION_BASE, FinetuneConfig, finetune
from ..retrieval.report import Report, compare
from ..training import distributed, runs
from .stores import format_bytes

API_OPTIONS = ("base_url", "dimensions", "too_long", "price", "max_cost", "ledger")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _add_model(parser: argparse.ArgumentParser, *, more: str = ", or openai:MODEL") -> None:
    parser.add_argument("model", metavar="MODEL", help=f"folder, hub id, name of a package{more}")
    parser.add_argument("--device", help="cuda, cuda:1, mps, cpu [the best there is]")
    parser.add_argument("--revision", help="commit, tag or branch of a hub model")


def _load_model(options: argparse.Namespace, **more) -> Embedder | ApiEmbedder:
    return load_embedder(options.model, device=options.device, revision=options.revision, **more)


def _load_encoding(options: argparse.Namespace, *, adapter: str | None = None) -> Embedder | ApiEmbedder:
    """The model of a command with the options of `_add_encoding` and `_add_store`."""
    given = {name: getattr(options, name) for name in API_OPTIONS if getattr(options, name) is not None}
    dtype = DTYPES[options.dtype]
    given |= {"max_length": options.max_length, "store": options.store, "adapter": adapter}
    return _load_model(options, dtype=dtype, **given)


def _add_encoding(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-length", type=int, metavar="N", help="tokens a text is cut to [the model's]")
    parser.add_argument("--dim", type=int, metavar="N", help="leading dimensions to keep [all]")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights [float32]")

    api = parser.add_argument_group("openai:MODEL, a model behind an OpenAI-compatible API")
    api.add_argument("--base-url", metavar="URL", help="of its server [OPENAI_BASE_URL, else api.openai.com]")
    api.add_argument("--dimensions", type=int, metavar="N", help="asked of the server [all]")
    api.add_argument("--too-long", choices=TOO_LONG, help="what becomes of texts that it does not take [refuse]")
    api.add_argument("--price", type=float, metavar="X", help="money per million tokens")
    api.add_argument(
        "--max-cost", type=float, metavar="X", help="never spend more, over all runs of --ledger [no limit]"
    )
    api.add_argument("--ledger", metavar="FILE", help="JSONL with a line for each request and what it cost [none]")


def _add_store(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", metavar="DIR", help="keep vectors here, and compute only those that it lacks")


def _print_store(embedder: Embedder | ApiEmbedder) -> None:
    """What came from where, and what it cost, on stderr."""
    store = embedder.store
    if isinstance(embedder, ApiEmbedder):
        print(f"{embedder.endpoint.name}: {embedder.costs}", file=sys.stderr)
    if store is not None:
        print(
            f"{store.folder}: {store.hits:,} texts were there, {store.misses:,} computed;"
            f" {format_bytes(store.num_bytes())} on disk",
            file=sys.stderr,
        )


def _add_loading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=FORMATS, help="of the data [recognised]")
    parser.add_argument("--skip-empty", action="store_true", help="drop rows with empty texts instead of refusing them")


def _load_data(path: str, options: argparse.Namespace, *, merge: bool, split: str | None) -> RetrievalDataset:
    dataset = RetrievalDataset.load(
        path, format=options.format, merge=merge, skip_empty=options.skip_empty, split=split
    )
    if dataset.num_skipped and distributed.rank_and_size()[0] == 0:
        print(f"{path}: dropped {dataset.num_skipped} rows with empty texts", file=sys.stderr)
    return dataset


def _add_finetune(parser: argparse.ArgumentParser) -> None:
    _add_model(parser, more="")
    parser.add_argument(
        "data",
        metavar="DATA",
        nargs="+",
        help="training data: QA JSON, BEIR folder, JSONL or CSV pairs; several are sampled (--sampling), each by the"
        " name of its file, or as NAME=DATA",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="run folder; DIR/model gets the model")
    parser.add_argument("--validation", metavar="DATA", help="held-out questions that choose the best weights")
    parser.add_argument("--split", metavar="NAME", help="of a BEIR folder DATA [train, or the only one]")
    parser.add_argument("--validation-split", metavar="NAME", help="of a BEIR folder [test, or the only one]")
    parser.add_argument("--no-merge", action="store_true", help="validation: a document a row, even of equal texts")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace a run that is already in DIR")
    existing.add_argument("--resume", action="store_true", help="go on from the last checkpoint in DIR")
    _add_loading(parser)
    configs.add_options(parser, FinetuneConfig)
    # argparse would fill the lines up to one paragraph.
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = f"losses (--loss.name) and their options (--loss.OPTION):\n{describe_losses()}"


def _finetune(options: argparse.Namespace) -> None:
    with distributed.process_group():
        _finetune_rank(options)


def _finetune_rank(options: argparse.Namespace) -> None:
    first = distributed.rank_and_size()[0] == 0
    if not first:
        os.environ["EMBEDFT_PROGRESS"] = "0"
    config = configs.config_from_options(FinetuneConfig, options)
    if options.model.startswith(API_PREFIX):
        raise ValueError(f"{options.model} is behind an API, so its weights cannot be trained; an adapter on it can")
    out = Path(options.out)
    existing = "overwrite" if options.overwrite else "resume" if options.resume else "refuse"
    distributed.from_first(lambda: runs.check_run(out, existing))
    embedder, dataset, validation = distributed.together(lambda: _load_finetune(options))
    if first and existing == "resume" and not (out / runs.CONFIG).is_file():
        print(f"{out}: no run to resume, a new one begins", file=sys.stderr)
    finetune(embedder, dataset, config, validation=validation, out=out, existing=existing)
    if not first:
        return
    if validation is not None:
        print(_kept_step(out / runs.LOG, config.select))
        before, after = (Report.load(out / runs.EVAL / name) for name in (VALIDATION_BASE, VALIDATION))
        print(compare(before, after, metric=config.select))
        print("these questions chose the weights; for a claim, run embedft evaluate on others")
    print(f"model: {out / runs.MODEL}")


def _load_finetune(
    options: argparse.Namespace,
) -> tuple[Embedder, RetrievalDataset | dict[str, RetrievalDataset], RetrievalDataset | None]:
    """Model, training data and validation data; the model on the rank's own device."""
    datasets = {name: _load_training(path, options) for name, path in _sources(options.data).items()}
    dataset = datasets if len(datasets) > 1 else next(iter(datasets.values()))
    validation = None
    if options.validation:
        merge, split = not options.no_merge, options.validation_split
        validation = _load_data(options.validation, options, merge=merge, split=split)
    device = distributed.rank_device(options.device)
    return load_embedder(options.model, device=device, revision=options.revision), dataset, validation


def _load_training(path: str, options: argparse.Namespace) -> RetrievalDataset:
    split = options.split
    if split is None and (Path(path) / "qrels" / "train.tsv").is_file():
        split = "train"
    return _load_data(path, options, merge=True, split=split)


def _sources(given: Sequence[str]) -> dict[str, str]:
    """{name: path} of NAME=PATH, or of a path by the name of its file without what follows the first dot."""
    sources: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or Path(text).exists():
            name, path = Path(text).resolve().name.partition(".")[0], text
        if name in sources:
            raise ValueError(f"{path} and {sources[name]} are both called {name!r}: name them, NAME=DATA")
        sources[name] = path
    return sources


def _kept_step(log: Path, select: str) -> str:
    """Which step's weights a run kept: those of the first of its best validations."""
    values = {record["step"]: record["metrics"][select] for _, record in read_jsonl(log) if "metrics" in record}
    step = max(values, key=values.__getitem__)
    where = f"step {step:,} of {max(values):,}" if step else "no step: nothing that was trained beat the base"
    return f"weights of {where} ({select} {values[step]:.4f})"


def _add_encode(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("texts", metavar="FILE", help="a text a line; .jsonl: strings, or objects with `text`")
    parser.add_argument("--out", metavar="FILE.npy", help="gets the vectors, [texts, dimensions] float32")
    parser.add_argument("--role", choices=ROLES, default="document", help="which prompt goes in front [document]")
    _add_encoding(parser)
    _add_store(parser)


def _encode(options: argparse.Namespace) -> None:
    if not (options.out or options.store):
        raise ValueError("nowhere to put the vectors: give --out FILE.npy, --store DIR, or both")
    if options.out and not options.out.endswith(".npy"):
        raise ValueError(f"--out is {options.out}, expected a name that ends in .npy")
    if options.out:
        check_writable(Path(options.out).parent)
    texts = _read_texts(Path(options.texts))
    embedder = _load_encoding(options)
    if not options.out:
        for start in range(0, len(texts), WINDOW_TEXTS):
            embedder.encode(texts[start : start + WINDOW_TEXTS], role=options.role, dim=options.dim)
    else:
        embeddings_ND = embedder.encode(texts, role=options.role, dim=options.dim)
        with atomic_write(options.out, "wb") as file:
            np.save(file, embeddings_ND)
        print(f"{options.out}: {len(texts):,} texts x {embeddings_ND.shape[1]} dimensions, float32")
    _print_store(embedder)


def _read_texts(path: Path) -> list[str]:
    if path.suffix != ".jsonl":
        return [line.rstrip("\r\n") for line in read_lines(path)]
    texts = []
    for number, value in read_jsonl(path):
        text = value.get("text") if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise ValueError(f"{path} line {number}: expected a string, or an object with a string `text`")
        texts.append(text)
    return texts


def _info(options: argparse.Namespace) -> None:
    embedder = _load_model(options)
    if isinstance(embedder, ApiEmbedder):
        limit = embedder.endpoint.max_tokens
        print(f"{embedder.model} behind {embedder.endpoint.server.name}: nothing is known of it but its name,")
        print(f"and that it takes {f'{limit:,} tokens' if limit else 'as many tokens as its server says'}")
        return
    rows = {
        "folder": embedder.source.folder,
        "family": embedder.source.config["model_type"],
        "parameters": f"{sum(p.numel() for p in embedder.parameters()):,}",
        "layers": embedder.encoder.config.num_hidden_layers,
        "dimensions": embedder.dim,
        "max_length": f"{embedder.max_length} tokens (the encoder has {embedder.encoder.config.max_length} positions)",
        "pooling": " + ".join(embedder.pooling) + ("" if embedder.include_prompt else ", prompt left out"),
        "similarity": embedder.similarity,
        "prompts": embedder.prompts or "none",
        "carried along": ", ".join(embedder.source.carried) or "nothing",
        "device": embedder.device,
    }
    for name, value in rows.items():
        print(f"{name:<14} {value}")


# Name: (adds its arguments, runs it, what it does).
COMMANDS = {
    "finetune": (_add_finetune, _finetune, "fine-tune a model on pairs of questions and documents"),
    "encode": (_add_encode, _encode, "turn texts into vectors"),
    "info": (_add_model, _info, "say what a model is"),
}
