"""Speed and memory against a peer, after asserting equal outputs; run one with `python -m benchmarks.NAME`."""
