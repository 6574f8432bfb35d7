"""How long a new process takes to its first vector: embedft against sentence-transformers.

Each process loads a model from its folder and encodes one short text. Its time includes starting Python and importing
torch, and ends when the vector arrives. First, the vectors must agree, as in bench_encode; that also brings the files
into the page cache: the processes are cold, the disk is not.

    python -m benchmarks.bench_load --rounds 5
"""

import argparse
import dataclasses
import subprocess
import sys
import time

import numpy as np

from embedft import load_embedder

from . import peers, suite
from .bench_encode import agreement
from .suite import DTYPES, Row, make_parser

TEXT, PEERS = "what is a limit order?", ["sentence-transformers", "sentence-transformers-bf16"]
PROGRAMS = {
    "embedft": """
from embedft import load_embedder
embedder = load_embedder(folder, device=device, dtype=dtype)
embedder.autocast = False
vector = embedder.encode([text], progress=False)
""",
    "sentence-transformers": """
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(folder, device=device, model_kwargs={"dtype": dtype})
vector = model.encode([text], show_progress_bar=False).astype("float32")
""",
}
FRAME = """import sys
folder, device, dtype, text = sys.argv[1:]
{program}
sys.stdout.buffer.write(vector.tobytes())
sys.stdout.flush()
from embedft.device import peak_memory_bytes
print(peak_memory_bytes(device))
"""


def first_vector(name: str, *arguments: str, num_bytes: int) -> tuple[np.ndarray, float, int]:
    """The vector that a new process writes, the seconds until it is there, and the peak memory of the process.
    `arguments`: folder, device, dtype."""
    code = FRAME.format(program=PROGRAMS[name])
    command, start = [sys.executable, "-c", code, *arguments, TEXT], time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        found = process.stdout.read(num_bytes)
        seconds = time.perf_counter() - start
        peak, errors = process.stdout.read(), process.stderr.read().decode()
    if len(found) != num_bytes or process.returncode:
        raise ValueError(f"a process wrote {len(found)} bytes, expected {num_bytes}: {errors[-500:]}")
    return np.frombuffer(found, dtype=np.float32), seconds, int(peak)


def main(options: argparse.Namespace) -> list[Row]:
    embedder = load_embedder(options.base, device="cpu")
    place, num_bytes = (str(embedder.source.folder), options.device), embedder.dim * 4
    runs = {"embedft": ("embedft", *place, options.dtype)}
    runs |= {f"{name} {peers.version()}": (PEERS[0], *place, peers.dtype_of(name, "")) for name in options.peer}
    vectors = {name: first_vector(*run, num_bytes=num_bytes)[0] for name, run in runs.items()}  # also warms up
    (_, ours), *theirs = vectors.items()
    case, differences = "first vector", {}
    for name, vector in theirs:
        precisions = options.dtype, name.partition(" ")[0]
        differences[name], _ = agreement(case, ours[None], vector[None], *precisions)
    seconds, peaks = ({name: [] for name in runs} for _ in range(2))
    for _ in range(options.rounds):
        for name, run in runs.items():
            _, took, peak = first_vector(*run, num_bytes=num_bytes)
            seconds[name].append(took)
            peaks[name].append(peak)
    row = Row(case, seconds["embedft"], peak_bytes=max(peaks["embedft"]))
    return [
        dataclasses.replace(
            row,
            peer=name,
            peer_seconds=seconds[name],
            peer_peak_bytes=max(peaks[name]),
            largest_difference=differences[name],
        )
        for name in differences
    ] or [row]


def parser() -> argparse.ArgumentParser:
    return make_parser("load", __doc__, rounds=5, dtypes=DTYPES, peers=PEERS)


if __name__ == "__main__":
    suite.run(main, parser())
