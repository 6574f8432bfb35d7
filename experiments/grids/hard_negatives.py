"""Do mined negatives help, and do they have to be mined again as the model learns?

Mined before the first of two epochs, or before each; from ranks 2 to 30 of 267 chunks, with and without a margin that
leaves out what scores above 95% of the answer.
"""

from experiments.grid_data import LYFT, tests

ONCE = {"num_negatives": 2, "mine_ranks": [2, 30], "mine_every": 2}
AGAIN = ONCE | {"mine_every": 1}
MARGIN = {"mine_relative_margin": 0.05}

BASE = LYFT | {"mini_batch_tokens": 8_192}
POINTS = [ONCE, AGAIN, ONCE | MARGIN, AGAIN | MARGIN]
SEEDS = [0, 1, 2]
TESTS = tests()
