"""`embedft mine`: finds hard negatives for a dataset's questions, and writes pairs to train on.

embedft mine sentence-transformers/all-MiniLM-L6-v2 train.csv --out mined.jsonl --relative-margin 0.05
embedft finetune sentence-transformers/all-MiniLM-L6-v2 mined.jsonl --num-negatives 4 --out runs/mined
"""

import sys
from dataclasses import dataclass
from typing import Literal

import embedft

from ..config import REQUIRED, option
from ..data.dataset import RetrievalDataset
from ..files import JSONL
from .options import DATASETS, Adapted, Data, Windows, check_output, load_encoder, load_training_data, print_costs


@dataclass(frozen=True, kw_only=True)
class Guards:
    """Guards against false negatives: documents that answer a question but are not labelled so."""

    relative_margin: float | None = option(None, "0.05: negatives score at most 95% of the lowest positive [none]")
    absolute_margin: float | None = option(None, "negatives score at least this much below the lowest positive [none]")
    max_score: float | None = option(None, "highest score of a negative [none]")
    min_score: float | None = option(None, "lowest score of a negative [none]")


@dataclass(frozen=True, kw_only=True)
class Options(Adapted, Guards, Windows, Data):
    data: str = option(REQUIRED, f"{DATASETS}; its corpus is searched", metavar="DATA", positional=True)
    out: str = option(REQUIRED, "file for the questions, documents and negatives", metavar="FILE.jsonl")
    ranks: list[int] = option([10, 100], "ranks to take negatives from", metavar="FIRST LAST")
    num_negatives: int = option(4, "negatives per question")
    sampling: Literal["random", "top"] = option("random", "draw from the ranks at random, or take the first")
    seed: int = option(0, "random seed of the draw")
    scorer: str | None = option(None, "cross-encoder whose scores the guards compare [MODEL's own]", metavar="MODEL")
    replace: bool = option(False, "drop the negatives in DATA; otherwise they come first")
    overwrite: bool = option(False, "replace FILE.jsonl")

    def __post_init__(self):
        if not self.out.endswith(JSONL):
            expected = f"a name ending in {' or '.join(JSONL)}, the format that holds negatives"
            raise ValueError(f"--out is {self.out}, expected {expected}")


def run(options: Options) -> None:
    """Mines negatives, and writes the pairs."""
    check_output(options.out, overwrite=options.overwrite)
    dataset = load_training_data(options.data, options)
    embedder = load_encoder(options)
    scorer = None
    if options.scorer is not None:
        how = {"device": options.device, "allow_pickle": options.allow_pickle}
        scorer = embedft.load_scorer(options.scorer, **how)
    names = ("ranks", "num_negatives", "seed", "sampling", "replace", "dim", "passages", *Guards.__annotations__)
    mined = embedft.mine(embedder, dataset, scorer=scorer, **{name: getattr(options, name) for name in names})
    counts = {q: len(mined.negatives.get(q, ())) for q in mined.queries if mined.relevant(q)}
    if not any(counts.values()):
        raise ValueError("found no negatives, so nothing is written: the margins or the ranks leave none")
    if short := sum(count < options.num_negatives for count in counts.values()):
        few = f"{short:,} of {len(counts):,} questions have fewer than {options.num_negatives} negatives"
        none = f"{list(counts.values()).count(0):,} have none"
        more = "; a higher last rank finds more" if options.ranks[1] < len(dataset.corpus) else ""
        print(f"{few}, {none}{more}", file=sys.stderr)
    # JSONL has no titles, so they go into the texts.
    qrels = {query_id: mined.qrels[query_id] for query_id in counts}
    negatives = {query_id: mined.negatives[query_id] for query_id in counts if query_id in mined.negatives}
    named = {i for ids in (*qrels.values(), *negatives.values()) for i in ids}
    corpus = {document_id: text for document_id, text in mined.texts.items() if document_id in named}
    kinds = {query_id: kind for query_id, kind in mined.kinds.items() if query_id in counts}
    pairs = RetrievalDataset({i: mined.queries[i] for i in counts}, corpus, qrels, negatives, kinds=kinds)
    pairs.save(options.out)
    print_costs(embedder)
    numbers = f"{len(counts):,} questions, {len(pairs.corpus):,} documents, {sum(counts.values()):,} negatives"
    print(f"{options.out}: {numbers}")
