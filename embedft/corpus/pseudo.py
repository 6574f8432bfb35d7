"""Questions without an LLM: a sentence asks for the chunk it came from, a heading or a summary for what follows it.

From chunks: `inverse_cloze` and `titles`, for any documents. From docstrings: `docstring_datasets`, for which every
machine that runs this code has the text, those of the installed torch, NumPy and standard library, and of any other
package. They are read with `ast`; nothing is imported. A query is the first sentence of prose, on one line and without
markup; its document is the rest as it stands, less whatever repeats that sentence.

Not here: tests, `.pyi` and C files, what is defined inside functions, docstrings made by f-strings or `%`.

    dataset, num_left_out = inverse_cloze(load_chunks("chunks.jsonl"), seed=0)
    train, held_out = docstring_datasets(num_train=2000, num_held_out=1000, seed=0)
"""

import ast
import contextlib
import gc
import hashlib
import importlib.util
import inspect
import os
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..data.checks import check_distinct
from ..data.dataset import RetrievalDataset
from ..progress import progress_bar
from .chunks import Chunk
from .copies import is_copied, shingles
from .sentences import sentence_spans

PACKAGES = ("torch", "numpy", "stdlib")
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
SKIPPED_FOLDERS = {"test", "tests", "testing", "idle_test", "lib2to3", "site-packages", "dist-packages"}

SUMMARY_WORDS = range(4, 61)
MIN_DOCUMENT_WORDS = 20
# A piece of the body repeats the summary when the two share this much of the smaller one's words and neither has more
# than twice the words of the other.
REPEATED_SHARE = 0.8

# What may stand before the summary: blank lines, signatures, directives with the indented lines that belong to them.
PREAMBLE = re.compile(
    r"""(?: \ *\n
          | [\w.]+\ ?\( (?:[^()]|\([^()]*\))* \) (?:\ *[-=]>.{1,40})? (?:\ *\#.*)? \n
          | --\n
          | \.\.\ .* (?:\n(?:\ .*)?)*
        )*""",
    re.VERBOSE,
)
# Lines that are not prose: they end the paragraph of the summary; a docstring that begins with one has none.
NOT_PROSE = r"""\s* (?: $ | \.\.\  | >>> | \| | [-=~^*\#+]{3} | [-*+\#]+\  | \(?\d+[.)]\  | @\w
                      | :\w+[^:`\n]*:(?!`)                        # :param x:, but not :func:`x`
                      | [A-Z]\w*(?:\ \w+)?::?\ *$                 # Example:
                      | (?i:args|arguments|inputs?|notes?|outputs?|parameters|raises|returns?|warnings?|yields)\ ?:
                      | [\w.]+\(.*\)\ *[-=]>                      # d.pop(k) -> v, remove ...
                      | .*\n\ *(?:===|---|~~~|\^\^\^|\*\*\*|\#\#\#) )"""  # a title and the line under it
PROSE = re.compile(rf"(?!{NOT_PROSE}).+ (?:\n (?!{NOT_PROSE}).+)*", re.VERBOSE | re.MULTILINE)
ABBREVIATION = r"(?<!\be\.g\.)(?<!\bi\.e\.)(?<!\bvs\.)(?<!\bcf\.)"
SENTENCE_END = re.compile(rf"(?<=[.!?]){ABBREVIATION}\s+(?=[\"'`(*:]*[A-Z])")
PIECE_END = re.compile(rf"(\n\s*\n|\n\ *(?=[A-Z])|{SENTENCE_END.pattern})")

ROLE = re.compile(r":[\w:.+-]+:`")
LITERAL = re.compile(r"`+~?([^`<]*[^`<\s])(?:\s*<[^`<>]*>)?`+_{0,2}")  # `x`, ``x``, `~x.y`, `text <target>`_
# What of a chunk can be a query.
SENTENCE_WORDS, MAX_HEADING_WORDS = range(5, 61), 12
WHOLE_SENTENCE = re.compile(r"""["'“‘(\[]*[^\W\d_a-z].*[.!?]["'”’)\]]*""")
# A first line that ends like this is a sentence, or goes on in the next; with amounts it is the row of a table.
UNFINISHED = re.compile(r"(?:[.!?:;,—–-]|\b(?i:an?|and|as|at|by|for|from|in|of|on|or|our|that|the|to|which|with))$")
AMOUNTS = re.compile(r"[$€£]|\d,\d{3}|\d[\d.%)]*\s+\(?[\d.,%)]+$")

