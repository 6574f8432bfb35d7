"""The command line that experiments and benchmarks share.

parser = make_parser("experiments.quickstart", __doc__)
run(main, parser)
"""

import argparse
from collections.abc import Callable

BASE = "sentence-transformers/all-MiniLM-L6-v2"


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that reports errors in one line, without the usage, and rejects abbreviated options."""

    def __init__(self, **settings):
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message}\n")


def make_parser(name: str, doc: str) -> argparse.ArgumentParser:
    """A parser with --base; its description is the first line of a module's docstring."""
    parser = Parser(prog=name, description=doc.partition("\n")[0])
    parser.add_argument("--base", default=BASE, metavar="MODEL", help="model to start from [%(default)s]")
    return parser


def run(main: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser) -> None:
    """Runs `main(options)`; an error that the user can fix becomes one line on stderr and exit code 2."""
    options = parser.parse_args()
    try:
        main(options)
    except (ValueError, OSError) as error:
        of_file = isinstance(error, OSError) and error.filename and error.strerror
        parser.error(f"{error.filename}: {error.strerror}" if of_file else str(error))
