"""Which learning rate, over how many epochs, and what does each cost elsewhere?"""

from experiments.grid_data import LYFT, tests

BASE = LYFT
AXES = {"lr": [1e-5, 2e-5, 1e-4], "epochs": [2, 4]}
SEEDS = [0, 1, 2]
TESTS = tests()
