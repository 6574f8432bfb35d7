"""Does a guide that masks likely false negatives help?

The guide is the model itself before training, with and without a margin; the name of a larger one, such as
BAAI/bge-base-en-v1.5, replaces None. Source: Solatorio 2024 (GISTEmbed), section 3.
"""

from experiments.grid_data import LYFT, tests

GUIDED = {"name": "guided_in_batch_negatives", "temperature": 0.05}

BASE = LYFT
POINTS = [
    {"loss": GUIDED, "references": {"guide": None}},
    {"loss": GUIDED | {"margin_strategy": "relative", "margin": 0.05}, "references": {"guide": None}},
]
SEEDS = [0, 1, 2]
TESTS = tests()
