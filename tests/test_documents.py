"""documents.py: the text of pages by hand, then the two real filings, each read once, through to chunks."""

import errno
import os
import re
import unicodedata
from collections import Counter
from itertools import pairwise

import pytest
from naming import names, naming

from embedft.corpus import documents
from embedft.corpus.chunks import chunk_pages, sentence_spans
from embedft.corpus.documents import (
    Page,
    Skipped,
    drop_repeated_lines,
    read_documents,
    split_sections,
    strip_html,
)
from embedft.corpus.layout import clean_layout
from embedft.corpus.pdf import PdfText, read_pdfs
from embedft.corpus.splits import shingles, split_chunks

WIDE = "Words that fill this line up to its right edge, which is where the others end, too"


def layout(page: str, *, elsewhere: str = "") -> str:
    return clean_layout([page, elsewhere])[0]


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("", ""),
        (" \n  \n", ""),
        # Justified lines of two paragraphs, the first line of each indented.
        (
            f"     {WIDE[:75]}\n{WIDE.replace(' ', '  ')}\nend here.\n     Next  one.",
            f"{WIDE[:75]} {WIDE} end here.\nNext one.",
        ),
        # A paragraph of one full line before another one.
        (f"   {WIDE[:-1]}.\n   {WIDE}\nIt ends.", f"{WIDE[:-1]}.\n{WIDE} It ends."),
        # A paragraph that an empty line ends, though full, and one that its short last line ends.
        (f"{WIDE}\n\n{WIDE}\nThe end.\nAnother\n{WIDE}", f"{WIDE}\n{WIDE} The end.\nAnother\n{WIDE}"),
        # A heading below a full line that ends a sentence; without that end it is the paragraph's last line.
        (f"{WIDE}\n{WIDE}.\nLegal Matters\n   {WIDE}", f"{WIDE} {WIDE}.\nLegal Matters\n{WIDE}"),
        (f"{WIDE}\n{WIDE}\nLegal Matters\n\n{WIDE}", f"{WIDE} {WIDE} Legal Matters\n{WIDE}"),
        # Bullets and numbers, their lines hanging or going back to the margin.
        (
            f"   •    {WIDE}\n        and more\n   •    Two\n  (a)   {WIDE}\nBack here\n12.3    Three\n* Four",
            f"• {WIDE} and more\n• Two\n(a) {WIDE} Back here\n12.3 Three\n* Four",
        ),
        (f"Section 4.01      {WIDE}\nGoes on.", f"Section 4.01 {WIDE} Goes on."),
        # Rows of a table, a title in the middle of the line, a label that its lower-case line continues.
        ("         Title\nRent        1\nFees        2,000", "Title\nRent 1\nFees 2,000"),
        (f"{WIDE}\nNet   of   costs        2\nto issue", f"{WIDE}\nNet of costs 2\nto issue"),
        ("Cost of the\nrevenue", "Cost of the revenue"),
        (f"{WIDE}\nof the kind     and more\n{WIDE}", f"{WIDE} of the kind and more\n{WIDE}"),  # a hole in prose
        # An indented block between paragraphs.
        (f"{WIDE}\n      {WIDE}\n      Goes on\n{WIDE}", f"{WIDE}\n{WIDE} Goes on\n{WIDE}"),
        # Double spacing.
        (f"{WIDE}\n\n{WIDE}\n\nin\n\nlines", f"{WIDE} {WIDE} in lines"),
        # Page numbers stay apart, inside the page a number does not.
        (f"{WIDE}\n{WIDE}\n12", f"{WIDE} {WIDE}\n12"),
        (f"12\n{WIDE}", f"12\n{WIDE}"),
        (f"{WIDE}\n{WIDE}\nPage 3 of 9", f"{WIDE} {WIDE}\nPage 3 of 9"),
        (f"{WIDE}\n{WIDE}\n{WIDE}\n2021 and\nso\non\nand\non", f"{WIDE} {WIDE} {WIDE} 2021 and so on and on"),
        # Characters.
        ("e\ufb03cient \ufb01rst o\ufb00 \ufb06 \ufb05", "efficient first off st st"),
        ("a\x00b\x07c\td\xa0e\x85f\ud83dg", "abc d ef g".replace("ef g", "e fg")),
        ("over\u00ad\nview", "overview"),
        ("the last\u00ad", "the last"),
    ],
)
def test_a_page_becomes_lines(page, text):
    assert layout(page) == text


