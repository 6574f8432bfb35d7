"""Questions without an LLM: a chunk's sentence, heading or docstring summary is the query for the rest of it.

    dataset = inverse_cloze(chunks, seed=0)
    dataset = titles(chunks)
    train, held_out = docstring_datasets(num_train=2_000, num_held_out=1_000, seed=0, packages=["numpy", "stdlib"])

Packages are parsed, not imported. Not read: tests, `.pyi` and C files, nested functions, computed docstrings.
"""

import ast
import hashlib
import importlib.util
import inspect
import os
import re
import sysconfig
import warnings
from collections import Counter, namedtuple
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..data.checks import check_distinct
from ..data.dataset import RetrievalDataset
from ..progress import progress_bar
from .chunks import Chunk, sentence_spans
from .splits import COPIED_SHARE, shingles, words

MIN_DOCUMENT_WORDS = 20
SENTENCE_WORDS, MAX_HEADING_WORDS = range(5, 61), 12
WHOLE_SENTENCE = re.compile(r"""["'“‘(\[]*[^\W\d_a-z].*[.!?]["'”’)\]]*""")
# A first line that ends like this is a sentence or continues on the next line; one with amounts is a table row.
UNFINISHED = re.compile(r"(?:[.!?:;,—–-]|\b(?i:an?|and|as|at|by|for|from|in|of|on|or|our|that|the|to|which|with))$")
AMOUNTS = re.compile(r"[$€£]|\d,\d{3}|\d[\d.%)]*\s+\(?[\d.,%)]+$")


def inverse_cloze(chunks: Sequence[Chunk], *, seed: int, keep_share: float = 0.1) -> RetrievalDataset:
    """Turns one sentence of each chunk into its query ("ID/q") and, for most chunks, removes it from the chunk.

    The choice depends on the seed and the chunk's id and text, not on chunks that share no sentence with it. A sentence
    qualifies if it is complete, begins with a capital, has 5 to 60 words (more than half of them all letters), occurs
    once in its chunk and in no other, and leaves at least 20 words; a chunk may have none. A fraction `keep_share` of
    the chunks keeps its sentence: 0.1 for training, as in the paper, and 0 for validation.

    Source: Lee et al. 2019, "Latent Retrieval for Weakly Supervised Open Domain Question Answering", section 4."""
    if not 0 <= keep_share <= 1:
        raise ValueError(f"keep_share is {keep_share!r}, expected 0 to 1")
    found, choices = {}, _sentence_choices(chunks)
    for chunk in chunks:
        if not isinstance(pairs := choices[chunk.id], str):
            digest = hashlib.sha256(f"{seed} {chunk.id}".encode()).digest()
            choice, chance = (int.from_bytes(part, "big") / 2**48 for part in (digest[:6], digest[6:12]))
            sentence, rest = pairs[int(choice * len(pairs))]
            found[chunk.id] = (sentence, chunk.text if chance < keep_share else rest)
    return _dataset(chunks, found, "sentence")


def without_sentence(chunks: Sequence[Chunk]) -> dict[str, str]:
    """{id: why} of the chunks for which `inverse_cloze` makes no query."""
    return {id: reason for id, reason in _sentence_choices(chunks).items() if isinstance(reason, str)}


def titles(chunks: Sequence[Chunk]) -> RetrievalDataset:
    """Turns the heading at the start of a chunk into its query ("ID/q"), and the rest into the document.

    A heading is a first line of up to 12 words, more than half of them all letters. It begins with no lower-case letter
    (except after Markdown's "#"), does not end like a sentence or in the middle of one, contains no table amounts, and
    heads no other chunk. At least 20 words must follow, with a complete sentence among them."""
    found = {id: pair for id, pair in _headings(chunks).items() if not isinstance(pair, str)}
    return _dataset(chunks, found, "unique heading")


def without_title(chunks: Sequence[Chunk]) -> dict[str, str]:
    """{id: why} of the chunks for which `titles` makes no query."""
    return {id: reason for id, reason in _headings(chunks).items() if isinstance(reason, str)}


