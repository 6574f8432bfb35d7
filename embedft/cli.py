"""The command `embedft`. Results go to stdout, progress to stderr; an error is one line on stderr and exit code 2.

    embedft finetune sentence-transformers/all-MiniLM-L6-v2 pairs.csv --out runs/first --epochs 1

A command is a module in `commands` with a dataclass `Options` and a function `run(options)`, which may return an exit
code, plus a line in `COMMANDS`. Only the module of the requested command is imported, after Ctrl-C is handled.
"""

import io
import os
import signal
import sys
from collections.abc import Sequence

COMMANDS = {
    "chunk": "cut PDF, text and Markdown files into chunks",
    "questions": "write questions about chunks, with or without a language model",
    "finetune": "fine-tune a model on questions and the documents that answer them",
    "ablate": "fine-tune and measure every cell of a grid of settings and seeds",
    "adapter": "fit an adapter on the embeddings of a frozen model",
    "mine": "find hard negatives for a dataset's questions",
    "encode": "turn texts into vectors",
    "search": "find the passages that answer a question",
    "evaluate": "measure how well a model finds the right document",
    "compare": "test whether reports differ, question by question",
    "report": "report an ablation from its folder alone",
    "store": "list, verify, repair or prune stored embeddings",
    "merge": "average the weights of models, and measure points between two",
    "info": "describe a model",
    "push": "upload a model to the Hugging Face hub",
}
OUTPUT = "standard output"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns 0, 1 if work is left or the reader closed the pipe, 2 for an error, 130 for Ctrl-C."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    program = f"embedft {words[0]}" if words and words[0] in COMMANDS else "embedft"
    handler = signal.getsignal(signal.SIGINT)
    if "OMP_WAIT_POLICY" not in os.environ:  # before torch is imported: OpenMP's threads wait less long for each other
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        if handler is signal.default_int_handler:
            signal.signal(signal.SIGINT, lambda _, frame: _interrupt(frame, program))
        _prepare_streams()
        code = _run(words, program)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as error:
        return _fail(program, ": ".join(["interrupted", *error.args]), code=130)
    except OSError as error:
        if error.filename == OUTPUT:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at exit
            if isinstance(error, BrokenPipeError):  # the reader has read enough, as `head` does
                return 1
        named = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        return _fail(program, f"error: {named}")
    except ValueError as error:
        return _fail(program, f"error: {error}")
    finally:
        if handler is signal.default_int_handler:
            signal.signal(signal.SIGINT, handler)


def _run(words: list[str], program: str) -> int:
    import functools
    import importlib
    import warnings

    from . import config

    name = words[0] if words else ""
    if name in ("-h", "--help"):
        lines = (f"  {command:<10} {meaning}" for command, meaning in COMMANDS.items())
        print("usage: embedft COMMAND [options]\n\nFine-tune text embedding models for retrieval.\n\ncommands:")
        print(*lines, "\nembedft COMMAND --help lists the options of a command.", sep="\n")
        return 0
    if name not in COMMANDS:
        problem = f"unknown command {name!r}{config.suggestion(name, COMMANDS)}" if words else "missing COMMAND"
        raise ValueError(f"{problem}; expected one of {', '.join(COMMANDS)}")
    typed, format_warning = str, warnings.formatwarning
    warnings.formatwarning = lambda text, *_, **__: "" if _is_silent() else f"{program}: warning: {typed(str(text))}\n"
    try:
        module = importlib.import_module(f".commands.{name}", __package__)
        typed = functools.partial(config.as_typed, cls=module.Options, arguments=words[1:])
        if "-h" in words or "--help" in words:
            description = f"{COMMANDS[name][0].upper()}{COMMANDS[name][1:]}."
            epilog = module.epilog() if hasattr(module, "epilog") else ""
            parser = config.make_parser(module.Options, prog=program, description=description, epilog=epilog)
            print(parser.format_help().rstrip())
            return 0
        options = config.parse(module.Options, words[1:])
        if options.quiet:
            os.environ["EMBEDFT_PROGRESS"] = "0"
        return module.run(options) or 0
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(*map(typed, error.args)) from None
    except ValueError as error:
        raise ValueError(typed(str(error))) from None
    finally:
        warnings.formatwarning = format_warning


def _fail(program: str, message: str, *, code: int = 2) -> int:
    if not _is_silent():
        shown = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in message)  # it may quote a server
        print(f"{program}: {shown}", file=sys.stderr)
    return code


def _interrupt(frame, program: str) -> None:
    """Raises KeyboardInterrupt, but ends the process during imports, where NumPy and torch would print and abort."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os._exit(_fail(program, "interrupted", code=130))
        frame = frame.f_back
    raise KeyboardInterrupt


def _is_silent() -> bool:
    """Whether torchrun started this process and another one, rank 0, reports errors."""
    return os.environ.get("WORLD_SIZE", "1") != "1" and os.environ.get("RANK", "0") != "0"


class _Output(io.FileIO):
    """Names itself in its errors: another error without a name is not its own, but may be that of a socket."""

    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, OUTPUT) from None


def _prepare_streams() -> None:
    """Makes outputs escape characters that their encoding lacks, and refuses a closed stdout before work begins."""
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stdout is None:
        raise ValueError("standard output is closed; redirect it to a file or to /dev/null")
    if sys.stdout is sys.__stdout__:  # not a notebook's or a test's
        sys.stdout.flush()
        raw, by_line = _Output(sys.stdout.fileno(), "w", closefd=False), sys.stdout.line_buffering
        options = {"encoding": sys.stdout.encoding, "line_buffering": by_line or sys.stdout.write_through}
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(raw), **options)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