EMPHASIS = re.compile(r"(?<![\w*])(\*{1,2})([^*\s](?:[^*]*[^*\s])?)\1(?![\w*])")


@dataclass(frozen=True)
class DocstringPair:
    """What a docstring says first, and the rest of it.

    `name` is the dotted name of the documented thing, unique in one reading ("#2" marks the second of a name);
    `module` is the file that it stands in.
    """

    query: str
    document: str
    module: str
    name: str


def docstring_pairs(packages: Sequence[str] = PACKAGES) -> list[DocstringPair]:
    """The usable docstrings of installed packages, in the order of packages, files and lines.

    Left out are summaries shorter than 4 words or longer than 60, or that do not read as a sentence (no capital, a
    colon at the end); documents under 20 words; documents more than half of whose eight-word runs stand in longer
    documents that are kept (so none is a copy of another, wherever a split puts them); and summaries that several
    documents share, which ask for none of them. Files that do not parse are left out with a warning that counts them.

    Args:
        packages: names of installed top-level packages; "stdlib" is the standard library.

    Raises:
        ValueError: a package is not installed, or not as a folder of Python files.
    """
    files = [file for package in packages for file in _python_files(package)]
    pairs, broken = [], []
    with progress_bar(len(files), "reading docstrings", unit="file") as bar, _garbage_collection_off():
        for module, path in files:
            bar.update()
            try:
                tree = _parse(path)
            except (SyntaxError, ValueError):  # ValueError: a null byte, before Python 3.12
                broken.append(path)
                continue
            pairs += _pairs_of(tree, module)
    if broken:
        warnings.warn(f"left out {len(broken)} of {len(files)} files that do not parse: {broken[0]}", stacklevel=2)
    pairs = _drop_near_copies(pairs)
    askers = Counter(pair.query.lower() for pair in pairs)
    names: Counter[str] = Counter()
    usable = []
    for pair in pairs:
        if askers[pair.query.lower()] == 1:
            names[pair.name] += 1
            number = names[pair.name]
            usable.append(pair if number == 1 else replace(pair, name=f"{pair.name}#{number}"))
    return usable


def docstring_datasets(
    *, num_train: int, num_held_out: int, seed: int, packages: Sequence[str] = PACKAGES
) -> tuple[RetrievalDataset, RetrievalDataset]:
    """Two datasets of docstring pairs, (train, held out), that have no module in common.

    The modules are dealt out in random order, each to the side that has less of what it asks for; the pairs of a side
    are then drawn from its modules. Document ids are names ("json.loads"), query ids the same with "/q".

    Args:
        num_train, num_held_out: pairs to draw, at least 1; where there are fewer, all of a side.
        seed: of the deal and the draw.

    Raises:
        ValueError: the packages have no pair for one of the sides.
    """
    wanted = np.array([num_train, num_held_out])
    if (wanted < 1).any():
        raise ValueError(f"num_train and num_held_out must be at least 1, found {num_train} and {num_held_out}")
    generator = np.random.default_rng(seed)
    by_module: dict[str, list[DocstringPair]] = {}
    for pair in docstring_pairs(packages):
        by_module.setdefault(pair.module, []).append(pair)
    modules = list(by_module.values())
    sides: list[list[DocstringPair]] = [[], []]
    found = np.zeros(2, dtype=int)
    for position in generator.permutation(len(modules)):
        neediest = (found / wanted).argmin()
        sides[neediest] += modules[position]
        found[neediest] += len(modules[position])
    if not found.all():
        raise ValueError(
            f"the docstrings of {', '.join(packages)} give {found[0]:,} training and {found[1]:,} held-out pairs "
            f"({len(modules):,} modules), expected some of both"
        )
    train, held_out = (
        _dataset([side[row] for row in generator.permutation(len(side))[:count]])
        for side, count in zip(sides, wanted, strict=True)
    )
    return train, held_out


