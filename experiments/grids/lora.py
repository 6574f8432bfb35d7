"""Full fine-tuning, LoRA or less: what does each gain on Uber, and forget elsewhere?

LoRA of both sides, of the queries' alone (documents keep the base's vectors), and the last layer alone. An adapter, a
map of frozen vectors, is fitted and not fine-tuned: experiments/repro_adapter_lyft_uber.py compares it.
"""

from experiments.grid_data import LYFT, tests

BASE = LYFT
POINTS = [
    {"lora.rank": 8, "lr": 5e-4},
    {"lora.rank": 8, "lora.side": "query", "lr": 5e-4},
    {"freeze_below": 5, "lr": 1e-4},
]
SEEDS = [0, 1, 2]
TESTS = tests()
