"""Is it worth training for few dimensions, and with which weights?

384 dimensions and 32: cut, after training on all ("truncation") or on both, with equal weights or four times the weight
on the 32; or, after training on all, the 32 principal components of the training documents.
"""

from experiments.grid_data import LYFT, tests

PLAIN = {"name": "in_batch_negatives"}
MATRYOSHKA = {"name": "matryoshka", "dims": [384, 32], "inner": PLAIN}

BASE = LYFT | {"loss": PLAIN}
LOSSES = [PLAIN, MATRYOSHKA, MATRYOSHKA | {"weights": [1.0, 4.0]}]
POINTS = [{"loss": loss, "evaluate.dim": dim} for loss in LOSSES for dim in (None, 32)] + [{"evaluate.pca": 32}]
SEEDS = [0, 1, 2]
TESTS = tests()
