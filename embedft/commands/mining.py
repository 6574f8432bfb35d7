"""`embedft mine`: finds hard negatives for the questions of a dataset, and writes pairs to train on.

embedft mine sentence-transformers/all-MiniLM-L6-v2 train.csv --out mined.jsonl --relative-margin 0.05
embedft finetune sentence-transformers/all-MiniLM-L6-v2 mined.jsonl --num-negatives 4 --out runs/mined
"""

import argparse
import sys
from pathlib import Path

from ..data.dataset import RetrievalDataset
from ..files import check_writable
from ..retrieval.metrics import has_relevant
from ..retrieval.mining import SAMPLINGS, mine
from .models import _add_encoding, _add_loading, _add_model, _add_store, _load_encoding, _load_training, _print_store
from .retrieval import _add_passages


def _add_mine(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("data", metavar="DATA", help="QA JSON, BEIR folder, JSONL or CSV pairs; its corpus is searched")
    parser.add_argument(
        "--out",
        required=True,
        metavar="FILE.jsonl",
        help="gets the questions with their documents and negatives, for training: the rest of the corpus is not in it",
    )
    parser.add_argument(
        "--ranks",
        type=int,
        nargs=2,
        default=[10, 100],
        metavar=("FIRST", "LAST"),
        help="negatives are among the documents found at these ranks [10 100]",
    )
    parser.add_argument("--num-negatives", type=int, default=4, metavar="N", help="for each question [4]")
    parser.add_argument(
        "--sampling", choices=SAMPLINGS, default="random", help="drawn from what is found, or the first of it [random]"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draw [0]")
    _add_passages(parser)
    parser.add_argument("--adapter", metavar="DIR", help="have vectors go through the adapter in DIR")
    parser.add_argument("--replace", action="store_true", help="drop the negatives that DATA has; else they come first")
    parser.add_argument("--split", metavar="NAME", help="of a BEIR folder DATA [train, or the only one]")
    guards = parser.add_argument_group("against false negatives, documents that answer but are not known to")
    guards.add_argument(
        "--relative-margin", type=float, metavar="X", help="0.05: at most 95%% of the score of a known answer [none]"
    )
    guards.add_argument(
        "--absolute-margin", type=float, metavar="X", help="so much below the score of a known answer [none]"
    )
    guards.add_argument("--max-score", type=float, metavar="X", help="highest score of a negative [none]")
    guards.add_argument("--min-score", type=float, metavar="X", help="lowest score of a negative [none]")
    _add_encoding(parser)
    _add_store(parser)
    _add_loading(parser)


def _mine(options: argparse.Namespace) -> None:
    out = Path(options.out)
    if out.suffix != ".jsonl":
        raise ValueError(f"--out is {out}, expected a name that ends in .jsonl: the format that holds negatives")
    check_writable(out.parent)
    dataset = _load_training(options.data, options)
    embedder = _load_encoding(options, adapter=options.adapter)
    mined = mine(
        embedder,
        dataset,
        ranks=options.ranks,
        num_negatives=options.num_negatives,
        seed=options.seed,
        sampling=options.sampling,
        relative_margin=options.relative_margin,
        absolute_margin=options.absolute_margin,
        min_score=options.min_score,
        max_score=options.max_score,
        replace=options.replace,
        dim=options.dim,
        passages=options.passages,
    )
    counts = {q: len(mined.negatives.get(q, ())) for q in mined.queries if has_relevant(mined.qrels.get(q, {}))}
    short = sum(count < options.num_negatives for count in counts.values())
    if not any(counts.values()):
        raise ValueError("no question has a negative, nothing is written: the margins or the ranks leave none")
    if short:
        print(
            f"{short:,} of {len(counts):,} questions have fewer than {options.num_negatives} negatives,"
            f" {sum(count == 0 for count in counts.values()):,} none: a later last rank finds more",
            file=sys.stderr,
        )
    pairs = _training_pairs(mined, list(counts))
    pairs.save(out)
    _print_store(embedder)
    print(f"{out}: {len(counts):,} questions, {len(pairs.corpus):,} documents, {sum(counts.values()):,} negatives")


def _training_pairs(dataset: RetrievalDataset, query_ids: list[str]) -> RetrievalDataset:
    """Some queries with the documents that they name, each with its title in its text: what JSONL can hold."""
    qrels = {query_id: dataset.qrels[query_id] for query_id in query_ids}
    negatives = {query_id: dataset.negatives[query_id] for query_id in query_ids if query_id in dataset.negatives}
    named = {i for ids in (*qrels.values(), *negatives.values()) for i in ids}
    texts = zip(dataset.corpus, dataset.document_texts(), strict=True)
    corpus = {document_id: text for document_id, text in texts if document_id in named}
    return RetrievalDataset({i: dataset.queries[i] for i in query_ids}, corpus, qrels, negatives)


# Name: (adds its arguments, runs it, what it does).
COMMANDS = {"mine": (_add_mine, _mine, "find hard negatives for the questions of a dataset")}