def _dataset(chunks: Sequence[Chunk], found: Mapping[str, tuple[str, str]], what: str) -> RetrievalDataset:
    check_distinct([chunk.id for chunk in chunks], "chunk id")
    if not found:
        raise ValueError(f"none of {len(chunks):,} chunks has a {what} to use as a query and enough other text")
    return pair_dataset({chunk.id: found.get(chunk.id, (None, chunk.text)) for chunk in chunks})


def pair_dataset(pairs: Mapping[str, tuple[str | None, str]]) -> RetrievalDataset:
    """The dataset of {id: (query, document)}; a document may have no query (None). Query ids are "ID/q"."""
    queries = {f"{id}/q": query for id, (query, _) in pairs.items() if query is not None}
    qrels = {query_id: {query_id.removesuffix("/q"): 1} for query_id in queries}
    return RetrievalDataset(queries, {id: document for id, (_, document) in pairs.items()}, qrels)


def _sentences(text: str) -> list[tuple[str, int, int]]:
    """(sentence on one line, its start, its stop) for each sentence of a text."""
    return [(" ".join(text[start:stop].split()), start, stop) for start, stop in sentence_spans(text)]


def _sentence_choices(chunks: Sequence[Chunk]) -> dict[str, list[tuple[str, str]] | str]:
    """{id: each (sentence on one line, text without it) that qualifies, or why none does}."""
    holders = Counter(sentence for chunk in chunks for sentence in {text for text, _, _ in _sentences(chunk.text)})
    return {chunk.id: _sentence_pairs(chunk.text, holders) for chunk in chunks}


def _sentence_pairs(text: str, holders: Mapping[str, int]) -> list[tuple[str, str]] | str:
    on_one_line, pairs, reasons = " ".join(text.split()), [], {}
    for sentence, start, stop in _sentences(text):
        if not _is_sentence(sentence):
            continue
        before, after = text[:start].rstrip(), text[stop:].lstrip()
        num_breaks = max(text[len(before) : start].count("\n"), text[stop : len(text) - len(after)].count("\n"))
        rest = f"{before}{chr(10) * min(num_breaks, 2) or ' '}{after}".strip()
        if holders[sentence] > 1 or on_one_line.count(sentence) > 1:
            reasons["its sentences occur more than once"] = True
        elif len(words(rest)) < MIN_DOCUMENT_WORDS:
            reasons[f"its sentences leave fewer than {MIN_DOCUMENT_WORDS} words"] = True
        else:
            pairs.append((sentence, rest))
    span = f"{SENTENCE_WORDS[0]} to {SENTENCE_WORDS[-1]} words"
    return pairs or " or ".join(reasons) or f"it has no complete sentence of {span}"


def _headings(chunks: Sequence[Chunk]) -> dict[str, tuple[str, str] | str]:
    """{id: (heading, rest), or why there is none}."""
    found = {chunk.id: _heading_pair(chunk.text) for chunk in chunks}
    keys = {id: " ".join(words(pair[0])) for id, pair in found.items() if not isinstance(pair, str)}
    counts = Counter(keys.values())
    return found | {id: "its heading stands above others too" for id, key in keys.items() if counts[key] > 1}


def _heading_pair(text: str) -> tuple[str, str] | str:
    """(heading, rest) of a chunk that begins with a heading, else why not."""
    first, _, rest = text.strip().partition("\n")
    heading, rest = " ".join(re.sub(r"^#+\s|\s#+\s*$", "", first).split()), rest.strip()
    is_heading = (
        0 < len(heading.split()) <= MAX_HEADING_WORDS
        and not (heading[0].islower() and not first.startswith("#"))
        and not (UNFINISHED.search(heading) or AMOUNTS.search(heading))
        and _mostly_words(heading)
        and not (rest[:1].islower() or rest.startswith("("))
    )
    if not is_heading:
        return "it does not begin with a heading"
    if len(words(rest)) < MIN_DOCUMENT_WORDS:
        return f"fewer than {MIN_DOCUMENT_WORDS} words follow its heading"
    has_sentence = any(_is_sentence(sentence) for sentence, _, _ in _sentences(rest))
    return (heading, rest) if has_sentence else "no complete sentence follows its heading"