def inverse_cloze(chunks: Sequence[Chunk], *, seed: int, keep_share: float = 0.1) -> tuple[RetrievalDataset, int]:
    """(dataset, chunks left out): one sentence of each chunk is its query, and mostly no longer part of the chunk.

    Where the sentence stays, the query finds its chunk by its words; where it goes, only by what they are about. What
    a chunk gives follows from the seed, its id and its text, so chunks that are added or removed change no other with
    which they share no sentence. Sentences are whole ones of 5 to 60 words, more than half of them of letters alone,
    that begin with a capital, stand in no other chunk and once in this, and leave it at least 20 words; a chunk without
    one stays in the corpus as it is, without a query.

    Source: Lee et al. 2019, "Latent Retrieval for Weakly Supervised Open Domain Question Answering", section 4.

    Args:
        chunks: their ids become document ids, with "/q" query ids.
        seed: of the choice of sentences and of what stays.
        keep_share: of the chunks that keep their sentence; 0.1 as in the paper for training, 0 for validation.

    Raises:
        ValueError: `keep_share` out of range, an id twice, or no chunk has a sentence to ask with.
    """
    if not 0 <= keep_share <= 1:
        raise ValueError(f"keep_share must lie between 0 and 1, found {keep_share!r}")

    holders = Counter(
        sentence for chunk in chunks for sentence in {sentence for sentence, _, _ in _sentences(chunk.text)}
    )

    def ask(chunk: Chunk) -> tuple[str, str] | None:
        pairs = [pair for pair in _sentence_pairs(chunk.text) if holders[pair[0]] == 1]
        if not pairs:
            return None
        digest = hashlib.sha256(f"{seed} {chunk.id}".encode()).digest()
        choice, chance = (int.from_bytes(part, "big") / 2**48 for part in (digest[:6], digest[6:12]))
        sentence, rest = pairs[int(choice * len(pairs))]
        return sentence, chunk.text if chance < keep_share else rest

    return _ask_chunks(chunks, ask, "sentence")


def titles(chunks: Sequence[Chunk]) -> tuple[RetrievalDataset, int]:
    """(dataset, chunks left out): the heading with which a chunk begins asks for the rest of the chunk.

    A heading is a first line of up to 12 words, more than half of them of letters alone, that begins with no small
    letter (or with Markdown's "#"), ends neither like a sentence nor in its middle, and has no amounts of a table. At
    least 20 words follow, a whole sentence among them. A heading that several chunks have asks for none of them, as in
    `docstring_pairs`: "Overview" names no document, and which part of a long section it asks for, nobody knows. Those
    chunks, and those without a heading, stay in the corpus as they are.

    Args:
        chunks: their ids become document ids, with "/q" query ids.

    Raises:
        ValueError: an id twice, or no chunk has a heading of its own.
    """
    pairs = {chunk.id: _heading_pair(chunk.text) for chunk in chunks}
    askers = Counter(" ".join(_words(pair[0])) for pair in pairs.values() if pair)

    def ask(chunk: Chunk) -> tuple[str, str] | None:
        pair = pairs[chunk.id]
        return pair if pair and askers[" ".join(_words(pair[0]))] == 1 else None

    return _ask_chunks(chunks, ask, "heading of its own")


def _ask_chunks(
    chunks: Sequence[Chunk], ask: Callable[[Chunk], tuple[str, str] | None], what: str
) -> tuple[RetrievalDataset, int]:
    """The dataset of the (query, document) that `ask` gives for a chunk, and how many chunks it gives None for."""
    check_distinct([chunk.id for chunk in chunks], "chunk id")
    queries, corpus = {}, {}
    for chunk in chunks:
        query, corpus[chunk.id] = ask(chunk) or ("", chunk.text)
        if query:
            queries[chunk.id] = query
    if not queries:
        raise ValueError(f"none of {len(chunks):,} chunks has a {what} to ask with and enough text besides")
    dataset = RetrievalDataset(
        queries={f"{id}/q": query for id, query in queries.items()},
        corpus=corpus,
        qrels={f"{id}/q": {id: 1} for id in queries},
    )
    return dataset, len(chunks) - len(queries)


def _sentences(text: str) -> list[tuple[str, int, int]]:
    """(sentence on one line, its start, its stop) for all of a text."""
    return [(" ".join(text[start:stop].split()), start, stop) for start, stop in sentence_spans(text)]


