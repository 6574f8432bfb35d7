"""How much does BM25 add to a model before and after tuning, and at which weight?

The untrained cells are "before". All weights of a seed share one training run.
"""

from experiments.grid_data import LYFT, tests

BASE = LYFT
AXES = {"evaluate.fuse_weight": [None, 0.2, 0.4, 0.6]}
SEEDS = [0, 1, 2]
TESTS = tests()
