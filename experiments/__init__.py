"""One file per published table or ablation; each reads top to bottom and is run as `python -m experiments.NAME`."""
