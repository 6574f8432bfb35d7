"""`embedft chunk | questions`: from documents to data sets.

Each command is a pair of functions: one adds its arguments to a parser, one runs it.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .. import config as configs
from ..corpus import pseudo
from ..corpus.chunks import Chunk, chunk_pages, load_chunks, parse_pages, save_chunks, split_chunks
from ..corpus.cleaning import Cleaned, clean, drop_held_out, round_trip
from ..corpus.documents import SUFFIXES, drop_repeated_lines, read_documents
from ..corpus.prompts import TEMPLATE
from ..corpus.questions import Estimate, Outcome, QuestionConfig, estimate, question_dataset, write_questions
from ..data.dataset import RetrievalDataset
from ..encoders.loading import load_embedder, load_reading
from ..files import check_writable, read_text, write_json

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
# What `chunk` writes and `questions` takes: one file, or two.
WHOLE, TRAIN, VALIDATION = "chunks", "train", "validation"
CHUNK_REPORT, QUESTION_REPORT = "chunk-report.json", "question-report.json"
MAX_REASONS = 5
NUM_DOCSTRINGS = (2_000, 1_000)  # that train, that validate
LLM_OPTIONS = ("base_url", "template", "dry_run", "no_clean", "round_trip", "config")
METHODS = ("llm", "ict", "title", "docstring")


def _add_chunk(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="PATH", help="PDF, text or Markdown files, and folders of them")
    parser.add_argument("--out", required=True, metavar="DIR", help="gets chunks.jsonl, or the two sides of a split")
    parser.add_argument("--model", default=MODEL, metavar="MODEL", help="whose tokenizer counts [%(default)s]")
    parser.add_argument("--revision", help="commit, tag or branch of a hub model")
    parser.add_argument("--size", type=int, metavar="N", help="most tokens of a chunk [all that the model reads]")
    parser.add_argument("--overlap", type=int, default=0, metavar="N", help="tokens that two chunks may share [0]")
    parser.add_argument("--by-page", action="store_true", help="no chunk crosses a page")
    parser.add_argument("--drop-repeated", action="store_true", help="drop page numbers and running headers")
    split = parser.add_argument_group("split: train.jsonl and validation.jsonl instead of chunks.jsonl")
    sides = split.add_mutually_exclusive_group()
    sides.add_argument("--train-pages", metavar="RANGES", help="pages that train, such as 1-90 or 1-40,80-100")
    sides.add_argument("--train-files", nargs="+", metavar="PATH", help="files that train, as the chunks name them")
    sides.add_argument("--train-share", type=float, metavar="X", help="share of the chunks that train")
    split.add_argument("--seed", type=int, default=0, metavar="N", help="of the share's draw [0]")


def _chunk(options: argparse.Namespace) -> None:
    out = Path(options.out)
    check_writable(out)
    ranges = None if options.train_pages is None else parse_pages(options.train_pages)
    reading = load_reading(options.model, revision=options.revision)
    limit = reading.max_length if options.size is None else options.size
    size = limit - reading.num_around
    if size < 1:
        around = f"{reading.num_around} tokens that the model puts around a text"
        raise ValueError(f"--size is {options.size}, expected more than the {around}")
    if not 0 <= options.overlap < size:
        room = f"the {size} tokens of text in a chunk of {limit}"
        raise ValueError(f"--overlap is {options.overlap}, expected 0 or more and less than {room}")
    if limit > reading.max_length:
        most = f"{options.model} reads {reading.max_length}, unless its max_length is set"
        print(f"--size is {options.size} tokens, but {most}: the rest of a chunk would be cut off", file=sys.stderr)
    documents = read_documents(options.paths)
    for skipped in documents.skipped:
        print(skipped, file=sys.stderr)
    pages, repeated = drop_repeated_lines(documents.pages) if options.drop_repeated else (documents.pages, {})
    chunks = chunk_pages(
        pages,
        count_tokens=reading.count_tokens,
        size=size,
        overlap=options.overlap,
        by_page=options.by_page,
    )
    report: dict[str, Any] = {
        "files": len({page.file for page in documents.pages}),
        "pages": len(documents.pages),
        "skipped": [skipped._asdict() for skipped in documents.skipped],
        "repeated_lines": dict(repeated),
        "chunks": len(chunks),
        "tokens": sum(chunk.num_tokens for chunk in chunks),
        "size": size,
        "overlap": options.overlap,
        "tokenizer": options.model,
    }
    print(
        f"{report['pages']:,} pages with text in {report['files']:,} file(s) -> {len(chunks):,} chunks of at most "
        f"{size} tokens ({report['tokens']:,} in all; {reading.num_around} come on top when the model reads)"
    )
    if options.drop_repeated:
        print(f"dropped {sum(repeated.values()):,} repeated headers and footers")
    if not (ranges is None and options.train_files is None and options.train_share is None):
        split = split_chunks(
            chunks,
            train_files=options.train_files,
            train_pages=ranges,
            train_share=options.train_share,
            seed=options.seed,
        )
        sides = {TRAIN: split.train, VALIDATION: split.validation}
        report |= {name: len(side) for name, side in sides.items()} | {"dropped": split.num_dropped}
        if split.num_dropped:
            print(f"dropped {split.num_dropped:,} chunks: across the boundary, or training's that validation has too")
    else:
        sides = {WHOLE: chunks}
    for name in {WHOLE, TRAIN, VALIDATION} - sides.keys():
        earlier = out / f"{name}.jsonl"  # of a call with another split
        if earlier.is_file():
            earlier.unlink()
            print(f"{earlier}: removed, it was of another split", file=sys.stderr)
    for name, side in sides.items():
        save_chunks(out / f"{name}.jsonl", side)
        print(f"{out / name}.jsonl: {len(side):,} chunks")
    write_json(out / CHUNK_REPORT, report)
    if documents.skipped:
        print(f"skipped {len(documents.skipped):,} files or pages, see {out / CHUNK_REPORT}")


def _add_questions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="what `embedft chunk` wrote, or JSONL of objects with `id` and `text`; docstring: packages",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="gets the data sets, the replies and a report")
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="llm",
        help="llm; or without one: ict, a sentence of each chunk; title, its heading; docstring, of packages [llm]",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of ict and docstring [0]")
    parser.add_argument(
        "--validation", action="store_true", help="SOURCE validates: every sentence leaves its chunk; no round trip"
    )
    llm = parser.add_argument_group("an LLM's questions (the key comes from OPENAI_API_KEY)")
    llm.add_argument("--base-url", metavar="URL", help="of an OpenAI-compatible server [api.openai.com]")
    llm.add_argument("--template", metavar="FILE", help="prompt with {text} and {num_questions} [the project's own]")
    llm.add_argument("--dry-run", action="store_true", help="say what it would cost; send nothing")
    cleaning = parser.add_argument_group("cleaning")
    cleaning.add_argument("--no-clean", action="store_true", help="keep every question as it was written")
    cleaning.add_argument(
        "--round-trip", type=int, metavar="K", help="training: keep what the base ranks in its top K [all]"
    )
    cleaning.add_argument("--base", default=MODEL, metavar="MODEL", help="of --round-trip [%(default)s]")
    configs.add_options(parser, QuestionConfig)


def _questions(options: argparse.Namespace) -> int:
    out = Path(options.out)
    check_writable(out)
    _check_method(options)
    if options.method == "docstring":
        train, held_out = pseudo.docstring_datasets(
            num_train=NUM_DOCSTRINGS[0], num_held_out=NUM_DOCSTRINGS[1], seed=options.seed, packages=options.sources
        )
        for name, dataset in ((TRAIN, train), (VALIDATION, held_out)):
            _save(dataset, out / f"{name}.json")
        return 0
    sides = _load_sides(options.sources)
    texts: dict[str, str] = {}
    for chunk in (chunk for side in sides.values() for chunk in side):
        if texts.setdefault(chunk.id, chunk.text) != chunk.text:
            raise ValueError(f"{options.sources[0]}: chunk id {chunk.id!r} has one text in training, one in validation")
    if options.method == "llm":
        return _ask(sides, options, out)
    datasets = {}
    for name, chunks in sides.items():
        if options.method == "ict":
            keep_share = 0.0 if options.validation or name == VALIDATION else 0.1
            dataset, num_left_out = pseudo.inverse_cloze(chunks, seed=options.seed, keep_share=keep_share)
        else:
            dataset, num_left_out = pseudo.titles(chunks)
        datasets[name] = dataset
        if num_left_out:
            print(f"{name}: {num_left_out:,} of {len(chunks):,} chunks have nothing that asks for them")
    if datasets.keys() >= {TRAIN, VALIDATION}:
        cleaned = drop_held_out(datasets[TRAIN], datasets[VALIDATION])
        datasets[TRAIN] = cleaned.dataset
        if cleaned.dropped:
            print(f"{TRAIN}: dropped {len(cleaned.dropped):,} questions that validation asks too")
    for name, dataset in datasets.items():
        _save(dataset, out / f"{name}.json")
    return 0


def _check_method(options: argparse.Namespace) -> None:
    """Refuses what the method has no use for, such as a dry run that would write."""
    if options.round_trip is not None and options.round_trip < 1:
        raise ValueError(f"--round-trip is {options.round_trip}, expected at least 1")
    given = [key.removeprefix("setting.") for key in vars(options) if key.startswith("setting.")]
    given += [*options.dotted, *(name for name in LLM_OPTIONS if getattr(options, name) not in (None, False))]
    if options.method != "llm" and given:
        raise ValueError(f"--{given[0].replace('_', '-')} is for --method llm, this is --method {options.method}")
    if options.method not in ("ict", "llm") and options.validation:
        raise ValueError(f"--validation is for --method ict or llm, this is --method {options.method}")


def _load_sides(sources: Sequence[str]) -> dict[str, list[Chunk]]:
    """{name of the data set: its chunks}."""
    if len(sources) != 1:
        raise ValueError(f"{len(sources)} sources, expected one file or folder of chunks")
    path = Path(sources[0])
    if path.is_dir():
        found = {name: path / f"{name}.jsonl" for name in (WHOLE, TRAIN, VALIDATION)}
        found = {name: file for name, file in found.items() if file.is_file()}
        if not found:
            raise ValueError(f"{path}: no {WHOLE}.jsonl and no {TRAIN}.jsonl in it")
        return {name: load_chunks(file) for name, file in found.items()}
    if not path.is_file():
        raise ValueError(f"{path}: no such file or folder")
    if path.suffix.lower() in SUFFIXES:
        raise ValueError(f"{path}: a document, expected its chunks: cut it with `embedft chunk` first")
    return {path.stem: load_chunks(path)}


def _ask(sides: dict[str, list[Chunk]], options: argparse.Namespace, out: Path) -> int:
    config = configs.config_from_options(QuestionConfig, options)
    template = read_text(options.template) if options.template else TEMPLATE
    # One job, so that the sides share a budget, and in turn, so that each has its part when it runs out.
    turns = [((i + 0.5) / len(side), chunk) for side in sides.values() for i, chunk in enumerate(side)]
    chunks = list({chunk.id: chunk for _, chunk in sorted(turns, key=lambda turn: turn[0])}.values())
    if options.dry_run:
        print(_format_estimate(estimate(chunks, config, folder=out, template=template)))
        return 0
    outcome = write_questions(chunks, config, folder=out, template=template, base_url=options.base_url)
    print(_format_totals(outcome))
    report: dict[str, Any] = {}
    datasets: dict[str, RetrievalDataset] = {}
    # Validation first: what it asks, training may not.
    for name, side in sorted(sides.items(), key=lambda item: item[0] != VALIDATION):
        questions = {chunk.id: outcome.questions[chunk.id] for chunk in side if chunk.id in outcome.questions}
        steps: dict[str, Callable[[RetrievalDataset], Cleaned]] = {}
        if not options.no_clean:
            steps["cleaning"] = clean
        if VALIDATION in datasets:
            steps["held out"] = partial(drop_held_out, validation=datasets[VALIDATION])
        if options.round_trip is not None and name != VALIDATION and not options.validation:
            steps["round trip"] = partial(round_trip, encode=load_embedder(options.base).encode, k=options.round_trip)
        try:
            if not questions:
                raise ValueError("no questions yet")
            dataset = question_dataset(side, questions)
            for step, run in steps.items():
                before = len(dataset.queries)
                cleaned = run(dataset)
                dataset = cleaned.dataset
                report[f"{name}: {step}"] = cleaned.report()
                reasons = "".join(f"; {count:,}: {reason}" for reason, count in cleaned.counts().items())
                print(f"{name}, {step}: dropped {len(cleaned.dropped):,} of {before:,} questions{reasons}")
        except ValueError as error:  # a side without a question: the other is not lost for it
            (out / f"{name}.json").unlink(missing_ok=True)  # of an earlier call
            report[name] = str(error)
            print(f"{name}: {error}", file=sys.stderr)
            continue
        datasets[name] = dataset
        _save(dataset, out / f"{name}.json")
    write_json(out / QUESTION_REPORT, {**report, "missing": outcome.missing})
    if not outcome.missing:
        return 0 if len(datasets) == len(sides) else 1
    for reason, count in Counter(outcome.missing.values()).most_common(MAX_REASONS):
        print(f"{count:,} without questions: {reason}", file=sys.stderr)
    print(
        f"{len(outcome.missing):,} of {len(chunks):,} chunks have no questions; the same command asks for those alone "
        f"(all reasons: {out / QUESTION_REPORT})",
        file=sys.stderr,
    )
    return 1


def _format_estimate(found: Estimate) -> str:
    text = (
        f"{found.num_requests:,} of {found.num_chunks:,} chunks are to be asked for, a request each\n"
        f"estimated from bytes (4 a token): {found.prompt_tokens:,} tokens of prompts, {found.completion_tokens:,} of "
        "replies"
    )
    if found.cost is None:
        return f"{text}\nwith --price-in and --price-out, money per million tokens, it says what that costs"
    return f"{text}\nestimated cost {found.cost:.4f}, at most {found.most_cost:.4f} without repeated requests"


def _format_totals(outcome: Outcome) -> str:
    totals, num_chunks = outcome.totals, len(outcome.questions) + len(outcome.missing)
    text = (
        f"{len(outcome.questions):,} of {num_chunks:,} chunks have questions; all runs together: "
        f"{totals.num_requests:,} requests, {totals.prompt_tokens:,} tokens of prompts, "
        f"{totals.completion_tokens:,} of replies"
    )
    if totals.cost is not None:
        text += f", cost {totals.cost:.4f}"
    if totals.num_unreported:
        most = "" if totals.cost is None else f", which cost at most {totals.unreported_cost:.4f} more"
        text += f"; {totals.num_unreported:,} requests never got a reply{most}"
    return f"{text}\n{outcome.stopped}" if outcome.stopped else text


def _save(dataset: RetrievalDataset, path: Path) -> None:
    dataset.save(path, format="llamaindex")
    print(f"{path}: {len(dataset.queries):,} questions over {len(dataset.corpus):,} chunks")


# Name: (adds its arguments, runs it, what it does).
COMMANDS = {
    "chunk": (_add_chunk, _chunk, "cut PDFs and text files into chunks"),
    "questions": (_add_questions, _questions, "write questions for chunks, with an LLM or without"),
}
