"""The commands of `embedft`, one a module: a dataclass `Options` and `run(options)`. Shared options: options.py."""
