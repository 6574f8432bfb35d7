"""pdf.py: all pages of generated PDFs, and one line for each damaged page, whatever it does to the reading process."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pypdf
import pytest
from naming import names, naming
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

from embedft.corpus import pdf, pdf_page
from embedft.corpus.documents import read_documents
from embedft.corpus.pdf import BLOCK_PAGES, PdfText, read_pdfs
from embedft.progress import progress_bar as make_bar

FONT = "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"


def pdf_bytes(pages: list[str | None], *, more: str = "", trailer: str = "") -> bytes:
    """A PDF with a page per text, line by line; None: a page with only a drawing."""
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(pages)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        FONT,
    ]
    for i, text in enumerate(pages):
        lines = [] if text is None else text.split("\n")
        content = " ".join(f"BT /F1 10 Tf 1 0 0 1 72 {760 - 12 * n} Tm ({line}) Tj ET" for n, line in enumerate(lines))
        content = content if text is not None else "0 0 100 100 re f"
        resources = f"/Resources << /Font << /F1 3 0 R >> {more} >>"
        box = "/MediaBox [0 0 612 792]"
        objects.append(f"<< /Type /Page /Parent 2 0 R {box} {resources} /Contents {5 + 2 * i} 0 R >>")
        objects.append(f"<< /Length {len(content)} >>\nstream\n{content}\nendstream")
    out, places = b"%PDF-1.7\n", []
    for number, body in enumerate(objects, start=1):
        places.append(len(out))
        out += f"{number} 0 obj\n{body}\nendobj\n".encode()
    table = "".join(f"{place:010d} 00000 n \n" for place in places)
    end = f"xref\n0 {len(places) + 1}\n0000000000 65535 f \n{table}trailer\n"
    end += f"<< /Size {len(places) + 1} /Root 1 0 R {trailer} >>\nstartxref\n{len(out)}\n%%EOF\n"
    return out + end.encode()


@pytest.fixture
def make(tmp_path):
    """(name, bytes) -> the file's path."""

    def write(name: str, content: bytes) -> str:
        tmp_path.joinpath(name).write_bytes(content)
        return str(tmp_path / name)

    return write


