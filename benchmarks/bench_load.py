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
from embedft.retrieval.tables import format_table
from experiments.commandline import make_parser, run

from .workers import machine, ratios, spread

TEXT, TOLERANCE = "what is a limit order?", 1e-5
PROGRAMS = {
    "ours": """
import sys
from embedft import load_embedder
vector = load_embedder(sys.argv[1], device="cpu").encode([sys.argv[2]], progress=False)
sys.stdout.buffer.write(vector.tobytes())
sys.stdout.flush()
""",
    "peer": """
import sys
from sentence_transformers import SentenceTransformer
vector = SentenceTransformer(sys.argv[1], device="cpu").encode([sys.argv[2]], show_progress_bar=False)
sys.stdout.buffer.write(vector.tobytes())
sys.stdout.flush()
""",
}


def first_vector(program: str, folder: str, num_bytes: int) -> tuple[np.ndarray, float]:
    """The vector that a new process writes, and the seconds until it is there."""
    command, start = [sys.executable, "-c", program, folder, TEXT], time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        found = process.stdout.read(num_bytes)
        seconds, errors = time.perf_counter() - start, process.stderr.read().decode()
    if len(found) != num_bytes:
        raise ValueError(f"a process wrote {len(found)} bytes, expected {num_bytes}: {errors[-500:]}")
    return np.frombuffer(found, dtype=np.float32), seconds


def main(options: argparse.Namespace) -> None:
    embedder = load_embedder(options.base, device="cpu")
    arguments = str(embedder.source.folder), embedder.dim * 4
    vectors = {who: first_vector(program, *arguments)[0] for who, program in PROGRAMS.items()}  # also warms up
    difference = float(np.abs(vectors["ours"] - vectors["peer"]).max())
    if not difference <= TOLERANCE:
        raise ValueError(f"the vectors differ by {difference:.1e}, expected at most {TOLERANCE:.0e}")
    seconds = {who: [] for who in PROGRAMS}
    for _ in range(options.rounds):
        for who, program in PROGRAMS.items():
            seconds[who].append(first_vector(program, *arguments)[1])
    shares = spread(ratios(seconds["ours"], seconds["peer"]))
    row = [f"{difference:.1e}", spread(seconds["ours"]), spread(seconds["peer"]), shares]
    print(format_table(["largest difference", "embedft, s", "sentence-transformers, s", "of its time"], [row]))
    print(f"\nmedian [min, max] of {options.rounds} alternations; {options.base}; {machine()}")


if __name__ == "__main__":
    parser = make_parser("benchmarks.bench_load", __doc__)
    parser.add_argument("--rounds", type=int, default=5, help="timed alternations [5]")
    run(main, parser)
