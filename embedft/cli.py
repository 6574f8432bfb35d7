"""The command `embedft`: the library's functions, one subcommand each.

A user's error is one line on stderr and exit code 2; progress goes to stderr, results to stdout.

    embedft finetune sentence-transformers/all-MiniLM-L6-v2 pairs.csv --out runs/first --epochs 1
"""

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence

from . import config as configs
from .commands import adapters, mining, models, retrieval, search, stores, texts

# Name: (adds its arguments to a parser, runs it and may return an exit code, what it does).
COMMANDS: dict[str, tuple[Callable, Callable, str]] = {
    **texts.COMMANDS,
    **models.COMMANDS,
    **retrieval.COMMANDS,
    **search.COMMANDS,
    **adapters.COMMANDS,
    **mining.COMMANDS,
    **stores.COMMANDS,
}


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are one line, without the usage, and that takes no shortened options."""

    def __init__(self, **settings):
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str):
        self.exit(2, "" if told_by_rank_0() else f"{self.prog}: error: {message}\n")


def told_by_rank_0() -> bool:
    """Whether this is one of several processes that torchrun started, and not the one that tells their errors."""
    return os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0"


def one_line(error: Exception) -> str:
    """What an error says: of a file that cannot be opened its name and why."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand. Returns the exit code: 0; 1: something is left to do, or nobody reads; 2: an error."""
    parser = Parser(
        prog="embedft", description="Fine-tune text embedding models for retrieval, and measure what it brought."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (add_arguments, _, meaning) in COMMANDS.items():
        command = commands.add_parser(name, help=meaning, description=meaning[0].upper() + meaning[1:] + ".")
        add_arguments(command)
        command.add_argument("--quiet", action="store_true", help="no progress bars")
    options = configs.parse(parser, arguments)
    if options.dotted and not hasattr(options, "config"):  # which `configs.add_options` gives a command
        parser.error(f"unrecognized arguments: {' '.join('--' + name for name in options.dotted)}")
    if options.quiet:
        os.environ["EMBEDFT_PROGRESS"] = "0"
    format_warning = warnings.formatwarning
    said = "" if told_by_rank_0() else f"embedft {options.command}: warning: "
    warnings.formatwarning = lambda message, *_, **__: said and f"{said}{message}\n"
    try:
        code = COMMANDS[options.command][1](options) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read the output has had enough, as `head` does. What is left goes nowhere, at exit too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        if not told_by_rank_0():
            print(f"embedft {options.command}: error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"embedft {options.command}: interrupted", file=sys.stderr)
        return 130
    finally:
        warnings.formatwarning = format_warning
