"""Can training undo the choice of a pooling that the model was not made with?

all-MiniLM-L6-v2 was trained with the mean. The learning rate may have to be higher for another one to catch up.
"""

from experiments.commandline import BASE as MODEL
from experiments.grid_data import LYFT, pooled, tests

BASE = LYFT
AXES = {"model": [MODEL, pooled("cls"), pooled("max")], "lr": [2e-5, 1e-4]}
SEEDS = [0, 1, 2]
TESTS = tests()
