"""Do averages of weights gain on Uber, or forget less elsewhere?

A moving average over steps, whose decay is at most (1 + step) / (10 + step), 0.8 after these 34; points between the
base and the tuned weights (WiSE-FT); and the pull toward the base's vectors. `embedft merge` averages runs.
"""

from experiments.grid_data import LYFT, tests

BASE = LYFT
PULL = {"name": "sum", "losses": [{"name": "in_batch_negatives"}, {"name": "toward_base"}]}
POINTS = [
    {"ema": 0.7},
    {"tuned_share": 0.75},
    {"tuned_share": 0.5},
    {"tuned_share": 0.25},
    {"loss": PULL, "references": {"base": None}},
    {"loss": PULL | {"weights": [1.0, 10.0]}, "references": {"base": None}},
]
SEEDS = [0, 1, 2]
TESTS = tests()
