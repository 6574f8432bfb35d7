"""Speed and memory against a peer, in one run, equal outputs asserted first: `python -m benchmarks.NAME`."""
