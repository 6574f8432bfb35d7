"""The command line that experiments and benchmarks share.

parser = make_parser("experiments.quickstart", __doc__)
run(main, parser)
"""

import argparse
from collections.abc import Callable

from embedft.cli import Parser, one_line

BASE = "sentence-transformers/all-MiniLM-L6-v2"


def make_parser(name: str, doc: str) -> argparse.ArgumentParser:
    """A parser with --base; its description is the first line of a module's docstring."""
    parser = Parser(prog=name, description=doc.partition("\n")[0])
    parser.add_argument("--base", default=BASE, metavar="MODEL", help="model to start from [%(default)s]")
    return parser


def run(main: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser) -> None:
    """Runs `main(options)`; what a user can mend becomes one line on stderr and exit code 2."""
    options = parser.parse_args()
    try:
        main(options)
    except (ValueError, OSError) as error:
        parser.error(one_line(error))
