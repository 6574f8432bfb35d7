"""`embedft questions`: writes questions about chunks, with a language model or without one.

embedft questions chunks --out questions --model gpt-4o-mini --price-in 0.15 --price-out 0.60 --max-cost 1.00
embedft questions chunks --out questions --method ict
embedft questions chunks --out mix --kinds question claim keywords title --num-questions 1 --max-cost 1.00
"""

import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal

import embedft

from .. import config
from ..config import REQUIRED, changed, option, part
from ..corpus.chunks import Chunk
from ..corpus.cleaning import clean, drop_held_out, report, round_trip
from ..corpus.kinds import PSEUDO_KINDS, join_kinds, pseudo_kinds
from ..corpus.prompts import KINDS, QUESTION
from ..corpus.pseudo import docstring_datasets, inverse_cloze, titles, without_sentence, without_title
from ..corpus.questions import Estimate, Outcome, QuestionConfig, estimate, question_dataset, total, write_questions
from ..data.checks import check_distinct
from ..data.dataset import RetrievalDataset
from ..files import check_writable, read_object, read_text, replace_files, write_json
from .options import DEFAULT_MODEL, TRAIN, VALIDATION, check_output, load_chunk_files

REPORT = "question-report.json"
METHODS = (
    "llm asks a model; ict takes a sentence of each chunk, title its heading, pseudo both and its keywords,"
    " docstring summaries of functions"
)
KIND = Literal["question", "claim", "keywords", "title"]


@dataclass(frozen=True, kw_only=True)
class LanguageModel(QuestionConfig):
    """A language model (--method llm; the key comes from OPENAI_API_KEY)."""

    template: str | None = option(
        None, "prompt for questions, with {text} and {num_questions} [built in]", metavar="FILE"
    )
    dry_run: bool = option(False, "estimate the cost, and send nothing")
    clean: bool = option(True, "drop questions that ask nothing, point at their source, copy it or repeat another")
    round_trip: int | None = option(None, "keep those whose chunk is in --base's top K [all]", metavar="K", least=1)
    base: str = option(DEFAULT_MODEL, "model for --round-trip")


@dataclass(frozen=True, kw_only=True)
class Options(LanguageModel, config.Options):
    sources: list[str] = option(REQUIRED, "chunk files; for docstring: packages", metavar="SOURCE", positional=True)
    out: str = option(REQUIRED, "folder for the datasets, replies and a report", metavar="DIR")
    method: Literal["llm", "ict", "title", "pseudo", "docstring"] = option("llm", METHODS)
    kinds: list[KIND] | None = option(
        None,
        "what to write, --num-questions of each, and record as its kind: question, claim, keywords, title"
        " [questions, without a kind; pseudo: claim keywords title]",
        metavar="KIND ...",
    )
    seed: int = option(0, "random seed for ict, pseudo and docstring")
    held_out: bool = option(False, "SOURCE is held out: ict and pseudo always remove the sentence; no round trip")
    num_docstrings: list[int] = option([2_000, 1_000], "docstrings for training and validation", metavar="N N")
    overwrite: bool = option(False, "replace questions of another method or other settings; replies stay")

    def __post_init__(self):
        llm = [field.name for field in fields(LanguageModel)]
        if self.method != "llm" and (given := changed(self, llm)):
            raise ValueError(f"{given[0]} needs --method llm, found --method {self.method}")
        if self.method not in ("ict", "pseudo", "llm") and self.held_out:
            raise ValueError(f"--held-out needs --method ict, pseudo or llm, found --method {self.method}")
        if self.kinds is not None:
            if self.method not in ("llm", "pseudo"):
                raise ValueError(f"--kinds needs --method llm or pseudo, found --method {self.method}")
            check_distinct(self.kinds, "kinds:")
            if self.template and QUESTION.name not in self.kinds:
                raise ValueError(f"--template is the prompt for questions, found --kinds {' '.join(self.kinds)}")
        if self.method != "docstring" and len(self.sources) != 1:
            raise ValueError(f"{len(self.sources)} sources, expected one file or folder of chunks")


def run(options: Options) -> int:
    """Writes the datasets. Returns 1 when a chunk has no questions yet, or a dataset would be empty."""
    check_writable(options.out)
    if options.method == "docstring":
        train, held_out = options.num_docstrings
        _check_output(options, (TRAIN, VALIDATION))
        sides = docstring_datasets(num_train=train, num_held_out=held_out, seed=options.seed, packages=options.sources)
        _save(Path(options.out), dict(zip((TRAIN, VALIDATION), sides, strict=True)))
        return 0
    sides = load_chunk_files(Path(options.sources[0]))
    texts: dict[str, str] = {}
    for chunk in (chunk for side in sides.values() for chunk in side):
        if texts.setdefault(chunk.id, chunk.text) != chunk.text:
            raise ValueError(f"{options.sources[0]}: chunk {chunk.id!r} has different texts in training and validation")
    return _ask(options, sides) if options.method == "llm" else _pseudo(options, sides)


