"""The data sets and models of the grids in experiments/grids, made once from published ones.

    BASE = LYFT | {"lr": 5e-5}
    TESTS = tests()

Training and validation have questions about Lyft's 10-K, and no chunk in common; the tests are Uber's questions and,
for what a model tuned on finance forgets, SciFact and the docstrings of installed packages.
"""

from pathlib import Path

from embedft import RetrievalDataset, load_embedder
from embedft.corpus.chunks import Chunk
from embedft.corpus.kinds import pseudo_kinds
from embedft.corpus.pseudo import inverse_cloze
from embedft.encoders.pooling import Pooling

from . import commandline, sources
from .ablate import OUT, halves
from .repro_matryoshka_finance import merge_equal_texts, read_rows, split_rows

SEED = 0


def lyft(name: str = "published") -> tuple[str, str]:
    """Files of training and validation questions about Lyft: the published ones for four fifths of the chunks, and for
    the rest. "apart" trains with a copy of the chunk for each question, so that nothing says which chunks are equal;
    "ict" with a sentence of each chunk (inverse cloze) instead; "mix" with the questions and, of what `pseudo_kinds`
    leaves of the chunks, titles, claims and keywords."""
    train, validation = halves(sources.find_data("lyft_uber", None) / "train_dataset.json", seed=SEED)
    if name == "published":
        return train, validation
    path = OUT / "data" / f"lyft-{name}.json"
    if not path.exists():
        make = {"apart": _apart, "ict": _sentences, "mix": _mix}[name]
        make(RetrievalDataset.load(train)).save(path)
    return str(path), validation


def finance() -> tuple[str, str, str]:
    """Files of training, validation and test questions of the finance pairs, split as in repro_matryoshka_finance, but
    for questions that a later part has too, which the earlier one keeps: test, validation, training."""
    paths = [OUT / "data" / f"finance-{name}.json" for name in ("train", "validation", "test")]
    if not all(path.exists() for path in paths):
        split = split_rows(*read_rows(sources.find_data("finance_qa", None) / "Financial-QA-10k.csv"), keep_back=True)
        seen: set[str] = set()
        for path, part in zip(paths[::-1], (split.test, split.held_out, merge_equal_texts(split.train)), strict=True):
            queries = {i: text for i, text in part.queries.items() if text not in seen}
            seen |= set(queries.values())
            RetrievalDataset(queries, part.corpus, {i: part.qrels[i] for i in queries}).save(path)
    return str(paths[0]), str(paths[1]), str(paths[2])


def tests() -> dict[str, str]:
    """{name: test set}."""
    uber = sources.find_data("lyft_uber", None) / "val_dataset.json"
    return {"uber": str(uber), **sources.forgetting(OUT / "data")}


def pooled(name: str) -> str:
    """A folder with the base model under another pooling: "max", "cls", ..."""
    path = OUT / "models" / f"{Path(commandline.BASE).name}-{name}"
    if not path.exists():
        embedder = load_embedder(commandline.BASE, device="cpu")
        embedder.pooling = Pooling((name,), embedder.encoder.config.hidden_size)
        embedder.save(path)
    return str(path)


def _apart(dataset: RetrievalDataset) -> RetrievalDataset:
    # Blanks at the end, which tokenizers ignore, make the texts of equal chunks different ones.
    pairs = {query_id: dataset.relevant(query_id)[0] for query_id in dataset.queries}
    corpus = {f"{id} {row}": dataset.corpus[id] + " " * row for row, id in enumerate(pairs.values())}
    return RetrievalDataset(dataset.queries, corpus, {q: {i: 1} for q, i in zip(pairs, corpus, strict=True)})


def _sentences(dataset: RetrievalDataset) -> RetrievalDataset:
    return inverse_cloze(_chunks(dataset), seed=SEED)


def _mix(dataset: RetrievalDataset) -> RetrievalDataset:
    pseudo, _ = pseudo_kinds(_chunks(dataset), seed=SEED)
    kinds = dict.fromkeys(dataset.queries, "question") | pseudo.kinds
    return RetrievalDataset(dataset.queries | pseudo.queries, pseudo.corpus, dataset.qrels | pseudo.qrels, kinds=kinds)


def _chunks(dataset: RetrievalDataset) -> list[Chunk]:
    return [Chunk(id, text) for id, text in dataset.corpus.items()]


TRAIN, VALIDATION = lyft()
LYFT = {
    "data": [TRAIN],
    "validation": VALIDATION,
    "epochs": 2,
    "batch_size": 32,
    "lr": 2e-5,
    "warmup": 0.1,
    "max_length": 256,
}
