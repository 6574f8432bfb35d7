"""One script per published table or ablation, to read top to bottom; run one with `python -m experiments.NAME`."""
