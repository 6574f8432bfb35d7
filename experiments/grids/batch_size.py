"""Are larger batches better at equal compute?

Every point reads the same pairs twice; a larger batch takes fewer steps, so each size has two learning rates. There is
no gradient caching, which would embed every text twice.
"""

from experiments.grid_data import LYFT, tests

BASE = LYFT
AXES = {"batch_size": [8, 32, 64], "lr": [2e-5, 6e-5]}
SEEDS = [0, 1, 2]
TESTS = tests()
