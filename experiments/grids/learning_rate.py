"""Which learning rate, over how many epochs, and what does each cost elsewhere?"""

from experiments.grid_data import LYFT, tests

BASE = LYFT | {"epochs": 1, "lr": 3e-5}
AXES = {"lr": [1e-5, 3e-5, 1e-4], "epochs": [1, 3]}
SEEDS = [0, 1, 2]
TESTS = tests()