@pytest.mark.parametrize(
    ("broken", "elsewhere", "joined"),
    [
        ("trans-\nportation", "transportation", "transportation"),
        ("Trans-\nportation", "TRANSPORTATION", "Transportation"),
        ("end-\nusers", "end-users", "end-users"),
        ("right-of-\nuse", "right-of-use", "right-of-use"),
        ("co-\nop", "coop co-op co-op", "co-op"),
        ("co-\nop", "coop coop co-op", "coop"),
        ("co-\nop", "coop co-op", "co-op"),
        # Nothing elsewhere: the halves decide.
        ("trans-\nportation", "", "transportation"),
        ("open-\nsource", "open the source", "open-source"),
        ("open-\nsource", "open", "opensource"),
        ("open-\nsource open-\nsource", "", "opensource opensource"),  # a half is no word of its own
        ("state-of-the-\nart", "", "state-of-the-art"),
        ("COVID-\n19 cases", "", "COVID-19 cases"),
        ("10-\nK", "", "10-K"),
        ("pre-\nand post-closing", "", "pre- and post-closing"),
        # No broken word.
        ("2019 -\n2021 and", "", "2019 - 2021 and"),
        ("-\nthe", "", "- the"),
        ("companies—\nto", "", "companies—to"),
        ("companies —\nto", "", "companies — to"),
        ("and/\nor", "", "and/or"),
        ("a dash-\n(or so)", "", "a dash- (or so)"),
    ],
)
def test_a_hyphen_at_a_line_end_goes_unless_the_word_has_one(broken, elsewhere, joined):
    pages = clean_layout([f"so {broken}\n\n", elsewhere, "filler\n" * 9])
    assert pages[0] == f"so {joined}"


def test_a_running_title_is_not_joined_to_the_text():
    pages = [f"A title of the report\nand what stands on page {n}" for n in "abc"]
    assert [page.split("\n")[0] for page in clean_layout(pages)] == ["A title of the report"] * 3
    assert "\n" not in clean_layout(pages[:2])[0]


# Files.


@pytest.fixture
def pdf_texts(monkeypatch) -> dict[str, PdfText]:
    """What `read_pdfs` finds, by path; `calls` of it are in the key "calls"."""
    texts = {"calls": []}

    def read(paths, *, processes):
        texts["calls"].append((list(paths), processes))
        return [texts[path] for path in paths]

    monkeypatch.setattr(documents, "read_pdfs", read)
    return texts


def test_files_and_folders_in_order_each_file_once(tmp_path, monkeypatch, pdf_texts):
    monkeypatch.chdir(tmp_path)
    for name in (
        "b.txt",
        "d/z.md",
        "d/a/y.TEXT",
        "d/a.markdown",
        "d/x.docx",
        "d/w.docx",
        "d/README",
        "d/.h.txt",
        "d/.g/i.txt",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name}")
    (tmp_path / "d" / "p.PDF").touch()
    (tmp_path / "e").mkdir()
    pdf_texts["d/p.PDF"] = PdfText(["one", "", "", "four"], {3: "cannot be read (KeyError: 'x')"}, None, set())
    pages, skipped = read_documents(["b.txt", tmp_path / "e", "d", "./b.txt", "d/z.md"], processes=3)
    assert pages == [
        Page("b.txt", 1, "text of b.txt"),
        Page("d/a/y.TEXT", 1, "text of d/a/y.TEXT"),
        Page("d/a.markdown", 1, "text of d/a.markdown", ()),
        Page("d/p.PDF", 1, "one"),
        Page("d/p.PDF", 4, "four"),
        Page("d/z.md", 1, "text of d/z.md", ()),
    ]
    expected = [
        ("d", 3, "types", ".docx", 2, "suffix", 1),
        ("d/p.PDF", 2, "no", "text"),
        ("d/p.PDF", 3, "cannot be read (KeyError: 'x')"),
    ]
    assert all(names(str(line), *facts) for line, facts in zip(skipped, expected, strict=True))
    assert pdf_texts["calls"] == [(["d/p.PDF"], 3)]


