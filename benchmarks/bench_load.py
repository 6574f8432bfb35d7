"""How long a new process takes to its first vector: embedft against sentence-transformers.

Each process loads a model from its folder and encodes one short text. Its time includes starting Python and importing
torch, and ends when the vector arrives. First, the vectors must agree to 1e-5; that also brings the files into the page
cache: the processes are cold, the disk is not.

    python -m benchmarks.bench_load --rounds 5
"""

import argparse
import subprocess
import sys
import time

import numpy as np

from embedft import load_embedder

from . import peers, suite
from .suite import Row, make_parser, require_close

TEXT, TOLERANCE = "what is a limit order?", 1e-5
PROGRAMS = {
    "embedft": """
from embedft import load_embedder
embedder = load_embedder(folder, device=device)
embedder.autocast = False
vector = embedder.encode([text], progress=False)
""",
    "sentence-transformers": """
from sentence_transformers import SentenceTransformer
vector = SentenceTransformer(folder, device=device).encode([text], show_progress_bar=False)
""",
}


def first_vector(program: str, folder: str, device: str, num_bytes: int) -> tuple[np.ndarray, float]:
    """The vector that a new process writes, and the seconds until it is there."""
    code = f"import sys\nfolder, device, text = sys.argv[1:]\n{program}\nsys.stdout.buffer.write(vector.tobytes())"
    command, start = [sys.executable, "-c", f"{code}\nsys.stdout.flush()", folder, device, TEXT], time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        found = process.stdout.read(num_bytes)
        seconds, errors = time.perf_counter() - start, process.stderr.read().decode()
    if len(found) != num_bytes:
        raise ValueError(f"a process wrote {len(found)} bytes, expected {num_bytes}: {errors[-500:]}")
    return np.frombuffer(found, dtype=np.float32), seconds


def main(options: argparse.Namespace) -> list[Row]:
    embedder = load_embedder(options.base, device="cpu")
    arguments = str(embedder.source.folder), options.device, embedder.dim * 4
    programs = [PROGRAMS[name] for name in ("embedft", *options.peer)]
    ours, *theirs = [first_vector(program, *arguments)[0] for program in programs]  # also warms up
    seconds: list[list[float]] = [[] for _ in programs]
    for _ in range(options.rounds):
        for program, of_program in zip(programs, seconds, strict=True):
            of_program.append(first_vector(program, *arguments)[1])
    if not theirs:
        return [Row("first vector", seconds[0])]
    difference, peer = require_close("first vector", ours, theirs[0], TOLERANCE), f"{options.peer[0]} {peers.version()}"
    return [Row("first vector", *seconds[:1], peer=peer, peer_seconds=seconds[1], largest_difference=difference)]


def parser() -> argparse.ArgumentParser:
    return make_parser("load", __doc__, rounds=5, peers=["sentence-transformers"])


if __name__ == "__main__":
    suite.run(main, parser())
