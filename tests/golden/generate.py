"""Writes the golden figures that tests/test_golden.py checks. Run it only if figures are meant to change.

    python tests/golden/generate.py

All inputs come from closed forms or a seeded generator, and losses are in float64, so the figures hold on any CPU
within the test's tolerances.
"""

import json
import math
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from test_every_loss import SPECS  # noqa: E402
from tiny import make_dataset, make_embedder  # noqa: E402

from embedft import LOSSES, FinetuneConfig, Targets, build_loss, finetune  # noqa: E402

TEXTS = ("what is the fee", "hello world", "the order of the limit, 42!", "", "revenue of what query 語 σ")
CONFIGS = {
    "in_batch": FinetuneConfig(epochs=2, batch_size=4, lr=1e-3, warmup=0.1, weight_decay=0.01),
    "hard negatives": FinetuneConfig(epochs=1, batch_size=4, lr=1e-3, num_negatives=2, accumulate=2),
    "cached matryoshka": FinetuneConfig(
        epochs=1,
        batch_size=6,
        lr=1e-3,
        mini_batch_tokens=40,
        loss={"name": "matryoshka", "dims": [32, 8], "inner": {"name": "in_batch_negatives"}},
    ),
    "passages": FinetuneConfig(epochs=1, batch_size=4, lr=1e-3, passages=[8, 4], windows_per_document=2),
}


def waves(rows: int, columns: int, phase: float) -> Tensor:
    """An unstructured matrix from a closed form, so that its digits are the same everywhere."""
    return torch.tensor(
        [[math.cos(phase + 1.7 * i + 0.9 * j * j + 0.3 * i * j) for j in range(columns)] for i in range(rows)],
        dtype=torch.float64,
    )


def losses() -> dict[str, dict[str, float]]:
    """{loss: its value, and the length of its gradient with respect to Q and to D}."""
    group = torch.tensor([[0, 5, 6], [1, 0, 7], [2, 3, -1], [1, 8, 4]])
    references = {
        "guide": (waves(4, 5, 0.1), waves(9, 5, 0.2)),
        "teacher": (waves(4, 8, 0.3), waves(9, 8, 0.4)),
        "base": (waves(4, 8, 0.5), waves(9, 8, 0.6)),
    }
    known = torch.tensor([[0, 2], [3, 6]])
    targets = Targets(group, known=known, target_scores=waves(4, 3, 0.7), references=references)
    found = {}
    for name in LOSSES:
        Q, D = waves(4, 8, 0.8).requires_grad_(), waves(9, 8, 0.9).requires_grad_()
        loss = build_loss({"name": name} | SPECS.get(name, {}))
        if isinstance(loss, nn.Module):
            loss = loss.double()
            with torch.no_grad():  # parameters drawn at random become closed forms too
                for place, parameter in enumerate(loss.parameters()):
                    if parameter.ndim == 2:
                        parameter.copy_(waves(*parameter.shape, phase=1.0 + place))
        value = loss(Q, D, targets)
        gradients = torch.autograd.grad(value, (Q, D), allow_unused=True, materialize_grads=True)
        found[name] = {"value": value.item(), "Q": gradients[0].norm().item(), "D": gradients[1].norm().item()}
    return found


def embeddings(folder: Path) -> list[list[float]]:
    """The first four features of some texts' vectors, by the tiny BERT."""
    return [row[:4].tolist() for row in make_embedder(folder).encode(list(TEXTS))]


def trainings(folder: Path) -> dict[str, list[float]]:
    """The loss of every step, without dropout."""
    found = {}
    for name, config in CONFIGS.items():
        embedder, data = make_embedder(folder / "model", dropout=0.0), make_dataset(negatives=2)
        finetune(embedder, data, config, out=folder / name)
        records = [json.loads(line) for line in (folder / name / "train.jsonl").read_text().splitlines()]
        found[name] = [record["loss"] for record in records if "loss" in record]
    return found


def everything() -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        return {
            "losses": losses(),
            "embeddings": embeddings(Path(folder) / "tiny"),
            "trainings": trainings(Path(folder)),
        }


if __name__ == "__main__":
    for name, figures in everything().items():
        (HERE / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