def test_form_feeds_separate_pages(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\f \n\fthree")
    pages, skipped = read_documents([str(path)])
    assert pages == [Page(str(path), 1, "one\n"), Page(str(path), 3, "three")]
    assert [(line.file, line.page) for line in skipped] == [(str(path), 2)]


def test_what_cannot_be_read_is_one_line_and_the_rest_goes_on(tmp_path, pdf_texts):
    good, latin, blank, scan, torn, half = (
        str(tmp_path / name) for name in ("a.txt", "b.txt", "c.md", "d.pdf", "e.pdf", "f.pdf")
    )
    for path, content in (
        (good, b"good"),
        (latin, b"one\nna\xefve"),
        (blank, b" \n\f\n"),
        (scan, b""),
        (torn, b""),
        (half, b""),
    ):
        with open(path, "wb") as file:
            file.write(content)
    pdf_texts[scan] = PdfText(["", " \n"], {}, None, set())
    pdf_texts[torn] = PdfText([], {}, "is damaged (PdfStreamError: x)", set())
    pdf_texts[half] = PdfText(["", ""], {1: "cannot be read"}, None, set())
    expected = [
        (latin, None, (2, "UTF-8", "0xef")),
        (blank, None, ("no", "text")),
        (scan, None, (2, "pages", "text", "OCR")),
        (torn, None, ("is damaged (PdfStreamError: x)",)),
        (half, 1, ("cannot be read",)),
        (half, 2, ("no", "text")),
    ]
    paths = [latin, blank, scan, torn, half]
    pages, skipped = read_documents([*paths, good])
    assert pages == [Page(good, 1, "good")]
    for line, (file, number, facts) in zip(skipped, expected, strict=True):
        assert (line.file, line.page) == (file, number)
        assert names(line.reason, *facts)
    with pytest.raises(ValueError, match=naming("no", "page", "text")) as error:
        read_documents(paths)
    first, *others = str(error.value).split("\n")
    assert names(first, *paths)
    assert others == [f"  {line}" for line in skipped]


def test_a_text_file_that_vanishes_is_skipped(tmp_path, monkeypatch):
    good, gone = tmp_path / "a.txt", tmp_path / "b.txt"
    good.write_text("good")
    gone.symlink_to(good)
    gone.unlink()
    (tmp_path / "b.txt").mkdir()
    monkeypatch.setattr(documents, "_find_files", lambda paths: ([str(good), str(gone)], []))
    (line,) = read_documents([])[1]
    assert (line.file, line.page) == (str(gone), None)
    assert names(line.reason, os.strerror(errno.EISDIR))


@pytest.mark.parametrize(
    ("name", "facts"),
    [("absent.pdf", ("no", "file", "folder")), ("a.docx", ("folder", "file", ".pdf", ".txt"))],
)
def test_a_wrong_path_is_an_error_before_work_starts(tmp_path, pdf_texts, name, facts):
    (tmp_path / "a.docx").touch()
    (tmp_path / "a.pdf").touch()
    with pytest.raises(ValueError, match=naming(tmp_path / name, *facts)):
        read_documents([tmp_path / "a.pdf", tmp_path / name])
    assert pdf_texts["calls"] == []


def test_nothing_to_read_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=naming("no", "page", "text", "empty")):
        read_documents([])
    (tmp_path / "a.docx").touch()
    with pytest.raises(ValueError, match=naming(tmp_path, tmp_path, "text", 1, "types", ".docx", 1)):
        read_documents([tmp_path])


# Headers and footers.


def report(pages: list[str], file: str = "a.pdf") -> list[Page]:
    return [Page(file, number, text) for number, text in enumerate(pages, start=1)]


def body(number: int, lines: int = 4) -> list[str]:
    """Lines that occur nowhere else."""
    return [f"{'abcdefghijklmnopqrstuvwxyz'[number]}{'vwxyz'[line]} body" for line in range(lines)]


def test_headers_and_footers_are_dropped_and_counted():
    bodies = ["\n".join(body(i)) for i in range(10)]
    pages = report([f"Table of  Contents\nAnnual Report 2021\n{text}\nPage {i + 5}" for i, text in enumerate(bodies)])
    found, dropped = drop_repeated_lines(pages)
    assert found == report([f"Table of  Contents\nAnnual Report 2021\n{bodies[0]}", *bodies[1:]])
    assert dropped == {"Page #": 10, "Table of  Contents": 9, "Annual Report #": 9}


