"""Whole documents or windows, in training and in search: which size and stride, and the best window or a soft maximum?

Up to 512 tokens of a document train at a time, whole or in four windows. In search, a document's score is that of its
best window, or the mean of its best windows of two sizes.
"""

from experiments.grid_data import LYFT, tests

WINDOWS, APART, TWO_SIZES = [128, 64], [128, 128], [128, 64, 64, 32]

BASE = LYFT | {"max_length": 512}
POINTS = [
    {"evaluate.passages": WINDOWS},
    {"passages": WINDOWS},
    {"passages": WINDOWS, "evaluate.passages": APART},
    {"passages": WINDOWS, "evaluate.passages": TWO_SIZES},
    {"passages": WINDOWS, "loss.windows": "softmax"},
]
SEEDS = [0, 1, 2]
TESTS = tests()
