"""Does a teacher's order of documents train better than the answers alone?

Lists of the first eight documents, scored by BM25, or by it and the model's own windows, which together find more than
either; as many of the documents that the model itself finds first, without scores; and the two teachers naming further
answers ("relabel") for in-batch negatives.
"""

from experiments.commandline import BASE as MODEL
from experiments.grid_data import LYFT, tests

BOTH = {"models": {MODEL: 0.5, "bm25": 0.5}, "passages": [128, 64], "depth": 8}
LISTS = {
    "examples": "lists",
    "num_negatives": 8,
    "target_scores": True,
    "loss": {"name": "listwise_kl", "student_temperature": 0.05},
}

BASE = LYFT | {"epochs": 1, "mini_batch_tokens": 8_192}
POINTS = [
    LISTS | {"teacher": {"models": "bm25", "depth": 8}},
    LISTS | {"teacher": BOTH},
    {"num_negatives": 7, "mine_ranks": [1, 9], "mine_every": 1},
    {"teacher": BOTH | {"relabel": 0.0}, "mine_relative_margin": 0.05},
]
SEEDS = [0, 1, 2]
TESTS = tests()