@pytest.mark.parametrize(
    "line",
    [
        lambda i: f"Total $ {i * i * 7 + 13} $ {i * 31 % 17 + 100}",  # a row whose numbers do not rise with the page
        lambda i: str(i * i * 7 + 13),  # digits alone that do not
        lambda i: "2021",  # nor does a year that stays
        lambda i: "Notes" if i < 2 else f"{body(i)[0]} end",  # on two pages
        lambda i: f"{body(i)[0]} end" if i % 6 else "Risk Factors",  # on two of ten pages
    ],
)
@pytest.mark.parametrize("at_top", [False, True])
def test_what_only_looks_repeated_stays(line, at_top):
    pages = report(["\n".join([line(i), *body(i)] if at_top else [*body(i), line(i)]) for i in range(10)])
    assert drop_repeated_lines(pages) == (pages, {})


def test_a_repeated_line_counts_at_the_edges_alone():
    """Three lines at each end, blank ones aside, and at the same end."""
    lines = [[*body(i)[:3], "repeated", *"xyz"[:0], *body(i + 10)[:3]] for i in range(5)]
    pages = report(["\n".join(page) for page in lines])
    assert drop_repeated_lines(pages) == (pages, {})
    pages = report(["\n\n".join([*page[1:4], *page[:1], *page[4:]]) for page in lines])
    assert drop_repeated_lines(pages)[1] == {"repeated": 4}
    mixed = report(["\n".join(["repeated", *body(i)] if i % 2 else [*body(i), "repeated"]) for i in range(4)])
    assert drop_repeated_lines(mixed) == (mixed, {})


def test_the_share_of_pages_that_a_title_needs_and_a_page_number_does_not():
    titled = report(
        ["\n".join([*(["Title"] if i < 4 else []), *body(i), *([f"- {i} -"] if 9 < i < 13 else [])]) for i in range(20)]
    )
    assert drop_repeated_lines(titled)[1] == {"Title": 3, "- # -": 3}
    rarer = [page._replace(text=page.text.removeprefix("Title\n")) if page.number == 4 else page for page in titled]
    assert drop_repeated_lines(rarer)[1] == {"- # -": 3}
    assert drop_repeated_lines([page for page in rarer if page.number != 12]) == (
        [page for page in rarer if page.number != 12],
        {},
    )


def test_page_numbers_that_begin_anew_and_files_of_their_own():
    numbers = [1, 2, 3, 1, 2, 3, 77]
    pages = report(["\n".join([*body(i), str(number)]) for i, number in enumerate(numbers)])
    other = report(["\n".join([*body(i + 10), str(i + 1)]) for i in range(2)], "b.pdf")
    found, dropped = drop_repeated_lines([*pages, *other])
    assert dropped == {"#": 6}
    assert found[6:] == [pages[6], *other]
    assert found[5].text == "\n".join(body(5))


def test_a_page_with_nothing_else_is_left_out():
    pages = report(["4", "a\n5", "\n".join([*body(1), "6"])])  # on a short page both ends are the same lines
    assert drop_repeated_lines(pages) == ([Page("a.pdf", 2, "a"), Page("a.pdf", 3, "\n".join(body(1)))], {"#": 3})
    assert drop_repeated_lines([]) == ([], {})


# The filings.

FILINGS = {"lyft_2021.pdf": 238, "uber_2021.pdf": 307}


@pytest.fixture(scope="module")
def filings(shared_data) -> dict[str, PdfText]:
    """The two filings as `read_pdfs` gives them: 545 pages."""
    paths = [str(shared_data / "pdf" / name) for name in FILINGS]
    return dict(zip(paths, read_pdfs(paths), strict=True))


@pytest.fixture(scope="module")
def filing_documents(filings) -> tuple[list[Page], list[Skipped]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "read_pdfs", lambda paths, *, processes: [filings[path] for path in paths])
        return read_documents(list(filings))


@pytest.fixture(scope="module")
def filing_chunks(filing_documents, count_tokens):
    pages, _ = drop_repeated_lines(filing_documents[0])
    return pages, chunk_pages(pages, count_tokens=count_tokens, size=254, overlap=32)