def _is_sentence(text: str) -> bool:
    return bool(len(text.split()) in SENTENCE_WORDS and WHOLE_SENTENCE.fullmatch(text) and _mostly_words(text))


def _mostly_words(text: str) -> bool:
    """Whether more than half of a line's words are all letters, and it is not a Markdown table row."""
    of_letters = [re.sub(r"^\W+|\W+$|['’-]", "", part).isalpha() for part in text.split()]
    return 2 * sum(of_letters) > len(of_letters) and "|" not in text


PACKAGES = ("torch", "numpy", "stdlib")
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
SKIPPED_FOLDERS = {"test", "tests", "testing", "idle_test", "lib2to3", "site-packages", "dist-packages"}
SUMMARY_WORDS = range(4, 61)
# What may come before the summary: blank lines, signatures, directives with their indented lines.
PREAMBLE = re.compile(r"""(?x) (?: \ *\n | --\n | \.\.\ .* (?:\n(?:\ .*)?)*
    | [\w.]+\ ?\( (?:[^()]|\([^()]*\))* \) (?:\ *[-=]>.{1,40})? (?:\ *\#.*)? \n )*""")
# Lines that are not prose: they end the summary's paragraph; a docstring that begins with one has no summary.
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
EMPHASIS = re.compile(r"(?<![\w*])(\*{1,2})([^*\s](?:[^*]*[^*\s])?)\1(?![\w*])")

# The first sentence of a docstring, the rest, and the dotted names of its module and of what it documents.
DocstringPair = namedtuple("DocstringPair", "query document module name")


def docstring_pairs(packages: Sequence[str] = PACKAGES) -> list[DocstringPair]:
    """Reads the usable docstrings of installed packages, ordered by package, file and line.

    Skips summaries with fewer than 4 or more than 60 words, or that do not read as a sentence (no capital, a colon at
    the end); documents under 20 words; near-copies of longer documents, so that a split cannot separate them; and
    summaries that several documents share. Files that do not parse are skipped, with a warning that counts them."""
    pairs = _read_pairs([file for package in packages for file in _python_files(package)])
    own = [shingles(ROLE.sub(" ", pair.document)) for pair in pairs]
    seen: set[int] = set()
    kept = []
    for row in sorted(range(len(pairs)), key=lambda row: -len(own[row])):
        if len(own[row] & seen) <= COPIED_SHARE * len(own[row]):
            kept.append(row)
            seen |= own[row]
    askers = Counter(pairs[row].query.lower() for row in kept)
    return [pairs[row] for row in sorted(kept) if askers[pairs[row].query.lower()] == 1]


def docstring_datasets(
    *, num_train: int, num_held_out: int, seed: int, packages: Sequence[str] = PACKAGES
) -> tuple[RetrievalDataset, RetrievalDataset]:
    """Makes two datasets of docstring pairs, (train, held out), that have no module in common.

    Modules are assigned in random order, each to the side with the smaller fraction of its target so far; each side
    then draws its pairs at random, or takes all if it has fewer. Document ids are names ("json.loads", with "#2" for
    the second of a name), query ids the same with "/q". "stdlib" counts as a package."""
    wanted = [num_train, num_held_out]
    if min(wanted) < 1:
        raise ValueError(f"num_train and num_held_out are {num_train} and {num_held_out}, expected at least 1")
    generator = np.random.default_rng(seed)
    modules: dict[str, dict[str, tuple[str, str]]] = {}
    names: Counter[str] = Counter()
    for query, document, module, name in docstring_pairs(packages):
        names[name] += 1
        id = name if names[name] == 1 else f"{name}#{names[name]}"
        modules.setdefault(module, {})[id] = (query, document)
    sides: list[list[tuple[str, tuple[str, str]]]] = [[], []]
    for position in generator.permutation(len(modules)):
        neediest = np.divide(list(map(len, sides)), wanted).argmin()
        sides[neediest] += list(modules.values())[position].items()
    if not all(sides):
        counts = f"{len(sides[0]):,} training and {len(sides[1]):,} held-out pairs ({len(modules):,} modules)"
        raise ValueError(f"the docstrings of {', '.join(packages)} give {counts}, expected some of both")
    drawn = [generator.permutation(len(side))[:number] for side, number in zip(sides, wanted, strict=True)]
    train, held_out = (dict(side[row] for row in rows) for side, rows in zip(sides, drawn, strict=True))
    return pair_dataset(train), pair_dataset(held_out)


