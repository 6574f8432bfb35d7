"""markdown.py: sections by hand, and the chunks made of them."""

import pytest

from embedft.corpus.chunks import chunk_pages
from embedft.corpus.documents import Page, read_documents
from embedft.corpus.markdown import split_sections, strip_html

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
    "text", ["#hashtag", "####### seven", "    # code", "| a |\n|---|", "- item\n---", "a\nb\n---", "~~~\n# x"]
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
    ],
)
def test_html_goes_and_code_stays(text, stripped):
    assert strip_html(text) == stripped


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
    with pytest.raises(ValueError, match="headings 'Mill > Use' have 3 tokens"):
        cut(size=3, headings_in_text=True)


def test_a_code_block_that_is_too_long_breaks_between_lines():
    text = "```\n" + "\n".join(f"line {i} of code" for i in range(9)) + "\n```"
    chunks = chunk_pages([Page("a.md", 1, text, ())], count_tokens=lambda ts: [len(t.split()) for t in ts], size=10)
    assert "\n".join(chunk.text for chunk in chunks) == text
