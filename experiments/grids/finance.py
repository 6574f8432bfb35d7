"""How much do larger and more steps gain on the finance pairs, at 384 dimensions and at 32, and what is forgotten?

BASE is the article's recipe with true batches of 512 (RESULTS.md, "Matryoshka on 7,000 finance pairs"): 48 steps at
2e-5. A tenth of the pairs chooses weights and points; no question of it, or of the test, is trained on.
"""

from experiments.grid_data import finance
from experiments.grid_data import tests as others

TRAIN, VALIDATION, TEST = finance()
LOSS = {"name": "matryoshka", "dims": [384, 128, 32], "inner": {"name": "in_batch_negatives"}}
SHARPER = LOSS | {"inner": LOSS["inner"] | {"temperature": 0.03}}

BASE = {
    "data": [TRAIN],
    "validation": VALIDATION,
    "epochs": 4,
    "batch_size": 512,
    "lr": 2e-5,
    "schedule": "cosine",
    "warmup": 0.1,
    "mini_batch_tokens": 8_192,
    "loss": LOSS,
}
LARGER = [
    {"batch_size": 128, "lr": 1e-4},
    {"batch_size": 128, "lr": 2e-4},
    {"batch_size": 128, "lr": 2e-4, "loss": SHARPER},
]
POINTS = [{"evaluate.dim": 32}, *(point | {"evaluate.dim": dim} for point in LARGER for dim in (None, 32))]
SEEDS = [0, 1, 2]
TESTS = {"finance": TEST} | {name: path for name, path in others().items() if name != "uber"}