@pytest.fixture(scope="module")
def count_tokens(minilm):
    return minilm.tokenizer.count


def characters(text: str) -> str:
    """All non-blank characters, with ligatures spelt out and hyphens left out."""
    spelt = "".join(unicodedata.normalize("NFKC", c) if "\ufb00" <= c <= "\ufb06" else c for c in text)
    return "".join(spelt.split()).replace("-", "").replace("\u00ad", "")


def test_every_page_of_the_filings_is_accounted_for(filings, filing_documents):
    pages, skipped = filing_documents
    lyft = next(iter(filings))
    assert [(line.file, line.page) for line in skipped] == [(lyft, 167)]  # an empty one
    assert [len(text.pages) for text in filings.values()] == list(FILINGS.values())
    expected = [
        (path, number)
        for path, text in filings.items()
        for number in range(1, len(text.pages) + 1)
        if (path, number) != (lyft, 167)
    ]
    assert [page[:2] for page in pages] == expected
    for page in pages:
        raw = filings[page.file].pages[page.number - 1]
        assert characters(page.text) == characters(raw), page[:2]
        removed = len("".join(raw.split())) - len("".join(page.text.split()))
        assert 0 <= removed <= len(re.findall(r"\w-\s*\n", raw)), page[:2]


def page_of(found: tuple[list[Page], list[Skipped]], name: str, number: int) -> list[str]:
    return next(page.text for page in found[0] if page.file.endswith(name) and page.number == number).split("\n")


def test_paragraphs_headings_bullets_and_rows_of_the_filings(filing_documents):
    lyft60 = page_of(filing_documents, "lyft_2021.pdf", 60)
    assert lyft60[1:3] == [
        "Insurance Reserves",
        next(line for line in lyft60 if line.startswith("We utilize both")),
    ]
    assert lyft60[2].endswith("appropriateness with claims reserve valuations.")
    assert lyft60[-1] == "60"
    lyft3 = page_of(filing_documents, "lyft_2021.pdf", 3)
    assert (
        "• our expectations regarding new and evolving markets and our efforts to address these markets, including "
        "Lyft Autonomous, Light Vehicles, Driver Centers and Lyft Mobile Services, Flexdrive, Express Drive, "
        "and Lyft Rentals;"
    ) in lyft3
    lyft80 = page_of(filing_documents, "lyft_2021.pdf", 80)
    assert lyft80[3:6] == [
        "2021 2020 2019",
        "Net loss $ (1,009,359) $ (1,752,857) $ (2,602,241)",
        "Other comprehensive income (loss)",
    ]
    assert lyft80[-1] == "80"
    # Set solid: the font is as high as the lines are apart, which pypdf alone takes for one line.
    lyft224 = page_of(filing_documents, "lyft_2021.pdf", 224)
    assert lyft224[1].startswith(
        "9.5 Consultant agrees that, if the Company is unable because of Consultant’s unavailability, dissolution, "
        "mental or physical incapacity, or for any other reason, to secure Consultant’s signature for the purpose of "
        "applying for or pursuing any application for any United States"
    )
    # A footnote mark, a little higher than its row, stays in it.
    assert any(line.startswith("All Other (1) (461) (11)") for line in page_of(filing_documents, "uber_2021.pdf", 61))
    uber90 = "\n".join(page_of(filing_documents, "uber_2021.pdf", 90))
    assert "to connect Drivers and Merchants with end-users to facilitate" in uber90
    assert "provide them to end-users. As part" in uber90


def test_page_numbers_of_the_filings_are_dropped_and_nothing_else(filing_documents):
    kept, dropped = drop_repeated_lines(filing_documents[0])
    assert dropped == {"#": 443, "-#-": 12}  # page 133, read plainly, has its number at the end of a line
    assert len(kept) == 543  # one page has its number alone
    before = {page[:2]: page.text.split("\n") for page in filing_documents[0]}
    for page in kept:
        gone = Counter(before[page[:2]]) - Counter(page.text.split("\n"))
        assert gone.total() <= 1
        assert all(re.fullmatch(r"-?\d+-?", line) for line in gone)