def split_docstring(docstring: str) -> tuple[str, str] | None:
    """(summary sentence, rest) of a dedented docstring; None unless it begins with a sentence of prose."""
    start = PREAMBLE.match(docstring).end()
    paragraph = PROSE.match(docstring, start)
    if paragraph is None:
        return None
    sentence = SENTENCE_END.split(paragraph[0], maxsplit=1)[0]
    plain = EMPHASIS.sub(r"\2", LITERAL.sub(r"\1", ROLE.sub("`", sentence)))
    summary = " ".join(plain.replace("`", "").split())
    rest = docstring[:start] + docstring[start + len(sentence) :].lstrip(" ").lstrip("\n")
    reads_as_sentence = summary[:1].isupper() and not summary.endswith((":", ",", "-"))
    return (summary, rest) if reads_as_sentence else None


def _remove_repetitions(summary: str, body: str, *, repeated_share: float = 0.8) -> str:
    """`body` without sentences and paragraphs that mostly repeat `summary`; the layout stays."""
    summary_words = set(words(summary))

    def repeats(piece: str) -> bool:
        piece_words = set(words(ROLE.sub(" ", piece)))
        small, large = sorted((len(piece_words), len(summary_words)))
        return small > 2 and large <= 2 * small and len(piece_words & summary_words) >= repeated_share * small

    kept = "".join(piece for piece in PIECE_END.split(body) if not repeats(piece))
    return re.sub(r"\n\s*\n(?=\s*\n)", "\n", kept).lstrip("\n").rstrip()


def _python_files(package: str) -> list[tuple[str, Path]]:
    """(module name, path) of a package's files, sorted folder by folder."""
    prefix, roots = [package], []
    if package == "stdlib":
        prefix, roots = [], [sysconfig.get_path("stdlib")]
    elif package.isidentifier() and (spec := importlib.util.find_spec(package)):  # imports nothing
        roots = spec.submodule_search_locations
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


def _read_pairs(files: Sequence[tuple[str, Path]]) -> list[DocstringPair]:
    pairs, broken = [], []
    with progress_bar(len(files), "reading docstrings", unit="file") as bar:
        for module, path in files:
            bar.update()
            try:
                pairs += _pairs_of(path.read_bytes(), module)
            except (SyntaxError, ValueError):  # ValueError: a null byte, before Python 3.12
                broken.append(path)
    if broken:
        warnings.warn(f"skipped {len(broken)} of {len(files)} files that do not parse: {broken[0]}", stacklevel=3)
    return pairs


def _pairs_of(source: bytes, module: str) -> Iterator[DocstringPair]:
    if b'"""' not in source and b"'''" not in source:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        tree = ast.parse(source)
    for name, docstring in _docstrings(tree, module):
        summary, rest = split_docstring(docstring) or ("", "")
        if len(summary.split()) in SUMMARY_WORDS:
            document = _remove_repetitions(summary, rest)
            if len(words(ROLE.sub(" ", document))) >= MIN_DOCUMENT_WORDS:
                yield DocstringPair(summary, document, module, name)


def _docstrings(tree: ast.Module, module: str) -> Iterator[tuple[str, str]]:
    """(dotted name, dedented docstring) of everything a file defines, in line order."""
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
    """The docstring of an object written in C: add_docstr(torch.abs, "..."), add_newdoc("numpy", "abs", "...")."""
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
    """The value of a string, a sum of strings, or "...".format(...) with empty fields; anything else is None."""
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