def _sentence_pairs(text: str) -> Iterator[tuple[str, str]]:
    """(sentence on one line, text without it) for each sentence of a chunk that can be its query."""
    on_one_line = " ".join(text.split())
    for sentence, start, stop in _sentences(text):
        before, after = text[:start].rstrip(), text[stop:].lstrip()
        num_breaks = max(text[len(before) : start].count("\n"), text[stop : len(text) - len(after)].count("\n"))
        rest = f"{before}{chr(10) * min(num_breaks, 2) or ' '}{after}".strip()
        if _is_sentence(sentence) and on_one_line.count(sentence) == 1 and len(_words(rest)) >= MIN_DOCUMENT_WORDS:
            yield sentence, rest


def _heading_pair(text: str) -> tuple[str, str] | None:
    """(heading, what follows it) of a chunk that begins with a heading."""
    first, _, rest = text.strip().partition("\n")
    heading, rest = " ".join(re.sub(r"^#+\s|\s#+\s*$", "", first).split()), rest.strip()
    is_heading = (
        0 < len(heading.split()) <= MAX_HEADING_WORDS
        and not (heading[0].islower() and not first.startswith("#"))
        and not UNFINISHED.search(heading)
        and not AMOUNTS.search(heading)
        and _mostly_words(heading)
        and not (rest[:1].islower() or rest.startswith("("))
        and len(_words(rest)) >= MIN_DOCUMENT_WORDS
        and any(_is_sentence(" ".join(rest[start:stop].split())) for start, stop in sentence_spans(rest))
    )
    return (heading, rest) if is_heading else None


def _is_sentence(text: str) -> bool:
    return bool(len(text.split()) in SENTENCE_WORDS and WHOLE_SENTENCE.fullmatch(text) and _mostly_words(text))


def _mostly_words(text: str) -> bool:
    """Whether more than half of a line's words are of letters alone, and it is no row of a Markdown table."""
    words = text.split()
    num_of_letters = sum(re.sub(r"^\W+|\W+$|['’-]", "", word).isalpha() for word in words)
    return 2 * num_of_letters > len(words) and "|" not in text


def split_docstring(docstring: str) -> tuple[str, str] | None:
    """(summary sentence, rest) of a dedented docstring; None when no sentence of prose comes first."""
    start = PREAMBLE.match(docstring).end()
    paragraph = PROSE.match(docstring, start)
    if paragraph is None:
        return None
    sentence = SENTENCE_END.split(paragraph[0], maxsplit=1)[0]
    summary = _strip_markup(sentence)
    rest = docstring[:start] + docstring[start + len(sentence) :].lstrip(" ").lstrip("\n")
    reads_as_sentence = summary[:1].isupper() and not summary.endswith((":", ",", "-"))
    return (summary, rest) if reads_as_sentence else None


def _strip_markup(text: str) -> str:
    text = EMPHASIS.sub(r"\2", LITERAL.sub(r"\1", ROLE.sub("`", text)))
    return " ".join(text.replace("`", "").split())


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", ROLE.sub(" ", text).lower())


def _remove_repetitions(summary: str, body: str) -> str:
    """`body` without the sentences and paragraphs that say little more than `summary`; the layout stays."""
    summary_words = set(_words(summary))

    def repeats(piece: str) -> bool:
        words = set(_words(piece))
        small, large = sorted((len(words), len(summary_words)))
        return small > 2 and large <= 2 * small and len(words & summary_words) >= REPEATED_SHARE * small

    kept = "".join(piece for piece in PIECE_END.split(body) if not repeats(piece))
    return re.sub(r"\n\s*\n(?=\s*\n)", "\n", kept).lstrip("\n").rstrip()


