"""Does it matter that a question's own chunk, or one of equal text, is never its negative?

The published data has two questions a chunk. "apart" gives each a copy of the chunk that training takes for another
document; the larger the batch, the more often the two meet.
"""

from experiments.grid_data import LYFT, TRAIN, lyft, tests

BASE = LYFT
AXES = {"data": [[TRAIN], [lyft("apart")[0]]], "batch_size": [32, 64]}
SEEDS = [0, 1, 2]
TESTS = tests()