def _check_output(options: Options, sides: Iterable[str], why: str = "") -> None:
    files = [Path(options.out, f"{name}.json") for name in sides]
    check_output(options.out, files, overwrite=options.overwrite, why=why)


def _pseudo(options: Options, sides: dict[str, list[Chunk]]) -> int:
    _check_output(options, sides)
    datasets, missing, reports = {}, {}, {}
    for name, chunks in sides.items():
        keep_share = 0.0 if options.held_out or name == VALIDATION else 0.1
        left_out: dict[str, dict[str, str]] = {}  # by kind
        if options.method == "pseudo":
            how = {"seed": options.seed, "keep_share": keep_share}
            datasets[name], left_out = pseudo_kinds(chunks, options.kinds or PSEUDO_KINDS, **how)
            missing |= {f"{id}/{kind}": reason for kind, ids in left_out.items() for id, reason in ids.items()}
        elif options.method == "ict":
            datasets[name] = inverse_cloze(chunks, seed=options.seed, keep_share=keep_share)
            left_out["question"] = without_sentence(chunks)
        else:
            datasets[name], left_out["question"] = titles(chunks), without_title(chunks)
        missing |= left_out.get("question", {})
        for kind, ids in left_out.items():
            if ids:
                reasons = "".join(f"; {count:,}: {reason}" for reason, count in Counter(ids.values()).most_common())
                print(f"{name}: {len(ids):,} of {len(chunks):,} chunks yield no {kind}{reasons}")
    if datasets.keys() >= {TRAIN, VALIDATION}:
        before = datasets[TRAIN]
        datasets[TRAIN], dropped = drop_held_out(before, datasets[VALIDATION])
        reports[f"{TRAIN}: held out"] = report(before, datasets[TRAIN], dropped)
        if dropped:
            print(f"{TRAIN}: dropped {len(dropped):,} questions that are also in validation")
    settings = {name: getattr(options, name) for name in ("method", "seed", "held_out")}
    settings |= {"kinds": list(left_out)} if options.method == "pseudo" else {}
    _save(Path(options.out), datasets, report={"settings": settings, **reports, "missing": missing})
    return 0


def _ask(options: Options, sides: dict[str, list[Chunk]]) -> int:
    settings, out = part(options, QuestionConfig), Path(options.out)
    templates = {name: KINDS[name].template for name in options.kinds or [QUESTION.name]}
    if options.template:
        templates[QUESTION.name] = read_text(options.template)
    # One job, so that the sides share a budget; interleaved, so that each gets its part before it runs out.
    turns = [((i + 0.5) / len(side), chunk) for side in sides.values() for i, chunk in enumerate(side)]
    chunks = list({chunk.id: chunk for _, chunk in sorted(turns, key=lambda turn: turn[0])}.values())
    prompts = {name: {"template": template, "kind": KINDS[name]} for name, template in templates.items()}
    if options.dry_run:
        found = [estimate(chunks, settings, folder=out, **prompt) for prompt in prompts.values()]
        _print_estimate(total(found), len(chunks), len(templates))
        return 0
    asked = {name: getattr(settings, name) for name in ("model", "num_questions", "reply_tokens", "parameters")}
    hashes = {name: hashlib.sha256(template.encode()).hexdigest() for name, template in templates.items()}
    asked["template_sha256"] = hashes[QUESTION.name] if options.kinds is None else hashes
    _check_settings(options, sides, asked)
    outcomes = {}
    for name, prompt in prompts.items():  # kind by kind: a budget that runs out leaves the last ones without any
        outcomes[name] = write_questions(chunks, settings, folder=out, **prompt)
        _print_totals(outcomes[name], name if options.kinds else "")
    reports, datasets = {}, {}
    # Validation first: its questions are dropped from training.
    for name, side in sorted(sides.items(), key=lambda item: item[0] != VALIDATION):
        try:
            datasets[name] = _cleaned(options, name, _written(side, outcomes, options), datasets, reports)
        except ValueError as error:  # an empty split does not block the other
            reports[name] = str(error)
            print(f"{name}: {error}", file=sys.stderr)
    empty = [f"{name}.json" for name in sides if name not in datasets]
    missing = {name: outcome.missing for name, outcome in outcomes.items()}
    as_reported = missing[QUESTION.name] if options.kinds is None else missing
    _save(out, datasets, stale=empty, report={"settings": asked, **reports, "missing": as_reported})
    for kind, ids in missing.items():
        what = KINDS[kind].keys[0]
        for reason, count in Counter(ids.values()).most_common(5):
            print(f"{count:,} chunks without {what}: {reason}", file=sys.stderr)
        left = f"{len(ids):,} of {len(chunks):,} chunks have no {what}"
        if ids:
            print(f"{left}; run the same command to request only those (all reasons: {out / REPORT})", file=sys.stderr)
    return 0 if len(datasets) == len(sides) and not any(missing.values()) else 1


