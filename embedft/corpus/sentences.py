"""Where the sentences of a text begin and end, by its marks, line ends and a list of English abbreviations.

    text = "Lyft, Inc. was founded in 2012. It has no factories."
    [text[start:stop] for start, stop in sentence_spans(text)]   # two sentences

Not here: other languages' abbreviations, and scripts that end sentences otherwise; their lines still end sentences.
"""

import re

SENTENCE_END = re.compile(r"(?<![.!?])[.!?]+[\"'”’)\]]*\s+(?=[\"'“‘(\[$€£•]*[^\W_a-z])")
LAST_WORD = re.compile(r"[^\s\"'“‘(\[]*$")
# Words whose period ends no sentence, beside single letters with periods ("U.S.", "J.", "e.g.").
ABBREVIATIONS = re.compile(
    r"approx|art|co|corp|cf|dept|dr|etc|figs?|inc|jr|ltd|messrs|mr|mrs|ms|mt|nos?|prof|pp|sec|sr|st|vol|vs"
    r"|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec",
    re.IGNORECASE,
)
LETTERS_WITH_PERIODS = re.compile(r"(?:[^\W\d_]\.)*[^\W\d_]")
# "Item 1A.", "Note 3.", and at the beginning of a line "1." and "iv.".
NUMBERED = re.compile(r"(?:^|\b(?:item|note|section|article|exhibit|part)\s+)(?:\d{1,3}[a-z]?|[ivx]+)$", re.I)


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """(start, stop) of every sentence, blanks around it left out; each other character is in exactly one.

    A sentence ends at the end of its line, and at a period, exclamation or question mark (with closing quotes and
    brackets) before a blank and something that can begin a sentence: anything but a lower-case letter. It does not end
    after abbreviations, single letters with periods ("U.S.") and numbers of items ("1." at the beginning of a line,
    "Item 1A.").
    """
    spans = []
    for line in re.finditer(r"[^\n]+", text):
        start, stop = line.span()
        for end in SENTENCE_END.finditer(text, start, stop):
            if not _ends_nothing(text, start, end.start()):
                spans.append(_stripped(text, start, end.end()))
                start = end.end()
        spans.append(_stripped(text, start, stop))
    return [(start, stop) for start, stop in spans if start < stop]


def _stripped(text: str, start: int, stop: int) -> tuple[int, int]:
    piece = text[start:stop]
    start += len(piece) - len(piece.lstrip())
    return start, max(start, start + len(piece.strip()))


def _ends_nothing(text: str, start: int, period: int) -> bool:
    """Whether the mark at `period` belongs to the word before it; `start`: of the sentence."""
    if text[period] != "." or not text[period + 1].isspace():
        return False
    before = text[max(start, period - 24) : period]
    word = LAST_WORD.search(before)[0]
    return (
        ABBREVIATIONS.fullmatch(word) is not None
        or LETTERS_WITH_PERIODS.fullmatch(word) is not None
        or NUMBERED.search(before.lstrip() if period - 24 <= start else f" {before}") is not None
    )
