"""Are larger batches better at equal compute?

Every point reads the same pairs twice; a larger batch takes fewer steps, so its two learning rates are higher: those of
32, times the root of the ratio of sizes. There is no gradient caching, which would embed every text twice.
"""

from experiments.grid_data import LYFT, tests

BASE = LYFT
RATES = {8: (1e-5, 3e-5), 32: (2e-5, 6e-5), 64: (3e-5, 9e-5)}
POINTS = [{"batch_size": size, "lr": lr} for size, rates in RATES.items() for lr in rates]
SEEDS = [0, 1, 2]
TESTS = tests()