@pytest.fixture
def started(monkeypatch) -> list[subprocess.Popen]:
    """The processes that reading starts."""
    processes = []

    class Popen(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            processes.append(self)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    return processes


@pytest.fixture
def faulty(monkeypatch, tmp_path):
    """Reads with a pypdf in which `code` runs before the layout of each page, with `text` its content stream."""

    def patch(code: str) -> None:
        script = tmp_path / "faulty.py"
        lines = code.replace("\n", "\n    ")
        script.write_text(
            "import os, runpy, sys, time, pypdf\n"
            "extract = pypdf.PageObject.extract_text\n"
            "def extract_text(self, **options):\n"
            f"    text = self.get_contents().get_data().decode()\n    {lines}\n"
            "    return extract(self, **options)\n"
            "pypdf.PageObject.extract_text = extract_text\n"
            f"runpy.run_path({pdf.SCRIPT[1]!r}, run_name='__main__')\n"
        )
        monkeypatch.setattr(pdf, "SCRIPT", [sys.executable, str(script)])

    return patch


def stripped(text: PdfText) -> list[str]:
    return [page.strip() for page in text.pages]


def test_every_page_of_every_file_in_order(make, started):
    texts = [
        [f"file {f} page {p}" for p in range(1, n + 1)] for f, n in enumerate((1, BLOCK_PAGES, 2 * BLOCK_PAGES + 1))
    ]
    paths = [make(f"{i}.pdf", pdf_bytes(pages)) for i, pages in enumerate(texts)]
    found = read_pdfs(paths, processes=2)
    assert [stripped(text) for text in found] == texts
    assert all(text.failures == {} and text.reason is None for text in found)
    assert 1 <= len(started) <= 2
    assert all(process.poll() is not None for process in started)
    assert all(process.stdin.closed and process.stdout.closed for process in started)


def test_few_pages_start_one_process_and_none_starts_none(make, started):
    assert read_pdfs([]) == []
    assert started == []
    read_pdfs([make("a.pdf", pdf_bytes(["a"] * BLOCK_PAGES))], processes=4)
    assert len(started) == 1


def test_as_many_processes_as_cores_unless_told(make, started, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    paths = [make(f"{i}.pdf", pdf_bytes([f"text {i}"])) for i in range(3)]
    assert [stripped(text) for text in read_pdfs(paths)] == [["text 0"], ["text 1"], ["text 2"]]
    assert len(started) == 1


@pytest.mark.parametrize("processes", [0, -1])
def test_a_number_of_processes_is_at_least_one(make, processes):
    with pytest.raises(ValueError, match=naming("processes", processes, 1)):
        read_pdfs([make("a.pdf", pdf_bytes(["a"]))], processes=processes)


def test_layout_shows_indentation_gaps_and_paragraphs(make):
    content = pdf_bytes(["x"]).replace(
        b"(x) Tj ET",
        b"(Left) Tj ET BT /F1 10 Tf 1 0 0 1 300 760 Tm (right) Tj ET BT /F1 10 Tf 1 0 0 1 100 700 Tm (low) Tj ET",
    )
    (text,) = read_pdfs([make("a.pdf", content)])
    first, *gap, last = text.pages[0].split("\n")
    assert first.startswith("Left      ")
    assert first.endswith("right")
    assert gap
    assert not "".join(gap).strip()
    assert last.lstrip() == "low" != last


def test_a_page_without_text_is_empty(make):
    (text,) = read_pdfs([make("a.pdf", pdf_bytes(["one", None, "three"]))])
    assert stripped(text) == ["one", "", "three"]
    assert text.failures == {}


def test_text_in_forms_is_found_which_the_layout_mode_passes_over(make, tmp_path):
    writer = pypdf.PdfWriter(clone_from=make("a.pdf", pdf_bytes(["outside"])))
    form = DecodedStreamObject()
    form.set_data(b"BT /F1 10 Tf 1 0 0 1 72 500 Tm (inside a form) Tj ET")
    resources = writer.pages[0]["/Resources"]
    form.update({NameObject("/Type"): NameObject("/XObject"), NameObject("/Subtype"): NameObject("/Form")})
    form[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): resources["/Font"]})
    resources[NameObject("/XObject")] = DictionaryObject({NameObject("/X"): writer._add_object(form)})
    content = writer.pages[0].get_contents()
    content.set_data(content.get_data() + b" /X Do")
    writer.pages[0][NameObject("/Contents")] = writer._add_object(content)
    writer.write(tmp_path / "b.pdf")
    (text,) = read_pdfs([tmp_path / "b.pdf"])
    assert "outside" in text.pages[0]
    assert "inside a form" in text.pages[0]


def encrypted(source: str, target: str, password: str) -> str:
    writer = pypdf.PdfWriter(clone_from=source)
    writer.encrypt(password, owner_password="owner", algorithm="RC4-128")
    writer.write(target)
    return target


AES = (
    "/Encrypt << /Filter /Standard /V 5 /R 6 /Length 256 /P -4 /CF << /StdCF << /CFM /AESV3 /AuthEvent /DocOpen "
    f"/Length 32 >> >> /StmF /StdCF /StrF /StdCF /O <{'00' * 48}> /U <{'00' * 48}> /OE <{'00' * 32}> "
    f"/UE <{'00' * 32}> /Perms <{'00' * 16}> >> /ID [<00> <00>]"
)