def test_sentences_cover_the_filings(filing_documents):
    num_sentences = 0
    for page in filing_documents[0]:
        spans = sentence_spans(page.text)
        num_sentences += len(spans)
        assert "".join("".join(page.text[slice(*span)].split()) for span in spans) == "".join(page.text.split())
        assert all(before[1] <= after[0] for before, after in pairwise(spans))
    assert 12_000 < num_sentences < 15_000


def test_chunks_of_the_filings(filing_chunks, count_tokens):
    pages, chunks = filing_chunks
    texts = [chunk.text for chunk in chunks]
    assert count_tokens(texts) == [chunk.num_tokens for chunk in chunks]
    assert max(chunk.num_tokens for chunk in chunks) <= 254
    assert len({chunk.id for chunk in chunks}) == len(chunks) == len(set(texts))
    assert sum(chunk.num_tokens < 100 for chunk in chunks) < 0.02 * len(chunks)
    by_page = {page[:2]: page.text for page in pages}
    for chunk in chunks:
        for place in chunk.places:
            around = range(place.first_page, place.last_page + 1)
            joined = "".join("".join(by_page.get((place.file, number), "").split()) for number in around)
            assert "".join(chunk.text.split()) in joined
            if place.first_page < place.last_page:  # provenance is tight
                inner = "".join("".join(by_page.get((place.file, number), "").split()) for number in around[1:])
                assert "".join(chunk.text.split()) not in inner
    # No word is broken: each is one of the pages', or one that runs over the end of a page.
    words = {word for page in pages for word in page.text.split()}
    assert len({word for text in texts for word in text.split()} - words) <= 3
    # No text is lost.
    seen = Counter(word for text in texts for word in text.split())
    assert len(words - seen.keys()) <= 5


@pytest.mark.parametrize("way", [{"train_pages": [(1, 90)]}, {"train_share": 0.8}])
def test_no_validation_text_of_the_filings_is_in_training(filing_chunks, way):
    pages, chunks = filing_chunks
    sides = split_chunks(chunks, **way)
    held_out = set().union(*(shingles(chunk.text) for chunk in sides[1]))
    for chunk in sides[0]:
        own = shingles(chunk.text)
        assert len(own & held_out) <= 0.5 * len(own)
    # A sentence that occurs once in the filings is on one side only.
    train, validation = (
        {"".join(chunk.text[slice(*span)].split()) for chunk in side for span in sentence_spans(chunk.text)}
        for side in sides
    )
    whole = "".join("".join(page.text.split()) for page in pages)
    assert [sentence for sentence in train & validation if whole.count(sentence) < 2] == []


def test_what_is_no_regular_file_is_left_out(tmp_path):
    (tmp_path / "good.txt").write_text("Some words.")
    os.mkfifo(tmp_path / "pipe.txt")
    os.mkfifo(tmp_path / "pipe.pdf")
    pages, skipped = read_documents([tmp_path])
    assert [page.text for page in pages] == ["Some words."]
    assert {line.file for line in skipped} == {str(tmp_path / name) for name in ("pipe.txt", "pipe.pdf")}
    assert all(names(line.reason, "regular", "file") for line in skipped)
    with pytest.raises(ValueError, match=naming(tmp_path / "pipe.txt", "folder", "file", ".txt")):
        read_documents([tmp_path / "pipe.txt"])


def test_a_name_that_is_no_utf8_is_escaped(tmp_path):
    name = os.path.join(os.fsencode(tmp_path), b"r\xe9sum\xe9.txt")
    try:
        with open(name, "wb") as file:
            file.write(b"Words.")
    except OSError:
        pytest.skip("this file system takes UTF-8 names alone")
    ((page,), _) = read_documents([tmp_path])
    assert page.file == str(tmp_path / r"r\xe9sum\xe9.txt")
    ((again,), _) = read_documents([os.fsdecode(name)])
    assert again == page


@pytest.mark.parametrize(
    "lines",
    [
        ["磨坊建于一八二〇年并且从那时起一直", "属于镇上。"],
        ["製粉所は町のものですが、", "誰も働きません。"],
        ["磨坊从那时起一直属于镇上并且大约于2017", "年卖出。"],
        ["磨坊从那时起一直属于镇上并且大约于年底", "A股上市。"],
    ],
)
def test_wrapped_chinese_and_japanese_lines_join_without_a_blank(lines):
    assert clean_layout(["\n".join([lines[0], *lines])])[0] == lines[0] + "".join(lines)


