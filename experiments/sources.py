"""Finds published datasets on disk, and says where to get them.

folder = find_data("lyft_uber", given=None)
"""

from pathlib import Path
from typing import NamedTuple

from embedft.corpus.pseudo import docstring_datasets

# Optional: a folder beside the checkout.
SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


SEED = 0


class Source(NamedTuple):
    files: tuple[str, ...]
    origin: str


SOURCES = {
    "lyft_uber": Source(
        ("train_dataset.json", "val_dataset.json"),
        "https://github.com/run-llama/finetune-embedding, folder data, commit da96b60",
    ),
    "finance_qa": Source(
        ("Financial-QA-10k.csv",),
        "https://github.com/ushashwat/Financial-QA-LLM, folder data, commit d22e389",
    ),
}


def find_data(name: str, given: str | None, option: str = "--data") -> Path:
    """The folder of a dataset: the one given with `option`, else the one beside the checkout.

    Raises:
        FileNotFoundError: says which file is missing and where it is published.
    """
    folder, source = Path(given) if given else SHARED / name, SOURCES[name]
    for file in source.files:
        if not (folder / file).is_file():
            where = f"get it from {source.origin} and pass its folder with {option} DIR"
            raise FileNotFoundError(f"{folder / file} is not there; {where}")
    return folder


def forgetting(folder: Path) -> dict[str, str]:
    """{name: test set} of what a model tuned on finance may forget: SciFact, downloaded unless it is beside the
    checkout, and docstrings of installed packages, collected once into `folder`."""
    path, scifact = folder / "docstrings.json", SHARED / "beir" / "scifact"
    if not path.exists():
        docstring_datasets(num_train=2_000, num_held_out=1_000, seed=SEED)[1].save(path)
    return {"scifact": str(scifact) if scifact.is_dir() else "beir:scifact", "docstrings": str(path)}
