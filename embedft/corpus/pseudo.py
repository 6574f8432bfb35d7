"""Questions without an LLM: a sentence of a chunk asks for the chunk, a heading for what follows it.

Not here: questions from docstrings (docstrings.py) or by an LLM (questions.py).
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from ..data.checks import check_distinct
from ..data.dataset import RetrievalDataset
from .chunks import Chunk, sentence_spans
from .splits import words

MIN_DOCUMENT_WORDS = 20
SENTENCE_WORDS, MAX_HEADING_WORDS = range(5, 61), 12
WHOLE_SENTENCE = re.compile(r"""["'“‘(\[]*[^\W\d_a-z].*[.!?]["'”’)\]]*""")
# A first line that ends like this is a sentence, or goes on in the next line; one with amounts is a row of a table.
UNFINISHED = re.compile(r"(?:[.!?:;,—–-]|\b(?i:an?|and|as|at|by|for|from|in|of|on|or|our|that|the|to|which|with))$")
AMOUNTS = re.compile(r"[$€£]|\d,\d{3}|\d[\d.%)]*\s+\(?[\d.,%)]+$")


def inverse_cloze(chunks: Sequence[Chunk], *, seed: int, keep_share: float = 0.1) -> RetrievalDataset:
    """Makes one sentence of each chunk its query ("ID/q") and, for most chunks, removes it from the chunk.

    What a chunk gives follows from the seed, its id and its text, not from chunks that share no sentence with it. A
    sentence qualifies if it is whole, begins with a capital, has 5 to 60 words, more than half of them of letters
    alone, occurs once in this chunk and in no other, and leaves at least 20 words; a chunk may have none. A share of
    the chunks keep it: 0.1 as in the paper for training, 0 for validation.

    Source: Lee et al. 2019, "Latent Retrieval for Weakly Supervised Open Domain Question Answering", section 4.
    """
    if not 0 <= keep_share <= 1:
        raise ValueError(f"keep_share is {keep_share!r}, expected 0 to 1")
    holders = Counter(sentence for chunk in chunks for sentence in {text for text, _, _ in _sentences(chunk.text)})
    found = {}
    for chunk in chunks:
        pairs = [pair for pair in _sentence_pairs(chunk.text) if holders[pair[0]] == 1]
        if pairs:
            digest = hashlib.sha256(f"{seed} {chunk.id}".encode()).digest()
            choice, chance = (int.from_bytes(part, "big") / 2**48 for part in (digest[:6], digest[6:12]))
            sentence, rest = pairs[int(choice * len(pairs))]
            found[chunk.id] = (sentence, chunk.text if chance < keep_share else rest)
    return _dataset(chunks, found, "sentence")


def titles(chunks: Sequence[Chunk]) -> RetrievalDataset:
    """Makes the heading with which a chunk begins its query ("ID/q"), and the rest its document.

    A heading is a first line of up to 12 words, more than half of them of letters alone, that does not begin with a
    small letter (unless after Markdown's "#"), does not end like a sentence or in the middle of one, has no amounts of
    a table, and is that of no other chunk. At least 20 words follow, a whole sentence among them.
    """
    pairs = {chunk.id: pair for chunk in chunks if (pair := _heading_pair(chunk.text))}
    keys = {id: " ".join(words(heading)) for id, (heading, _) in pairs.items()}
    counts = Counter(keys.values())
    return _dataset(chunks, {id: pair for id, pair in pairs.items() if counts[keys[id]] == 1}, "heading of its own")


def _dataset(chunks: Sequence[Chunk], found: Mapping[str, tuple[str, str]], what: str) -> RetrievalDataset:
    check_distinct([chunk.id for chunk in chunks], "chunk id")
    if not found:
        raise ValueError(f"none of {len(chunks):,} chunks has a {what} to ask with and enough text besides")
    return pair_dataset({chunk.id: found.get(chunk.id, (None, chunk.text)) for chunk in chunks})


def pair_dataset(pairs: Mapping[str, tuple[str | None, str]]) -> RetrievalDataset:
    """The dataset of {id: (query, document)}; query None: a document that nobody asks for. Query ids are "ID/q"."""
    queries = {f"{id}/q": query for id, (query, _) in pairs.items() if query is not None}
    qrels = {query_id: {query_id.removesuffix("/q"): 1} for query_id in queries}
    return RetrievalDataset(queries, {id: document for id, (_, document) in pairs.items()}, qrels)


def _sentences(text: str) -> list[tuple[str, int, int]]:
    """(sentence on one line, its start, its stop) for all of a text."""
    return [(" ".join(text[start:stop].split()), start, stop) for start, stop in sentence_spans(text)]


def _sentence_pairs(text: str) -> Iterator[tuple[str, str]]:
    """(sentence on one line, text without it) for each sentence of a chunk that qualifies by itself."""
    on_one_line = " ".join(text.split())
    for sentence, start, stop in _sentences(text):
        before, after = text[:start].rstrip(), text[stop:].lstrip()
        num_breaks = max(text[len(before) : start].count("\n"), text[stop : len(text) - len(after)].count("\n"))
        rest = f"{before}{chr(10) * min(num_breaks, 2) or ' '}{after}".strip()
        if _is_sentence(sentence) and on_one_line.count(sentence) == 1 and len(words(rest)) >= MIN_DOCUMENT_WORDS:
            yield sentence, rest


def _heading_pair(text: str) -> tuple[str, str] | None:
    """(heading, what follows it) of a chunk that begins with a heading."""
    first, _, rest = text.strip().partition("\n")
    heading, rest = " ".join(re.sub(r"^#+\s|\s#+\s*$", "", first).split()), rest.strip()
    is_heading = (
        0 < len(heading.split()) <= MAX_HEADING_WORDS
        and not (heading[0].islower() and not first.startswith("#"))
        and not (UNFINISHED.search(heading) or AMOUNTS.search(heading))
        and _mostly_words(heading)
        and not (rest[:1].islower() or rest.startswith("("))
        and len(words(rest)) >= MIN_DOCUMENT_WORDS
        and any(_is_sentence(sentence) for sentence, _, _ in _sentences(rest))
    )
    return (heading, rest) if is_heading else None


def _is_sentence(text: str) -> bool:
    return bool(len(text.split()) in SENTENCE_WORDS and WHOLE_SENTENCE.fullmatch(text) and _mostly_words(text))


def _mostly_words(text: str) -> bool:
    """Whether more than half of a line's words are of letters alone, and it is no row of a Markdown table."""
    of_letters = [re.sub(r"^\W+|\W+$|['’-]", "", part).isalpha() for part in text.split()]
    return 2 * sum(of_letters) > len(of_letters) and "|" not in text