def test_one_header_per_form_stays():
    """Headers whose numbers differ otherwise than by the page are of two kinds, and the first of each stays."""
    forms = [f"Form 1099-{3 if i < 4 else 7}" for i in range(8)]
    pages = report(["\n".join([forms[i], *body(i)]) for i in range(8)])
    found, dropped = drop_repeated_lines(pages)
    assert [page.text.split("\n")[0] for page in found if "Form" in page.text] == ["Form 1099-3", "Form 1099-7"]
    assert dropped == {"Form #-#": 6}


# Markdown.

CODE = "```sh\n# not a heading\nmill --start\n\nmill --stop\n```"


def test_sections_begin_at_headings_and_know_those_above():
    page = (
        f"Before.\n\n# Mill #\n\nIt grinds.\n\n## Use\n{CODE}\n\nOwner\n-----\nThe town.\n\n# Bakery\n### Hours\nSix."
    )
    (sections,) = split_sections([page])
    assert sections == [
        ("Before.", ()),
        ("# Mill #\n\nIt grinds.", ("Mill",)),
        (f"## Use\n{CODE}", ("Mill", "Use")),
        ("Owner\n-----\nThe town.", ("Mill", "Owner")),
        ("# Bakery\n### Hours\nSix.", ("Bakery", "Hours")),  # a heading without text of its own
    ]
    assert split_sections(["# A\nx", "y"]) == [[("# A\nx", ("A",))], [("y", ("A",))]]


@pytest.mark.parametrize(
    "title", ["Mill", "**Mill** and bakery", "*Mill*", "-5 degrees", "#1 of mills", "`mill`", "1820"]
)
@pytest.mark.parametrize(("underline", "level"), [("=", 1), ("===", 1), ("--", 2), ("   -----  ", 2)])
def test_underlined_lines_are_headings(title, underline, level):
    (sections,) = split_sections([f"# Town\n\nText.\n\n{title}\n{underline}\nMore."])
    above = () if level == 1 else ("Town",)
    assert sections[1] == (f"{title}\n{underline}\nMore.", (*above, title))


@pytest.mark.parametrize(
    "text",
    [
        *("#hashtag", "####### seven", "    # code", "| a |\n|---|", "- item\n---", "a\nb\n---", "~~~\n# x"),
        *(
            "* item\n---",
            "+ item\n---",
            "1. item\n---",
            "> quote\n---",
            "***\n---",
            "- - -\n---",
            "___\n---",
            "    code\n===",
        ),
        "---\ntitle: front matter\n---",
    ],
)
def test_what_is_no_heading(text):
    assert split_sections([text]) == [[(text, ())]]


@pytest.mark.parametrize(
    ("text", "stripped"),
    [
        ('<p align="center">The <b>mill</b></p>', " The mill "),
        ("a<!-- hidden\n\n# no --> b", "a b"),
        ("<style>p { }</style>a<br/>b", "a b"),
        ("Fish &amp; chips &lt;3", "Fish & chips <3"),
        ("`<b>` and <size> and 1 < 2 > 0", "`<b>` and <size> and 1 < 2 > 0"),
        ("```html\n<b>kept</b>\n```\n<i>gone</i>", "```html\n<b>kept</b>\n```\ngone"),
        ("<i>gone</i>\n\n    <b>`kept</b>\n\n\t&amp;\n<i>gone</i> &lt;", "gone\n\n    <b>`kept</b>\n\n\t&amp;\ngone <"),
        ("- item\n\n    <i>gone</i>\n\n    &lt;", "- item\n\n    gone\n\n    <"),
        ('<h2 align="center">The\n<i>mill</i></h2>text', "\n## The mill\ntext"),
        ("<H1>A</h1\n> `<h2>b</h2>` <h3>no end", "\n# A\n `<h2>b</h2>`  no end"),
    ],
)
def test_html_goes_and_code_stays(text, stripped):
    assert strip_html(text) == stripped


def test_headings_in_html_are_headings():
    sections = split_sections(["<h1>Mill</h1>\none\n<h2>Use &amp; care</h2>\n\ntwo"])[0]
    assert [headings for _, headings in sections if headings] == [("Mill",), ("Mill", "Use & care")]