@contextlib.contextmanager
def _garbage_collection_off() -> Iterator[None]:
    # A collection walks the syntax tree that is being built, which is never garbage, and all else that is alive: with
    # torch imported, reading took 18 s with collections and 9 s without (two shared cores, 2026-11-21).
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _python_files(package: str) -> list[tuple[str, Path]]:
    """(module name, path) of the files of a package, folder by folder, sorted."""
    if package == "stdlib":
        prefix, roots = [], [sysconfig.get_path("stdlib")]
    else:
        # Of a name without dots, find_spec looks for the folder and imports nothing.
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        prefix, roots = [package], list(getattr(spec, "submodule_search_locations", None) or [])
    if not roots:
        raise ValueError(f"'{package}' is not an installed top-level package ('stdlib' names the standard library)")
    files = []
    for root in roots:
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = sorted(set(subfolders) - SKIPPED_FOLDERS)
            for path in (Path(folder, name) for name in sorted(names) if name.endswith(".py")):
                parts = [*prefix, *path.relative_to(root).with_suffix("").parts]
                files.append((".".join(parts).removesuffix(".__init__"), path))
    return files


def _parse(path: Path) -> ast.Module:
    source = path.read_bytes()
    if b'"""' not in source and b"'''" not in source:
        return ast.Module(body=[], type_ignores=[])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        return ast.parse(source)


def _pairs_of(tree: ast.Module, module: str) -> Iterator[DocstringPair]:
    for name, docstring in _docstrings(tree, module):
        summary, rest = split_docstring(docstring) or ("", "")
        if len(summary.split()) in SUMMARY_WORDS:
            document = _remove_repetitions(summary, rest)
            if len(_words(document)) >= MIN_DOCUMENT_WORDS:
                yield DocstringPair(query=summary, document=document, module=module, name=name)


def _docstrings(tree: ast.Module, module: str) -> Iterator[tuple[str, str]]:
    """(dotted name, dedented docstring) of all that a file defines, in the order of its lines."""
    stack: list[tuple[ast.AST, str]] = [(tree, module)]
    while stack:
        node, name = stack.pop()
        if isinstance(node, DEFINITIONS):
            name = f"{name}.{node.name}"
        if isinstance(node, (ast.Module, *DEFINITIONS)):
            yield name, ast.get_docstring(node) or ""
        elif isinstance(node, (ast.Expr, ast.Assign)):
            yield from _added_docstring(node.value, name)
        if not isinstance(node, DEFINITIONS[:2]):
            for block in ("finalbody", "orelse", "handlers", "body"):
                stack += [(child, name) for child in reversed(getattr(node, block, ()))]


def _added_docstring(call: ast.expr, name: str) -> Iterator[tuple[str, str]]:
    """The docstring of something written in C: add_docstr(torch.abs, "..."), add_newdoc("numpy", "abs", "...")."""
    function = getattr(call, "func", None)
    function_name = getattr(function, "id", getattr(function, "attr", ""))
    if not function_name.lstrip("_").startswith(("add_docstr", "add_newdoc")):
        return
    arguments = [part for argument in call.args for part in getattr(argument, "elts", [argument])]
    docstring = _literal(arguments[-1]) if arguments else None
    if docstring is not None:
        targets = (_literal(target) or ast.unparse(target).split(".")[-1] for target in arguments[:-1])
        yield ".".join([name, *filter(str.isidentifier, targets)]), inspect.cleandoc(docstring)


def _literal(node: ast.expr) -> str | None:
    """The value of a string, of strings added up, and of "...".format(...) with its fields left empty; else None."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            parts = (_literal(left), _literal(right))
            return None if None in parts else "".join(parts)
        case ast.Call(func=ast.Attribute(value=template, attr="format")):
            text = _literal(template)
            return text and re.sub(r"([{}])\1|\{\w*\}", r"\1", text)  # {{ stands for {
    return None


def _drop_near_copies(pairs: list[DocstringPair]) -> list[DocstringPair]:
    """Longest documents first, so that one that is part of another goes, wherever the two stand; order is kept."""
    runs = [shingles(ROLE.sub(" ", pair.document)) for pair in pairs]
    seen: set[int] = set()
    kept = []
    for position in sorted(range(len(pairs)), key=lambda i: (-len(runs[i]), i)):
        own = runs[position]
        if not is_copied(own, seen):
            kept.append(position)
            seen |= own
    return [pairs[position] for position in sorted(kept)]


def _dataset(pairs: list[DocstringPair]) -> RetrievalDataset:
    return RetrievalDataset(
        queries={f"{pair.name}/q": pair.query for pair in pairs},
        corpus={pair.name: pair.document for pair in pairs},
        qrels={f"{pair.name}/q": {pair.name: 1} for pair in pairs},
    )