def _written(side: Sequence[Chunk], outcomes: Mapping[str, Outcome], options: Options) -> RetrievalDataset:
    """The questions of one side, with their kinds if --kinds was given."""
    found = {}
    for kind, outcome in outcomes.items():
        questions = {chunk.id: outcome.questions[chunk.id] for chunk in side if chunk.id in outcome.questions}
        if questions:
            found[kind] = question_dataset(side, questions)
    if not found:
        raise ValueError("no questions yet")
    return found[QUESTION.name] if options.kinds is None else join_kinds(found)


def _cleaned(
    options: Options, name: str, dataset: RetrievalDataset, datasets: Mapping[str, RetrievalDataset], reports: dict
) -> RetrievalDataset:
    """The dataset of the side `name` after all steps, each of which adds to `reports`; `datasets` are those before."""
    steps: dict[str, Callable] = {"cleaning": clean} if options.clean else {}
    if VALIDATION in datasets:
        steps["held out"] = partial(drop_held_out, validation=datasets[VALIDATION])
    if options.round_trip is not None and name != VALIDATION and not options.held_out:
        encode = embedft.load_embedder(options.base).encode
        steps["round trip"] = partial(round_trip, encode=encode, k=options.round_trip)
    for step, function in steps.items():
        before = dataset
        dataset, dropped = function(before)
        reports[f"{name}: {step}"] = found = report(before, dataset, dropped)
        reasons = "".join(f"; {kind['count']:,}: {reason}" for reason, kind in found["dropped"].items())
        print(f"{name}, {step}: dropped {len(dropped):,} of {len(before.queries):,} questions{reasons}")
    return dataset


def _check_settings(options: Options, sides: Iterable[str], asked: dict) -> None:
    """Raises `ValueError` if --out has datasets of other settings, which would be replaced, before requests cost."""
    path = Path(options.out, REPORT)
    report = read_object(path) if path.is_file() else {"settings": {}}
    found = report.get("settings", asked)  # reports of older versions have none
    if found != asked:
        new = {name: value for name, value in asked.items() if found.get(name) != value}
        _check_output(options, sides, f", not written with {new}")


def _print_estimate(found: Estimate, num_chunks: int, num_kinds: int) -> None:
    each = "each text that has no questions yet" if num_kinds == 1 else f"each text and each of {num_kinds} kinds"
    print(f"{found.num_requests:,} requests for {num_chunks:,} chunks: one for {each}")
    print(f"about {found.prompt_tokens:,} prompt tokens (4 bytes each), {found.completion_tokens:,} reply tokens")
    if found.cost is None:
        print("for the cost, pass --price-in and --price-out, per million tokens")
    else:
        print(f"cost about {found.cost:.4f}, at most {found.most_cost:.4f} if none is sent again, in the prices' unit")


def _print_totals(outcome: Outcome, kind: str) -> None:
    spent, num_chunks = outcome.ledger, len(outcome.questions) + len(outcome.missing)
    cost = "" if spent.prices is None else f", cost {spent.cost:.4f}"
    tokens = f"{spent.prompt_tokens:,} prompt tokens, {spent.completion_tokens:,} reply tokens{cost}"
    if spent.open:
        most = "" if spent.prices is None else f" and may have cost up to {spent.open_cost:.4f} more"
        tokens += f"; {len(spent.open):,} requests reported no token usage{most}"
    done = f"{len(outcome.questions):,} of {num_chunks:,} chunks have {KINDS[kind].keys[0] if kind else 'questions'}"
    print(f"{done}; in all runs: {spent.num_requests:,} requests, {tokens}")
    if outcome.stopped:
        print(outcome.stopped)


def _save(out: Path, datasets: Mapping[str, RetrievalDataset], *, stale=(), report: dict | None = None) -> None:
    """Writes the datasets, with a `report` or in place of those that an old report is about."""
    if report is None and any((out / f"{name}.json").exists() for name in datasets):
        stale = [REPORT]
    with replace_files(out, stale=stale) as new:
        for name, dataset in datasets.items():
            dataset.save(new / f"{name}.json", format="llamaindex")
        if report is not None:
            write_json(new / REPORT, report)
    for name, dataset in datasets.items():
        print(f"{out / name}.json: {len(dataset.queries):,} questions over {len(dataset.corpus):,} chunks")