def test_a_line_for_each_file_that_cannot_be_read_and_the_rest_goes_on(make, tmp_path):
    good = make("good.pdf", pdf_bytes(["good"]))
    whole = pdf_bytes(["some text"] * 3)
    cases = {
        make("empty.pdf", b""): ("empty", 0),
        make("page.pdf", b"<html><body>"): ("PDF", b"<html><body>"),
        make("noise.pdf", bytes(range(255, 0, -1))): ("PDF", bytes(range(255, 243, -1))),
        make("cut.pdf", whole[: len(whole) // 2]): ("damaged", "PdfStreamError"),
        make("head.pdf", b"%PDF-1.7\n" + bytes(range(256)) * 10): ("damaged", "PdfStreamError"),
        make("none.pdf", pdf_bytes([])): ("no", "pages"),
        make("aes.pdf", pdf_bytes(["secret"], trailer=AES)): ("encrypted", "AES", "`cryptography`"),
        encrypted(good, str(tmp_path / "secret.pdf"), "word"): ("encrypted", "password"),
        str(tmp_path / "absent.pdf"): ("read", os.strerror(errno.ENOENT)),
    }
    found = read_pdfs([good, *cases, good], processes=2)
    assert stripped(found[0]) == stripped(found[-1]) == ["good"]
    for text, facts in zip(found[1:-1], cases.values(), strict=True):
        assert text.pages == []
        assert names(text.reason, *facts), text.reason
        assert "\n" not in text.reason


def test_an_empty_password_opens(make, tmp_path):
    (text,) = read_pdfs([encrypted(make("a.pdf", pdf_bytes(["open"])), str(tmp_path / "b.pdf"), "")])
    assert stripped(text) == ["open"]


def test_pypdf_says_nothing_on_stderr(make, capfd):
    odd = pdf_bytes(["text"]).replace(b"startxref\n", b"startxref\n9")  # "incorrect startxref pointer"
    (text,) = read_pdfs([make("a.pdf", odd)])
    assert stripped(text) == ["text"]
    assert capfd.readouterr() == ("", "")


def test_half_of_a_surrogate_pair_comes_through(make, faulty):
    faulty("return '\\ud83d'")
    assert read_pdfs([make("a.pdf", pdf_bytes(["a"]))])[0].pages == ["\ud83d"]


def test_where_the_layout_mode_fails_the_plain_mode_is_asked(make, faulty):
    faulty("if options and 'odd' in text: raise ZeroDivisionError('width')")
    (text,) = read_pdfs([make("a.pdf", pdf_bytes(["odd", "even"]))])
    assert stripped(text) == ["odd", "even"]


@pytest.mark.parametrize(
    ("code", "facts"),
    [
        ("raise KeyError('/Font\\n' * 99)", ("read", "KeyError", "'/Font")),
        ("raise pypdf.errors.PdfReadError('odd')", ("read", "PdfReadError", "odd")),
        ("raise RecursionError", ("read", "RecursionError")),
        ("raise type('Odd', (Exception,), {})", ("process", "status", 1)),
        ("os._exit(7)", ("process", "status", 7)),
        ("os.kill(os.getpid(), 9)", ("process", "signal", 9)),
    ],
)
def test_a_page_that_fails_costs_that_page(make, faulty, code, facts):
    faulty(f"if 'bad' in text: {code}")
    pages = [f"page {i}" for i in range(1, BLOCK_PAGES + 5)]
    bad = (2, 3, BLOCK_PAGES, BLOCK_PAGES + 4)  # the last of a block, the last of all, two in a row
    for number in bad:
        pages[number - 1] = "bad"
    paths = [make("bad.pdf", pdf_bytes(pages)), make("good.pdf", pdf_bytes(["good"]))]
    found, good = read_pdfs(paths, processes=2)
    assert stripped(good) == ["good"]
    assert stripped(found) == ["" if page == "bad" else page for page in pages]
    assert tuple(sorted(found.failures)) == bad
    assert all(names(why, *facts) and len(why) < 250 and "\n" not in why for why in found.failures.values())
    assert found.reason is None


def test_a_file_that_brings_its_reader_down_on_opening(make, monkeypatch):
    monkeypatch.setattr(pdf, "SCRIPT", [sys.executable, "-c", "raise SystemExit(3)"])
    found = read_pdfs([make("a.pdf", b"x"), make("b.pdf", b"x")], processes=1)
    assert found == [PdfText([], {}, found[0].reason, set())] * 2
    assert names(found[0].reason, "process", "status", 3)


def test_a_block_that_brings_its_reader_down_on_opening_loses_its_pages_one_by_one(make, faulty):
    """Once the file has been opened its other blocks stay, even where a new process cannot open it."""
    path = make("a.pdf", pdf_bytes([f"page {i}" for i in range(1, BLOCK_PAGES + 3)]))
    faulty(f"if 'page {BLOCK_PAGES})' in text: os.truncate({path!r}, 0); os._exit(1)")
    (text,) = read_pdfs([path], processes=1)
    assert stripped(text)[: BLOCK_PAGES - 1] == [f"page {i}" for i in range(1, BLOCK_PAGES)]
    assert text.pages[BLOCK_PAGES - 1 :] == [""] * 3
    assert list(text.failures) == [BLOCK_PAGES, BLOCK_PAGES + 1, BLOCK_PAGES + 2]
    assert names(text.failures[BLOCK_PAGES], "process", "status", 1)
    assert all(names(text.failures[BLOCK_PAGES + i], "empty", 0) for i in (1, 2))


def test_the_bar_counts_pages_failed_ones_too(make, faulty, monkeypatch):
    bars = []

    def progress_bar(*arguments, **options):
        bars.append(make_bar(*arguments, **options, show=True))
        return bars[-1]

    monkeypatch.setattr(pdf, "progress_bar", progress_bar)
    faulty("if 'bad' in text: os._exit(1)")
    paths = [make("a.pdf", pdf_bytes(["a", "bad"] * BLOCK_PAGES)), make("b.pdf", pdf_bytes(["b"])), make("c.pdf", b"")]
    read_pdfs(paths, processes=2)
    (bar,) = bars
    assert (bar.n, bar.total, bar.unit) == (2 * BLOCK_PAGES + 1, 2 * BLOCK_PAGES + 1, "page")
    assert bar.disable  # closed


def test_an_interrupt_ends_the_processes(make, faulty, tmp_path):
    faulty(f"open({str(tmp_path / 'pid')!r} + str(os.getpid()), 'w').close(); time.sleep(60)")
    paths = [make(f"{i}.pdf", pdf_bytes(["slow"])) for i in range(8)]
    # A user's script without a `__main__` guard.
    script = f"from embedft.corpus import pdf\npdf.SCRIPT = {pdf.SCRIPT!r}\npdf.read_pdfs({paths!r}, processes=2)\n"
    options = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen([sys.executable, "-c", script], **options)
    deadline = time.monotonic() + 30
    while len(list(tmp_path.glob("pid*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in errors
    readers = [int(path.name[3:]) for path in tmp_path.glob("pid*")]
    assert len(readers) == 2
    for reader in readers:
        with pytest.raises(ProcessLookupError):
            os.kill(reader, 0)


def test_the_file_runs_as_a_script_without_torch(make):
    """What a reading process does, by hand: the rest of embedft is not imported, nor what lies beside the file."""
    path = make("a.pdf", pdf_bytes(["one", "two"]))
    code = f"""
import runpy, sys
sys.argv = {pdf.SCRIPT[1:]!r}
sys.path.insert(0, "beside")
runpy.run_path(sys.argv[0], run_name="__main__")
assert not any(name.startswith(("torch", "embedft", "numpy")) for name in sys.modules)
assert "beside" not in sys.path
"""
    requests = "".join(json.dumps([path, i]) + "\n" for i in (None, 0, 1))
    done = subprocess.run([sys.executable, "-c", code], input=requests, capture_output=True, text=True, check=True)
    head, *pages = [json.loads(line) for line in done.stdout.splitlines()]
    assert head == {"num_pages": 2}
    assert [page["text"].strip() for page in pages] == ["one", "two"]


def test_pypdf_still_has_the_place_that_keeps_lines_apart():
    """A version without it would read solid lines as one, and nothing else would say so."""
    from pypdf import PageObject
    from pypdf._text_extraction import _layout_mode

    runs, group = [], {"font_height": 10.3, "flip_sort": -1, "font_size": 10, "displaced_tx": 60.0}
    groups = [
        group | {"tx": 10.0 * i, "ty": 100.0 - 10 * i, "text": text, "order": i}
        for i, text in enumerate(("first line", "second line"))
    ]
    merge_lines, make_group = _layout_mode.y_coordinate_groups, _layout_mode._fixed_width_page.bt_group
    try:
        assert len(merge_lines(groups)) == 1
        pdf_page.keep_lines_apart(runs)
        assert len(_layout_mode.y_coordinate_groups(groups)) == 2
        assert "y_coordinate_groups" in PageObject._layout_mode_text.__code__.co_names
        assert "bt_group" in _layout_mode._fixed_width_page.recurse_to_target_op.__code__.co_names
    finally:
        _layout_mode.y_coordinate_groups, _layout_mode._fixed_width_page.bt_group = merge_lines, make_group
    assert runs == groups
    assert [group["font_height"] for group in groups] == [10.3, 10.3]


# The order in which a page is read.

HILLS = [
    *(
        "Rain falls on the northern hills for",
        "most of the year, and the rivers that",
        "leave them are short and fast. Mills",
    ),
    *("were built along their banks before", "the railway came, and many of them", "still stand."),
]
BREAD = [
    *(
        "Bread in the southern valleys is made",
        "with chestnut flour, which keeps for",
        "longer than wheat. Families dry the",
    ),
    *("nuts over a slow fire in a hut of two", "floors. The smoke gives the flour its", "taste."),
]


def drawn(*blocks: tuple[list[str], str], rotate: int = 0) -> bytes:
    """One page of blocks of lines, each set by the text matrix given."""
    content = ") Tj T* ET BT /F1 10 Tf 12 TL ".join(
        f"{matrix} Tm ({') Tj T* ('.join(lines)}" for lines, matrix in blocks
    )
    page = pdf_bytes(["x"])
    begin, end = page.index(b"BT /F1 10 Tf"), page.index(b"\nendstream")
    stream = f"BT /F1 10 Tf 12 TL {content}) Tj T* ET".encode()
    # pypdf finds the objects again when the table of their places is wrong.
    page = page[:begin] + stream + page[end:]
    page = page.replace(f"/Length {end - begin}".encode(), f"/Length {len(stream)}".encode())
    return page.replace(b"/Type /Page ", f"/Type /Page /Rotate {rotate} ".encode())


def upright(x: int, y: int) -> str:
    return f"1 0 0 1 {x} {y}"


@pytest.mark.parametrize(
    "content",
    [
        drawn((HILLS, upright(60, 700)), (BREAD, upright(320, 700))),
        drawn((HILLS, upright(60, 700)), (BREAD, upright(320, 694))),  # half a line lower
        drawn((HILLS, upright(60, 700)), (BREAD, upright(320, 700)), (HILLS, upright(60, 500))),
        drawn((HILLS, "0 1 -1 0 100 60"), rotate=90),
        drawn((HILLS, "0 -1 1 0 500 700"), rotate=270),
        drawn((HILLS, "-1 0 0 -1 500 100"), rotate=180),
        drawn((HILLS, "0 1 -1 0 100 60")),
    ],
    ids=["columns", "columns half a line apart", "columns and a block", "90", "270", "180", "sideways"],
)
def test_columns_and_rotated_text_are_read_in_the_order_of_the_file(make, content):
    path = make("a.pdf", content)
    (text,) = read_pdfs([path])
    assert text.plain == {1}
    paragraphs = [" ".join(lines) for lines in (HILLS, BREAD) if lines[0].encode() in content]
    found = read_documents([path])[0][0].text.split("\n")
    assert found[: len(paragraphs)] == paragraphs


def test_the_columns_of_an_index_are_read_one_after_the_other(make):
    """Lines too short for the count of broken lines of prose; page 116 of a German textbook was read across."""
    places = ("Lane", "Street", "Square", "Yard", "Hill", "Dam", "Gate")
    left, right = ([f"{name} {place}, 12" for place in places] for name in ("Mill", "Oven"))
    (text,) = read_pdfs([make("a.pdf", drawn((left, upright(60, 700)), (right, upright(320, 700))))])
    assert text.plain == {1}
    assert text.pages[0].strip().split("\n") == left + right


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (HILLS[:2], BREAD[:1]),  # below a figure
        (["Mill Lane, east", "Oven Street", "Hill Square"], ["Dam Road, west", "Gate Street", "Yard Square"]),
    ],
)
def test_short_columns_are_read_one_after_the_other(make, left, right):
    (text,) = read_pdfs([make("a.pdf", drawn((left, upright(60, 700)), (right, upright(320, 700))))])
    assert text.plain == {1}
    assert text.pages[0].strip().split("\n") == left + right


def test_single_columns_and_tables_keep_their_layout(make):
    rows = (["Rent of offices", "Wages and salaries", "Insurance of vehicles", "All other costs"], upright(60, 500))
    amounts = (["1,000", "2,500", "300", "47"], upright(320, 500))
    (text,) = read_pdfs([make("a.pdf", drawn((HILLS, upright(60, 700)), rows, amounts))])
    assert text.plain == set()
    assert "Wages and salaries 2,500" in [" ".join(line.split()) for line in text.pages[0].split("\n")]


COSTS = ["Rent", "Wages", "Insurance", "Other"], ["1,000 $", "(2,500)", "300", "47"]
BY_COLUMN = "\n".join([*COSTS[0], *COSTS[1]])


@pytest.mark.parametrize(
    ("left", "right", "also", "plain", "is_lost"),
    [
        (*COSTS, ["Costs     2021"], BY_COLUMN, True),
        (*COSTS, ["Rain falls   on hills", "most of   the year"], BY_COLUMN, False),  # beside columns
        (*COSTS, [], "\n".join(map(" ".join, zip(*COSTS, strict=True))), False),  # drawn row by row
        (COSTS[0][:3], COSTS[1][:3], [], BY_COLUMN, False),  # could be a list and its page numbers
        ([f"Mill {i}, 12" for i in range(4)], [f"Oven {i}, 13" for i in range(4)], [], "Mill\nOven", False),  # an index
    ],
)
def test_which_tables_plain_mode_takes_apart(left, right, also, plain, is_lost):
    rows = [f"  {label}     {amount}" for label, amount in zip(left, right, strict=True)]
    assert pdf_page.takes_tables_apart("\n".join([*also, *rows, "", "Prose."]), plain) is is_lost


def cells(*rows: list[str], step: int = 16) -> bytes:
    """A page with a table, drawn cell by cell; a cell's lines stand 10 apart."""
    blocks = [
        ([line], upright(60 + 130 * column, 700 - step * row - 10 * i))
        for row, texts in enumerate(rows)
        for column, text in enumerate(texts)
        for i, line in enumerate(text.split("/"))
    ]
    return drawn(*blocks)


GRANTS = [
    ["5759", "2018 Equity Incentive/Plan", "RSU", "32,999"],
    ["5756", "2018 Equity Incentive/Plan", "RSU", "5,280"],
    ["639", "2008 Option Plan", "NQ/(vested)", "3,230"],
]


def test_the_lines_of_a_cell_are_read_before_the_next_cell(make):
    """Page 227 of Lyft's 10-K: of the rows, no mode kept any with its plan's name."""
    (text,) = read_pdfs([make("a.pdf", cells(*GRANTS, step=24))])
    assert text.plain == set()
    found = [line.split() for line in text.pages[0].split("\n") if line.strip()]
    assert found == [" ".join(row).replace("/", " ").split() for row in GRANTS]
    assert read_documents([make("b.pdf", cells(*GRANTS, step=24))])[0][0].text.count("\n") == 2


@pytest.mark.parametrize(
    ("rows", "step"),
    [
        ([[text.split("/")[0] for text in row] for row in GRANTS], 24),  # no cell wraps
        (GRANTS, 20),  # a line of a cell is as far from the next as from the next row
        ([[*row[:2]] for row in GRANTS], 24),  # could be two columns of prose
        ([["5759", "2018/Equity/Incentive/Plan/of/Lyft", "RSU", "32,999"]], 24),  # could be a column of prose
        ([["Name and/address", "Number of/shares", "Price of/shares"]], 24),  # could be three columns
    ],
)
def test_what_could_be_columns_or_rows_keeps_its_lines(rows, step):
    lines = {}
    order = 0
    for i, row in enumerate(rows):
        for j, text in enumerate(row):
            for n, piece in enumerate(text.split("/")):
                y, x = 700 - step * i - 10 * n, 60 + 130 * j
                run = {"tx": x, "ty": y, "displaced_tx": x + 90, "font_height": 10, "flip_sort": 1, "order": order}
                lines.setdefault(y, []).append(run | {"text": piece})
                order += 1
    lines = {y: lines[y] for y in sorted(lines, reverse=True)}
    assert pdf_page.join_wrapped_cells(lines) is lines


def test_headings_alone_do_not_join_their_lines(make):
    """They hold few of the page's words."""
    heading = ["Grant", "Name of/Plan", "Type", "Shares"]
    rows = [[str(number), "2018 Equity Incentive Plan", "RSU", "32,999"] for number in range(5701, 5729)]
    (text,) = read_pdfs([make("a.pdf", cells(heading, *rows, step=24))])
    assert [line.split() for line in text.pages[0].split("\n") if line.strip()][:2] == [
        ["Grant", "Name", "of", "Type", "Shares"],
        ["Plan"],
    ]


def test_blocks_drawn_one_after_the_other_are_read_so(make):
    """Page 133 of Lyft's 10-K, two blocks of signatures whose lines are too short to count as broken."""
    left = ["LYFT, INC.", "By: Logan Green", "Title: Chief Executive Officer", "Date: 4 May 2021"]
    right = ["ACCEPTED", "By: Elaine Paul", "Title: CFO", "Date: 3 May"]
    blocks = (left, upright(60, 700)), (right, upright(320, 694))
    (text,) = read_pdfs([make("a.pdf", drawn(*blocks, (HILLS, upright(60, 600))))])
    assert text.plain == {1}
    assert [line.strip() for line in text.pages[0].split("\n") if line.strip()] == left + right + HILLS


def test_a_string_begins_where_the_one_before_ends(make):
    """A French report: "p lan", where a string followed another without a move between them."""
    content = "(adoption du ) Tj (p) Tj 60.6 0 Td (lan d) Tj (u ) Tj (r) Tj [(es) 10 (eau)] TJ"
    page = pdf_bytes(["x"]).replace(b"(x) Tj", content.encode())
    (text,) = read_pdfs([make("a.pdf", page)])
    assert " ".join(text.pages[0].split()) == "adoption du plan du reseau"


def words_of(make, content: str) -> str:
    """The words of a page, whose text is 10 high and begins at (72, 760), with `content` instead of a text."""
    (text,) = read_pdfs([make("a.pdf", pdf_bytes(["x"]).replace(b"(x) Tj", content.encode()))])
    assert not text.plain
    return " ".join(text.pages[0].split())


def test_runs_of_a_line_that_do_not_touch_are_apart(make):
    """A story in Spanish: many narrow letters leave the layout no column for the blank of 2.8 before "el"."""
    # 60 letters of 2.22 end at 205.2.
    runs = f"({'l' * 60}) Tj ET BT /F1 10 Tf 1 0 0 1 %s 760 Tm (el) Tj ET BT /F1 10 Tf 72 700 Td ({'W' * 60}) Tj"
    assert words_of(make, runs % 208).startswith("l" * 60 + " el")
    assert words_of(make, runs % 205.5).startswith("l" * 60 + "el")


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ("(is ) Tj 13 4 Td /F1 7 Tf (1) Tj -4 -7.4 Td (DV) Tj", "is 1 DV"),
        ("(is ) Tj 13 4 Td /F1 7 Tf (1) Tj ET BT /F1 7 Tf 81 756.6 Td (DV) Tj", "is 1 DV"),
        ("(g) Tj 5.6 4 Td /F1 7 Tf (-1) Tj 0 -5.4 Td (2) Tj", "g-1 2"),
        ("(g) Tj 5.6 4 Td /F1 7 Tf (-1) Tj 6.2 -5.4 Td (2) Tj", "g-12"),
    ],
)
def test_what_stands_above_and_below_on_a_line_is_not_one_word(make, parts, words):
    """A German textbook: "12" for a half, "g-12" for an inverse with an index below."""
    assert words_of(make, parts) == words


def test_a_brace_taller_than_the_line_leaves_the_line_together(make):
    """TeX's large braces hang from a baseline 8.8 higher, which took "n mit z" to the line above."""
    content = "(Zahlen) Tj ET BT /F1 10 Tf 72 748 Td (Q) Tj ET BT /F1 10 Tf 82 756.5 Td ({) Tj 6 -8.5 Td (n mit z) Tj"
    assert words_of(make, content) == "Zahlen { Q n mit z"


def test_matrices_outside_of_saved_states_move_text(make):
    """TeX's drawings: a label whose matrix is set outside of q and Q stood at the foot of the page."""
    content = "(above) Tj ET BT /F1 10 Tf 72 700 Td (below) Tj ET 1 0 0 1 72 730 cm BT /F1 10 Tf 0 0 Td (label) Tj"
    assert words_of(make, content) == "above label below"


def test_the_gaps_of_a_font_without_a_blank_are_blanks(make):
    """TeX's fonts: pypdf takes half of the mean letter for a blank, here 0.513 of the size, and joined words."""
    widths = " ".join(["1026"] * 26)
    font = FONT.replace(">>", f"/FirstChar 97 /LastChar 122 /Widths [{widths}] >>")
    font = font.replace("Helvetica", "ABCDEF+CMR10")
    page = pdf_bytes(["x"]).replace(FONT.encode(), font.encode())
    page = page.replace(b"(x) Tj", b"[(zw) 28 (ei) -235 (weitere) -235 (dreiecke)] TJ")
    (text,) = read_pdfs([make("a.pdf", page)])
    assert " ".join(text.pages[0].split()) == "zwei weitere dreiecke"


@pytest.mark.parametrize(("dx", "dy"), [(0.3, 0), (0, 0), (-0.2, 0.3)])
def test_text_printed_twice_to_look_bold_is_read_once(make, dx, dy):
    """Also within one text object; a letter that the word has twice stands further away."""
    heading, letters = ["Revenue of the year", "Cost"], [(["l"], upright(72 + i * 2.22, 500)) for i in range(2)]
    again = (heading, upright(72 + dx, 700 + dy))
    (text,) = read_pdfs([make("a.pdf", drawn((heading, upright(72, 700)), again, *letters))])
    assert [line.strip() for line in text.pages[0].split("\n") if line.strip()] == [*heading, "ll"]


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("Plain text, naïve: 10% of §3 (a/b) /s/ John Smith", 0.0),
        ("/g12/g7 /g33", 1.0),
        ("(cid:12)(cid:7)", 1.0),
        ("ab\ufffd\ue000", 0.5),
        ("7KH\x03FR\x03", 2 / 7),
        ("", 0.0),
    ],
)
def test_what_of_a_text_is_unreadable(text, share):
    assert pdf_page.unreadable_share(text) == pytest.approx(share)


def test_a_page_of_glyph_codes_is_named(make):
    path = make("a.pdf", pdf_bytes(["/g12/g7/g33 /g4/g5/g6", "words", "/g1 and many more words than that"]))
    (text,) = read_pdfs([path])
    assert text.failures == {1: pdf_page.UNREADABLE, 3: pdf_page.INCOMPLETE}
    pages, skipped = read_documents([path])
    assert [page.number for page in pages] == [2, 3]
    assert [(line.page, line.reason) for line in skipped] == [(1, pdf_page.UNREADABLE), (3, pdf_page.INCOMPLETE)]


def test_a_page_that_never_finishes_costs_its_time_alone(make, faulty):
    faulty("while 'endless' in text: pass")
    (text,) = read_pdfs([make("a.pdf", pdf_bytes(["one", "endless", "three"]))], page_seconds=3)
    assert stripped(text) == ["one", "", "three"]
    assert list(text.failures) == [2]
    assert names(text.failures[2], 3, "seconds")