@pytest.mark.parametrize("name", ["a.pdf", "a.md", "a.txt"])
def test_a_git_lfs_pointer_is_named(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 908\n")
    (tmp_path / "good.txt").write_text("Words.")
    _, (skipped,) = read_documents([tmp_path])
    assert names(skipped.reason, "LFS", "`git lfs pull`")
    assert name not in skipped.reason  # `file` says it


def test_chunks_of_markdown(tmp_path):
    (tmp_path / "a.md").write_text(f"# Mill\nOne two three. Four five six.\n## Use\n{CODE}\nSeven eight.\n")
    pages = read_documents([tmp_path / "a.md"])[0]

    def cut(**options):
        return chunk_pages(pages, count_tokens=lambda texts: [len(text.split()) for text in texts], **options)

    assert [(chunk.text, chunk.headings) for chunk in cut(size=11)] == [
        ("# Mill\nOne two three. Four five six.", ("Mill",)),
        ("## Use", ("Mill", "Use")),  # the code has 10 words
        (CODE, ("Mill", "Use")),
        ("Seven eight.", ("Mill", "Use")),
    ]
    whole = cut(size=14, headings_in_text=True)
    assert all(chunk.text.startswith(" > ".join(chunk.headings) + "\n") for chunk in whole)
    assert all(chunk.num_tokens == len(chunk.text.split()) <= 14 for chunk in whole)
    assert any(CODE in chunk.text for chunk in cut(size=14))
    with pytest.raises(ValueError, match=naming("size", 3, "headings", "'Mill > Use'", 3)):
        cut(size=3, headings_in_text=True)


INDENTED = "    for mill in mills:\n        mill.start()\n\n    print('Done. Go.')"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (f"Text.\n\n{INDENTED}\nText.", [INDENTED]),
        (f"{INDENTED}\n\nText.\n\n\tmake\n\n\tmake all\n", [INDENTED, "\tmake\n\n\tmake all"]),
        (f"- item\n\nText.\n\n{INDENTED}", [INDENTED]),
        (f"{CODE}\n\n{INDENTED}\n{CODE}", [CODE, INDENTED, CODE]),
        (f"Text goes on\n{INDENTED[:22]}\nas a paragraph.", []),
        *((f"{item} item\n\n    It goes on. More.\n\n    And more.", []) for item in ("-", "12.", "3)")),
        (
            f"- item\ngoes on\n\n    {CODE[:5]}\n    a\n    ```\n\n    Then this. And that.",
            ["    ```sh\n    a\n    ```"],
        ),
        ("Text.\n\n   three blanks\n\n    \n", []),
    ],
)
def test_code_blocks_are_found(text, code):
    blocks = documents.find_blocks(text)
    assert [text[start:stop] for start, stop, is_code in blocks if is_code] == code
    assert "\n".join(text[start:stop] for start, stop, _ in blocks) == text
    fenced = [block for block in code if "```" in block]
    assert [
        text[start:stop] for start, stop, is_code in documents.find_blocks(text, indented=False) if is_code
    ] == fenced


def test_indented_code_stays_whole_in_markdown_alone(tmp_path):
    """Text files indent their paragraphs, too."""

    def cut(name: str) -> list[str]:
        (tmp_path / name).write_text(f"Start the mills. Do it so:\n\n{INDENTED}\n\nThat is all.\n")
        pages = read_documents([tmp_path / name])[0]
        chunks = chunk_pages(pages, count_tokens=lambda texts: [len(text.split()) for text in texts], size=10)
        return [chunk.text for chunk in chunks]

    assert cut("a.md") == ["Start the mills. Do it so:", f"{INDENTED}\n\nThat is all."]
    first, *others = INDENTED.partition("\n")
    assert cut("a.txt") == [f"Start the mills. Do it so:\n\n{first}", "".join(others).lstrip() + "\n\nThat is all."]


def test_a_code_block_that_is_too_long_breaks_between_lines():
    text = "```\n" + "\n".join(f"line {i} of code" for i in range(9)) + "\n```"
    chunks = chunk_pages([Page("a.md", 1, text, ())], count_tokens=lambda ts: [len(t.split()) for t in ts], size=10)
    assert "\n".join(chunk.text for chunk in chunks) == text
