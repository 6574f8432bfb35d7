"""Where the files of a BEIR dataset are: in a folder, or on the Hugging Face hub under "beir:NAME".

beir:scifact              texts from BeIR/scifact, judgements from BeIR/scifact-qrels; kept in the hub's cache
beir:scifact@REVISION     commit, tag or branch of the texts; @REVISION,REVISION: also that of the judgements
beir:cqadupstack/android  the folder android of both
"""

import re
from pathlib import Path

from ..config import suggestion
from ..hub import snapshot

PREFIX = "beir:"
NAME = re.compile(r"beir:(\w[\w.-]*)(?:/(\w[\w.-]*))?(?:@([^\s,@]+)(?:,([^\s,@]+))?)?")
# Those that may be redistributed; a hint where a name is mistyped.
KNOWN = ("arguana", "climate-fever", "cqadupstack", "dbpedia-entity", "fever", "fiqa", "hotpotqa", "msmarco",
         "nfcorpus", "nq", "quora", "scidocs", "scifact", "trec-covid", "webis-touche2020")  # fmt: skip


def is_beir_name(path: str | Path) -> bool:
    """Whether a dataset is on the hub, not in a file or folder."""
    return str(path).startswith(PREFIX)


def find_beir(path: str | Path) -> tuple[Path, dict[str, Path]]:
    """The folder with a dataset's texts, and {split: file of its judgements}; downloads what the hub's cache lacks.
    Raises `ValueError` if the hub has no such dataset or revision, cannot be reached, or has other files."""
    if is_beir_name(path):
        folder, qrels = _download(str(path))
        files = list(qrels.glob("*.tsv*"))
    else:
        folder = Path(path)
        files = [*(folder / "qrels").glob("[!.]*.*"), *(file for file in folder.glob("qrels.*") if file.is_file())]
    files.sort(key=lambda file: (".tsv" in file.suffixes, file.suffix != ".gz", file.name))  # BEIR's own wins
    return folder, {file.name.removesuffix(".gz").rpartition(".")[0]: file for file in files}


def _download(name: str) -> tuple[Path, Path]:
    """The folders of texts and of judgements."""
    if not (parts := NAME.fullmatch(name)):
        raise ValueError(f"{name}: expected beir:NAME, beir:NAME/PART or beir:NAME@REVISION, such as beir:scifact")
    dataset, part, of_texts, of_judgements = parts.groups()
    part = f"{part}/" if part else ""
    # Judgements first: they are small, and their folders are the parts of a dataset that has parts.
    sources = {
        f"BeIR/{dataset}-qrels": (of_judgements, ["*.tsv"]),
        f"BeIR/{dataset}": (of_texts, ["corpus.jsonl", "queries.jsonl"]),
    }
    folders = []
    for repository, (revision, files) in sources.items():
        how = {"kind": "dataset", "revision": revision, "where": f"{name}: {repository}: "}
        try:
            whole = snapshot(
                repository, patterns=[f"{part}{file}{end}" for file in files for end in ("", ".gz")], **how
            )
        except ValueError as error:
            raise ValueError(f"{error}{'' if dataset in KNOWN else suggestion(dataset, KNOWN)}") from None
        for file in files:
            if not any((whole / part).glob(f"{file}*")):
                raise ValueError(f"{name}: {repository} has no {part}{file}{_instead(dataset, whole, revision)}")
        folders.append(whole / part)
    return folders[1], folders[0]


def _instead(dataset: str, folder: Path, revision: str | None) -> str:
    """What to say besides that a file is missing: which parts there are, or where else to look."""
    if found := sorted({file.parent.name for file in folder.glob("*/*.tsv*")}):
        return f"; its parts are {', '.join(found)}: {PREFIX}{dataset}/{found[0]}"
    where = f" at revision {revision or 'main'!r}, or it was not downloaded whole ({folder})"
    return f"{where}; embedft reads .jsonl.gz and .tsv, which other revisions may have: beir:NAME@REVISION"
