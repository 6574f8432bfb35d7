"""Is it worth training for few dimensions, and with which weights?

Cut to 32 of 384 dimensions, after training on all of them ("truncation") or on both, with equal weights or four times
the weight on the 32. PCA, which fits a map to a corpus, is not a way of evaluating that a grid can vary:
experiments/repro_matryoshka_finance.py and embedft.fit_adapter have other ways to few dimensions.
"""

from experiments.grid_data import LYFT, tests

PLAIN = {"name": "in_batch_negatives"}
MATRYOSHKA = {"name": "matryoshka", "dims": [384, 32], "inner": PLAIN}

BASE = LYFT | {"loss": PLAIN}
AXES = {"loss": [PLAIN, MATRYOSHKA, MATRYOSHKA | {"weights": [1.0, 4.0]}], "evaluate.dim": [None, 32]}
SEEDS = [0, 1, 2]
TESTS = tests()
