"""Fine-tunes a real encoder on a real retrieval task in a few minutes on a CPU, with no key and no download.

The texts are the docstrings of the installed torch, NumPy and standard library. A question is a docstring's summary
sentence, and its document is the rest of the docstring; no module is in both training and test.

With your own texts: --pdf FILE ... cuts PDFs (or text, Markdown, folders) into chunks, and one sentence of each becomes
a question (inverse cloze); --data FILE takes questions and documents in any format that RetrievalDataset.load reads.
Both are split so that no document is in both training and test.

    python -m experiments.quickstart
    python -m experiments.quickstart --pdf report.pdf --out runs/from-pdf
    python -m experiments.quickstart --data pairs.csv --out runs/mine
"""

import argparse
import time
from pathlib import Path

from embedft import FinetuneConfig, RetrievalDataset, evaluate, finetune, load_embedder
from embedft.corpus.chunks import chunk_pages
from embedft.corpus.documents import drop_repeated_lines, read_documents
from embedft.corpus.pseudo import docstring_datasets, inverse_cloze
from embedft.corpus.splits import split_chunks
from embedft.device import describe, peak_memory_bytes
from embedft.encoders.loading import load_tokenizer
from embedft.files import write_json
from embedft.retrieval.tables import format_table
from embedft.training.run_folder import DONE, MODEL, check_run

from .commandline import make_parser, run
from .report import COMPARISON_HEADER, compare_metrics, comparison_rows

CONFIG = FinetuneConfig(epochs=1, batch_size=64, lr=5e-5, warmup=0.1, max_length=128)
NUM_TRAIN, NUM_HELD_OUT = 2_000, 1_000
REPORT = "report.json"


def main(options: argparse.Namespace) -> None:
    start, out = time.perf_counter(), Path(options.out)
    is_trained = not options.overwrite and (out / DONE).exists()
    if is_trained and (out / REPORT).exists():
        raise ValueError(f"{out}: this run is done; choose another folder with --out, or --overwrite it")
    existing = "overwrite" if options.overwrite else "resume"
    if not is_trained:
        check_run(out, existing)
    embedder = load_embedder(options.base)
    embedder.max_length = CONFIG.max_length
    if options.pdf:
        train_set, held_out = cloze_datasets(options.pdf, options.base)
    elif options.data:
        dataset = RetrievalDataset.load(options.data, skip_empty=True)
        if dataset.num_skipped:
            print(f"{options.data}: dropped {dataset.num_skipped} rows with empty texts")
        train_set, held_out = dataset.split(0.8, seed=CONFIG.seed)
    else:
        print("reading the docstrings of torch, NumPy and the standard library ...")
        train_set, held_out = docstring_datasets(num_train=NUM_TRAIN, num_held_out=NUM_HELD_OUT, seed=CONFIG.seed)
    print(f"training  {train_set!r}\nheld out  {held_out!r}\nmodel     {options.base} on {describe(embedder.device)}")

    before = evaluate(embedder, held_out)
    if is_trained:  # and killed before its report was written
        embedder = load_embedder(out / MODEL)
    else:
        finetune(embedder, train_set, CONFIG, out=out, existing=existing)
    after = evaluate(embedder, held_out)

    before.save(out / "eval" / "held-out-base")
    after.save(out / "eval" / "held-out")
    comparisons = compare_metrics(before, after)
    seconds, memory = time.perf_counter() - start, peak_memory_bytes(embedder.device)
    write_json(
        out / REPORT,
        {
            "base": options.base,
            "data": options.pdf or options.data or "docstrings",
            "num_train": len(train_set.queries),
            "num_held_out": len(held_out.queries),
            "metrics": [
                {
                    "metric": c.metric,
                    "before": c.base,
                    "after": c.other,
                    "difference": c.difference,
                    "interval": list(c.interval),
                    "p_value": c.p_value,
                }
                for c in comparisons
            ],
            "seconds": seconds,
            "peak_memory_bytes": memory,
        },
    )
    print(f"\n{format_table(COMPARISON_HEADER, comparison_rows(comparisons))}\n")
    print(f"{len(held_out.queries):,} held-out questions over {len(held_out.corpus):,} documents, seed {CONFIG.seed};")
    print("ndcg@10 was chosen beforehand, the other rows are for context; intervals resample questions by document;")
    print(f"{seconds:.0f} s, peak memory {memory / 2**30:.1f} GiB; everything is in {out}, figures in report.json")
    print(f"""
Load the fine-tuned model (it cuts texts at {CONFIG.max_length} tokens, as in training; max_length changes that):
    from embedft import load_embedder;                     model = load_embedder("{out}/model")
    from sentence_transformers import SentenceTransformer; model = SentenceTransformer("{out}/model")
Try your own documents, or questions that you already have (QA JSON, BEIR folder, JSONL or CSV pairs):
    python -m experiments.quickstart --pdf FILE... --out runs/from-pdf
    python -m experiments.quickstart --data FILE --out runs/mine""")


def cloze_datasets(paths: list[str], base: str) -> tuple[RetrievalDataset, RetrievalDataset]:
    """Chunks of documents, each with one of its own sentences as the question: 80% for training, 20% held out."""
    pages, skipped = read_documents(paths)
    for line in skipped:
        print(line)
    pages, _ = drop_repeated_lines(pages)
    tokenizer, num_added = load_tokenizer(base)
    chunks = chunk_pages(pages, count_tokens=tokenizer.count, size=CONFIG.max_length - num_added)
    train, validation = split_chunks(chunks, train_share=0.8, seed=CONFIG.seed)
    return inverse_cloze(train, seed=CONFIG.seed), inverse_cloze(validation, seed=CONFIG.seed, keep_share=0.0)


if __name__ == "__main__":
    parser = make_parser("experiments.quickstart", __doc__)
    texts = parser.add_mutually_exclusive_group()
    texts.add_argument("--data", metavar="FILE", help="questions and documents [docstrings of installed packages]")
    texts.add_argument("--pdf", nargs="+", metavar="FILE", help="PDF, text or Markdown files, or folders of them")
    parser.add_argument("--out", default=f"runs/quickstart/minilm-s{CONFIG.seed}", metavar="DIR", help="[%(default)s]")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in DIR")
    run(main, parser)
