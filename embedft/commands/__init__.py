"""The commands of `embedft`, one per module: a dataclass `Options` and `run(options)`. Shared options: options.py."""
