"""A finished ablation in a folder, without any training: points and seeds with given ranks of the right document.

write_grid(tmp_path / "out", {"uber": {(0, 0): [1, 2, 4], (1, 0): [1, 1, 2], (0, None): [3, 3, 3]}})
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from tiny import make_dataset, make_embedder

from embedft import RetrievalDataset, evaluate_run
from embedft.ablation.grid import EVAL, RESULT, VALIDATION, Cell, Grid
from embedft.files import write_json
from embedft.retrieval.run import Run

POINTS = [{"lr": 5e-5, "loss.temperature": 0.05}, {"lr": 1e-5, "loss.temperature": 0.05}]
POINTS += [{"lr": 5e-5, "loss.temperature": 0.02}, {"lr": 1e-5, "loss.temperature": 0.02}]
Ranks = Mapping[tuple[int, int | None], Sequence[int]]  # {(point, seed): of each question; 0: not found}


def make_questions(number: int, *, question: str = "question {}", passage: str = "passage {}") -> RetrievalDataset:
    """Question i is answered by document i alone."""
    corpus = {f"d{i}": passage.format(i) for i in range(max(number, 12))}
    return RetrievalDataset(
        {f"q{i}": question.format(i) for i in range(number)}, corpus, {f"q{i}": {f"d{i}": 1} for i in range(number)}
    )


def write_inputs(folder: Path) -> None:
    """A model and four data sets without a question in common, for grids that are planned or run."""
    make_embedder(folder / "model")
    for name, seed in (("train", 0), ("val", 1), ("uber", 2), ("scifact", 3)):
        make_dataset(8, 8, seed=seed).save(folder / f"{name}.jsonl")


def run_of(dataset: RetrievalDataset, ranks: Sequence[int]) -> Run:
    """A run in which question i has its document at the rank ranks[i]."""
    results = {}
    for (query_id, grades), rank in zip(dataset.qrels.items(), ranks, strict=True):
        (right,) = grades
        found = [i for i in dataset.corpus if i != right][:11]
        found[rank - 1 : rank - 1] = [right] if rank else []
        results[query_id] = {document_id: -float(place) for place, document_id in enumerate(found)}
    return Run.from_dict(results)


def write_grid(
    out: Path,
    ranks: Mapping[str, Ranks],
    *,
    points: Sequence[dict] = POINTS,
    datasets: Mapping[str, RetrievalDataset] | None = None,
    metrics: Sequence[str] = ("mrr@10", "hit_rate@1"),
) -> Grid:
    """Writes the folder and, beside it, the test sets. `ranks` are those of each test and of "validation"; a cell
    that has none there is not finished."""
    seeds = sorted({seed for found in ranks.values() for _, seed in found if seed is not None})
    used = sorted({point for found in ranks.values() for point, _ in found})
    cells, tests = [], {name: str(out.parent / f"{name}.json") for name in ranks if name != VALIDATION}
    sizes = {name: len(next(iter(found.values()))) for name, found in ranks.items()}
    datasets = {name: make_questions(size) for name, size in sizes.items()} | dict(datasets or {})
    for name, path in tests.items():
        datasets[name].save(path, format="llamaindex")
    hashes = {"model": "m", **{f"test {name}": RetrievalDataset.load(path).sha256() for name, path in tests.items()}}
    for place, seed in [(0, None), *((place, seed) for place in used for seed in seeds)]:
        key = f"{place:08x}{99 if seed is None else seed:08x}"
        cells.append(Cell(key, points[place], seed, {"evaluate": {}}, hashes, None if seed is None else key))
    axes = {key: sorted({point[key] for point in points}) for key in points[0]}
    grid = Grid({"model": "tiny"}, axes, [points[i] for i in used], seeds, tests, metrics[0], cells, out)
    grid.save()
    for cell in cells:
        place = points.index(cell.point), cell.seed
        if not any(place in found for found in ranks.values()):
            continue
        for name, found in ranks.items():
            if place in found:
                report = evaluate_run(run_of(datasets[name], found[place]), datasets[name], metrics=metrics)
                report.save(grid.folder(cell) / EVAL / name)
        seconds = {"train": 10.0 * (cell.seed or 0) + 20.0, "evaluate": 1.0}
        write_json(
            grid.folder(cell) / RESULT,
            {"seconds": seconds, "peak_bytes": (1 + (cell.seed or 0)) * 2**30, "num_weights_trained": 5},
        )
    return grid
