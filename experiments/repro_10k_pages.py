"""One filing: trains on questions about its first pages and measures on the rest.

After an article in Better Programming (September 2023): NVIDIA's 10-K of 2022, pages 1 to 90 for training, a chunk per
page, two questions per chunk by gpt-3.5-turbo, bge-small-en, batch 10, 2 epochs. Use any filing and any
OpenAI-compatible server; paid replies stay in --out and are not requested again:

    python -m experiments.repro_10k_pages --pdf 10k.pdf --train-pages 1-90 --model gpt-4o-mini --max-cost 1.00 \\
        --price-in 0.15 --price-out 0.60 --embedding-model text-embedding-3-small

Without --pdf, it needs no key: it trains on the first 197 published chunks of Uber's 10-K and measures on the other
198.
"""

import argparse
from pathlib import Path

from embedft import Report, RetrievalDataset, evaluate, load_embedder
from embedft.corpus.chunks import Chunk, chunk_pages
from embedft.corpus.cleaning import clean
from embedft.corpus.documents import read_documents
from embedft.corpus.questions import QuestionConfig, question_dataset, write_questions
from embedft.corpus.splits import parse_pages, split_chunks
from embedft.encoders.loading import load_tokenizer
from embedft.encoders.openai_api import ApiEmbedder
from embedft.retrieval.tables import format_table

from .commandline import make_parser, run
from .repro_finetune_lyft_uber import MAX_LENGTH, METRICS, finetune_seed, format_seeds
from .sources import find_data

# bge-small-en on NVIDIA's filing.
PUBLISHED = {"hit_rate@5": (0.8516, 0.8626), "accuracy@1": (0.5769, 0.6319), "accuracy@10": (0.9011, 0.9396)}
ADA_HIT_RATE = 0.9066
CHUNK_TOKENS = 1024  # a page seldom has more


def main(options: argparse.Namespace) -> None:
    out = Path(options.out) / options.base.strip("/").replace("/", "--")
    api = ApiEmbedder(options.embedding_model, base_url=options.embedding_url) if options.embedding_model else None
    if options.pdf:
        train_set, held_out = questions_of_filing(options, Path(options.out) / "questions")
    else:
        uber = RetrievalDataset.load(find_data("lyft_uber", options.data) / "val_dataset.json")
        train_set, held_out = first_and_rest(uber, options.train_chunks)
    print(f"training  {train_set!r}\nheld out  {held_out!r}")

    base = evaluate(load_embedder(options.base, max_length=MAX_LENGTH), held_out)
    tuned = [
        finetune_seed(options.base, train_set, held_out, seed, out / f"s{seed}", name="held-out")
        for seed in options.seeds
    ]
    title = Path(options.pdf).stem if options.pdf else f"Uber from chunk {options.train_chunks + 1}"
    print(f"\n{format_seeds(title, base, tuned, PUBLISHED)}")
    print(
        f"\nbase: {options.base}; tuned: mean ± standard deviation over seeds {', '.join(map(str, options.seeds))}; "
        f"published: bge-small-en on NVIDIA's filing (text-embedding-ada-002: hit_rate@5 {ADA_HIT_RATE})."
    )
    if api is not None:
        report = measured_once(api, held_out, Path(options.out) / "api")
        rows = [[metric, f"{report.metrics[metric]:.4f}"] for metric in METRICS]
        print(f"\n{format_table([title, options.embedding_model], rows)}")


def first_and_rest(dataset: RetrievalDataset, num_first: int) -> tuple[RetrievalDataset, RetrievalDataset]:
    """Splits a dataset into questions about its first documents and questions about the others."""
    document_ids = list(dataset.corpus)

    def take(ids: set[str]) -> RetrievalDataset:
        qrels = {query: grades for query, grades in dataset.qrels.items() if grades.keys() <= ids}
        queries = {query: text for query, text in dataset.queries.items() if query in qrels}
        return RetrievalDataset(queries, {i: dataset.corpus[i] for i in document_ids if i in ids}, qrels)

    return take(set(document_ids[:num_first])), take(set(document_ids[num_first:]))


def questions_of_filing(options: argparse.Namespace, folder: Path) -> tuple[RetrievalDataset, RetrievalDataset]:
    """Reads the PDF into one chunk per page, splits it by pages and writes questions for both sides."""
    pages, skipped = read_documents([options.pdf])
    for line in skipped:
        print(line)
    tokenizer, _ = load_tokenizer(options.base)
    chunks = chunk_pages(pages, count_tokens=tokenizer.count, size=CHUNK_TOKENS, by_page=True)
    sides = split_chunks(chunks, train_pages=parse_pages(options.train_pages))
    config = QuestionConfig(
        model=options.model,
        base_url=options.url,
        num_questions=2,
        price_in=options.price_in,
        price_out=options.price_out,
        max_cost=options.max_cost,
    )
    return tuple(ask(side, config, folder) for side in sides)


def ask(chunks: list[Chunk], config: QuestionConfig, folder: Path) -> RetrievalDataset:
    """Clean questions for chunks. Raises `ValueError` if some are missing; running it again requests only those."""
    outcome = write_questions(chunks, config, folder=folder)
    if outcome.missing:
        raise ValueError(f"{len(outcome.missing)} of {len(chunks)} chunks have no questions yet; run this again")
    return clean(question_dataset(chunks, outcome.questions))[0]


def measured_once(api: ApiEmbedder, held_out: RetrievalDataset, out: Path) -> Report:
    """The report on an API's model, read from disk if it exists, so that embeddings are paid for only once."""
    folder = out / f"{api.model.replace('/', '--')}-{held_out.sha256()[:8]}"
    if not (folder / "metrics.json").is_file():
        evaluate(api, held_out).save(folder)
    return Report.load(folder)


if __name__ == "__main__":
    parser = make_parser("experiments.repro_10k_pages", __doc__)
    parser.add_argument("--pdf", metavar="FILE", help="the filing [Uber's published chunks and questions]")
    parser.add_argument("--train-pages", default="1-90", metavar="RANGES", help="pages for training [%(default)s]")
    parser.add_argument("--model", default="gpt-4o-mini", metavar="MODEL", help="LLM for the questions [%(default)s]")
    parser.add_argument("--url", metavar="URL", help="OpenAI-compatible server of --model [api.openai.com]")
    parser.add_argument("--price-in", type=float, metavar="X", help="price per million prompt tokens")
    parser.add_argument("--price-out", type=float, metavar="X", help="price per million reply tokens")
    parser.add_argument("--max-cost", type=float, metavar="X", help="most money to spend on questions")
    parser.add_argument("--embedding-model", metavar="MODEL", help="measure an API's embedding model too")
    parser.add_argument("--embedding-url", metavar="URL", help="server of --embedding-model [api.openai.com]")
    parser.add_argument("--data", metavar="DIR", help="without --pdf: has val_dataset.json [beside the checkout]")
    parser.add_argument("--train-chunks", type=int, default=197, metavar="N", help="without --pdf: for training [197]")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED", help="[0 1 2]")
    parser.add_argument("--out", default="runs/repro_10k_pages", metavar="DIR", help="[%(default)s]")
    run(main, parser)
