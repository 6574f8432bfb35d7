"""Whole documents or windows, in training and in search: which size and stride, and the best window or a soft maximum?

Up to 512 tokens of a document train at a time, in four small windows or two large ones. In search, the best window
always stands for its document.
"""

from experiments.grid_data import LYFT, tests

SMALL, LARGE = [128, 64], [256, 128]

BASE = LYFT
POINTS = [
    {"evaluate.passages": SMALL},
    {"passages": SMALL, "evaluate.passages": SMALL},
    {"passages": SMALL, "evaluate.passages": SMALL, "loss.windows": "softmax"},
    {"passages": LARGE, "evaluate.passages": LARGE, "windows_per_document": 2},
]
SEEDS = [0, 1, 2]
TESTS = tests()
