"""Which temperature of in-batch negatives transfers best from one company's report to another's?

Trains on four fifths of the chunks of Lyft's report and selects on the rest; Uber's questions only test.
"""

from experiments.ablate import halves
from experiments.sources import find_data

FOLDER = find_data("lyft_uber", None)
TRAIN, VALIDATION = halves(FOLDER / "train_dataset.json")

BASE = {
    "data": [TRAIN],
    "validation": VALIDATION,
    "epochs": 2,
    "batch_size": 32,
    "lr": 2e-5,
    "warmup": 0.1,
    "max_length": 256,
    "evaluate": {"passages": [128, 64]},
}
AXES = {"loss.temperature": [0.02, 0.03, 0.05, 0.1]}
SEEDS = [0, 1, 2]
TESTS = {"uber": FOLDER / "val_dataset.json"}
