"""Does a guide that masks likely false negatives help, and does a pull toward the base keep what the model knew?

Guide and base are the model itself before training; the name of a larger guide, such as BAAI/bge-base-en-v1.5, replaces
None.
"""

from experiments.grid_data import LYFT, tests

GUIDED = {"name": "guided_in_batch_negatives", "temperature": 0.05}
PULLED = {"name": "sum", "losses": [{"name": "in_batch_negatives"}, {"name": "toward_base"}]}

BASE = LYFT
POINTS = [
    {"loss": GUIDED, "references": {"guide": None}},
    {"loss": GUIDED | {"margin_strategy": "relative", "margin": 0.05}, "references": {"guide": None}},
    {"loss": PULLED, "references": {"base": None}},
    {"loss": PULLED | {"weights": [1.0, 10.0]}, "references": {"base": None}},
]
SEEDS = [0, 1, 2]
TESTS = tests()
