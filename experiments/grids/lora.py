"""Full fine-tuning, LoRA or an adapter: what does each gain on Uber, and forget elsewhere?

LoRA of both sides, of the queries' alone (documents keep the base's vectors), and the last layer alone; and a linear
map of the queries' frozen vectors, with the settings that experiments/repro_adapter_lyft_uber.py chose.
"""

from experiments.grid_data import LYFT, tests

BASE = LYFT
POINTS = [
    {"lora.rank": 8, "lr": 5e-4},
    {"lora.rank": 8, "lora.side": "query", "lr": 5e-4},
    {"freeze_below": 5, "lr": 1e-4},
    {"adapter": {"kind": "linear", "side": "query"}},
]
SEEDS = [0, 1, 2]
TESTS = tests()
