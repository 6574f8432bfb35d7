"""Finds sentences by punctuation, line ends and a list of English abbreviations.

Not here: abbreviations of other languages, and scripts without marks at sentence ends (Thai, Lao).
"""

import re

CLOSING = r"[\"'”’)\]」』）】》〉］]*"
# Before a blank and what can begin a sentence; marks of other scripts end one wherever they stand.
SENTENCE_END = re.compile(
    rf"(?<![.!?])[.!?]+[\"'”’)\]]*\s+(?=[\"'“‘«¿¡(\[$€£•]*[^\W_a-z])|[。！？｡．।॥۔؟።፧။។։།\u037e]+{CLOSING}\s*"
)
FENCED_BLOCK = r"^[ \t]*(?P<fence>`{3,}|~{3,})[^\n]*(?:\n.*?^[ \t]*(?P=fence)[`~]*[ \t]*$|.*\Z)"
LINE_OR_BLOCK = re.compile(rf"{FENCED_BLOCK}|[^\n]+", re.MULTILINE | re.DOTALL)
LAST_WORD = re.compile(r"[^\s\"'“‘(\[]*$")
# Words whose period ends no sentence, besides single letters with periods ("U.S.", "J.", "e.g.").
ABBREVIATIONS = re.compile(
    r"approx|art|co|corp|cf|dept|dr|est|etc|figs?|inc|jr|ltd|messrs|mr|mrs|ms|mt|nos?|prof|pp|sec|sr|st|vol|vs"
    r"|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec",
    re.IGNORECASE,
)
LETTERS_WITH_PERIODS = re.compile(r"(?:[^\W\d_]\.)*[^\W\d_]")
# "Item 1A.", "Note 3.", and at the beginning of a line "1." and "iv.".
NUMBERED = re.compile(r"(?:^|\b(?:item|note|section|article|exhibit|part)\s+)(?:\d{1,3}[a-z]?|[ivx]+)$", re.I)


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Returns (start, stop) of each sentence, without surrounding blanks; every other character is in exactly one.

    A sentence ends at a line end, and at a mark before a blank and anything but a lower-case letter, unless it belongs
    to an abbreviation or an item number ("Item 1A."). A fenced code block counts as one sentence.
    """
    spans = []
    for line in LINE_OR_BLOCK.finditer(text):
        start, stop = line.span()
        for end in () if line["fence"] else SENTENCE_END.finditer(text, start, stop):
            if not _is_abbreviation(text, start, end.start()):
                spans.append(_stripped(text, start, end.end()))
                start = end.end()
        spans.append(_stripped(text, start, stop))
    return [(start, stop) for start, stop in spans if start < stop]


def _stripped(text: str, start: int, stop: int) -> tuple[int, int]:
    piece = text[start:stop]
    start += len(piece) - len(piece.lstrip())
    return start, max(start, start + len(piece.strip()))


def _is_abbreviation(text: str, start: int, period: int) -> bool:
    """Whether the mark at `period` belongs to the word before it, in a sentence that begins at `start`."""
    if text[period] != "." or not text[period + 1].isspace():
        return False
    before = text[max(start, period - 24) : period]
    word = LAST_WORD.search(before)[0]
    numbered = NUMBERED.search(before.lstrip() if period - 24 <= start else f" {before}")
    return bool(ABBREVIATIONS.fullmatch(word) or LETTERS_WITH_PERIODS.fullmatch(word) or numbered)
