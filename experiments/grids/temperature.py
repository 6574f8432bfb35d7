"""Which temperature of in-batch negatives transfers best from one company's report to another's?

Trains on four fifths of the chunks of Lyft's report and selects on the rest; Uber's questions only test.
"""

from experiments.grid_data import LYFT, tests

BASE = LYFT
AXES = {"loss.temperature": [0.02, 0.03, 0.05, 0.1]}
SEEDS = [0, 1, 2]
TESTS = tests()
