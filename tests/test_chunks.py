"""chunks.py and splits.py: by hand on texts whose tokens are letters or words, then properties."""

import json
import random
import re

import pytest
from naming import naming

from embedft.corpus.chunks import Chunk, Place, chunk_pages, load_chunks, save_chunks, sentence_spans
from embedft.corpus.documents import Page
from embedft.corpus.splits import near_copies, parse_pages, shingles, split_chunks, words
from embedft.encoders.loading import load_tokenizer


def count_words(texts):
    return [len(text.split()) for text in texts]


def count_characters(texts):
    """Counts spaces too, so the parts have fewer tokens than the whole."""
    return [len(text) for text in texts]


def count_merged(texts):
    """Each text begins with a token of its own, so the parts have more than the whole."""
    return [1 + len(text.split()) for text in texts]


def report(*texts, file="a.txt"):
    """Single letters get an x, because "C. D." would be initials."""
    texts = [re.sub(r"\b[A-Za-z]\b", r"\g<0>x", text) for text in texts]
    return [Page(file, number, text) for number, text in enumerate(texts, start=1)]


def texts_of(chunks):
    """As they were before `report`."""
    return [re.sub(r"\b([A-Za-z])x\b", r"\1", chunk.text) for chunk in chunks]


# Sentences.


@pytest.mark.parametrize(
    "sentences",
    [
        [],
        ["One."],
        ["One.", "Two!", "Three?", "Four"],
        ['He said "no."', "Then he went.", "(See Note 3.)", "“So it is.”", "[Reserved.]", "•Next.", "$5 is due."],
        ["It costs 2.5 million.", "In 2021 it did too.", "2022 comes next."],
        ["What?!", "So...", "Yes."],
        # Lines of the filings.
        ["Lyft, Inc. was founded in 2007.", "We are in the U.S. and Canada."],
        ["The accompanying notes, e.g. Note 3. Revenue, are an integral part."],
        ["Securities registered pursuant to Section 12(b) of the Act: None"],
        ["Washington, D.C. 20549"],
        ["Item 1A. Risk Factors 15"],
        ["ITEM 12. SECURITY OWNERSHIP OF CERTAIN BENEFICIAL OWNERS"],
        ["1. In consideration of the above.", "He signed."],
        ["(b) You may obtain copies.", "A charge may be made."],
        ["Dr. J. Smith of Uber Technologies, Inc. and Ms. Jones met on Jan. 5 at No. 7."],
        ["Vehicle No. 3 vs. No. 4 etc. and the like."],
        ["It ended in the year 2021.", "We began."],
        ["We grew, see part iv. Below it shrank."],
        ["iv. Below it shrank."],
    ],
)
def test_sentences_on_a_line(sentences):
    text = " ".join(sentences)
    assert [text[start:stop] for start, stop in sentence_spans(text)] == sentences


def test_line_ends_end_sentences_and_blanks_belong_to_none():
    text = " \n One line \n\n  goes.   Next\t\n\xa0\n"
    assert [text[start:stop] for start, stop in sentence_spans(text)] == ["One line", "goes.", "Next"]
    assert sentence_spans("no end. but lower case") == [(0, 22)]
    assert sentence_spans("1.  Two\n2. Three") == [(0, 7), (8, 16)]


def test_every_character_is_in_one_sentence():
    generator = random.Random(0)
    for _ in range(300):
        text = "".join(
            generator.choice(["a", "B", "1", ".", "! ", "? ", " ", "\n", "”", "U.S. ", "Inc. "]) for _ in range(40)
        )
        spans = sentence_spans(text)
        assert "".join("".join(text[slice(*span)].split()) for span in spans) == "".join(text.split())
        assert all(text[slice(*span)] == text[slice(*span)].strip() != "" for span in spans)


# Cutting.


def test_whole_sentences_while_they_fit():
    pages = report("A b c. D e. F g.\nH i j k. L.")
    cut = chunk_pages(pages, count_tokens=count_words, size=5)
    assert texts_of(cut) == ["A b c. D e.", "F g.", "H i j k. L."]
    assert [chunk.num_tokens for chunk in cut] == [5, 2, 5]
    assert texts_of(chunk_pages(pages, count_tokens=count_words, size=7)) == ["A b c. D e. F g.", "H i j k. L."]
    assert texts_of(chunk_pages(pages, count_tokens=count_words, size=99)) == ["A b c. D e. F g.\nH i j k. L."]


def test_consecutive_chunks_share_whole_sentences():
    pages = report("A b. C. D. E f g. H. I.")
    cut = chunk_pages(pages, count_tokens=count_words, size=4, overlap=2)
    # C. D. are two tokens, but E f g. would not fit behind them.
    assert texts_of(cut) == ["A b. C. D.", "D. E f g.", "H. I."]
    cut = chunk_pages(report("A b. C. D. E f. G. H."), count_tokens=count_words, size=4, overlap=2)
    assert texts_of(cut) == ["A b. C. D.", "C. D. E f.", "E f. G. H."]


def test_an_overlap_is_never_the_whole_chunk():
    pages = report("A b. C d e f. G.")
    cut = chunk_pages(pages, count_tokens=count_words, size=5, overlap=4)
    assert texts_of(cut) == ["A b.", "C d e f. G."]
    # Not even where it would fit, by a tokenizer that counts different words alone.
    pages = report("\n".join(" ".join(f"w{(i + shift) % 9}" for i in range(9)) for shift in range(3)))
    cut = chunk_pages(pages, count_tokens=lambda texts: [len(set(text.split())) for text in texts], size=10, overlap=9)
    assert [chunk.text for chunk in cut] == pages[0].text.split("\n")


def test_a_long_sentence_breaks_between_words_and_is_not_shared():
    cut = chunk_pages(report("A b.\nC d e f g h i j.\nK."), count_tokens=count_words, size=3, overlap=1)
    assert texts_of(cut) == ["A b.", "C d e", "f g h", "i j.\nK."]
    cut = chunk_pages(report("A b.\nC d e f g h i j.\nK. L m."), count_tokens=count_words, size=3, overlap=1)
    assert texts_of(cut) == ["A b.", "C d e", "f g h", "i j.\nK.", "K. L m."]


def test_a_word_longer_than_a_chunk_breaks_between_characters():
    cut = chunk_pages(report("ab cdefghijk lm"), count_tokens=count_characters, size=4)
    assert texts_of(cut) == ["ab", "cdef", "ghij", "k lm"]
    with pytest.raises(ValueError, match=naming("size", 1, "character", 2)):
        chunk_pages(report("ab"), count_tokens=lambda texts: [2 * len(text) for text in texts], size=1)


def test_the_count_of_the_very_text_decides():
    # Apart 3 + 3, together 7 with the blank.
    assert texts_of(chunk_pages(report("Ab. Cd. Ef"), count_tokens=count_characters, size=6)) == ["Ab.", "Cd. Ef"]
    assert texts_of(chunk_pages(report("Ab. Cd. Ef"), count_tokens=count_characters, size=7)) == ["Ab. Cd.", "Ef"]
    # Apart 2 + 2 + 2, together 4: there is room for more than the sum says.
    cut = chunk_pages(report("A. B. C. D."), count_tokens=count_merged, size=4)
    assert texts_of(cut) == ["A. B. C.", "D."]
    assert [chunk.num_tokens for chunk in cut] == [4, 2]
    # An overlap is counted as it stands, too: "Bx. Cx." has seven characters, apart six.
    for overlap, second in ((6, "C. D."), (7, "B. C. D.")):
        cut = chunk_pages(report("A. B. C. D."), count_tokens=count_characters, size=11, overlap=overlap)
        assert texts_of(cut) == ["A. B. C.", second]


def test_pages_of_a_file_are_joined():
    pages = report("It runs\non", "over the end. Next.\nHeading", "Other text.", "the well-", "known word")
    (chunk,) = chunk_pages(pages, count_tokens=count_words, size=99)
    assert chunk.text == "It runs\non over the end. Next.\nHeading\nOther text.\nthe well-known word"
    assert chunk.places == (Place("a.txt", 1, 5),)
    prose = "The line of prose that stops within one sentence on Uber"
    (chunk,) = chunk_pages(report(prose, "Eats goes on", "9 rows"), count_tokens=count_words, size=99)
    assert chunk.text == f"{prose} Eats goes on\n9 rows"
    (chunk,) = chunk_pages(report(f"{prose}.", "so it ends", "— no"), count_tokens=count_words, size=99)
    assert chunk.text == f"{prose}.\nso it ends\n— no"


def test_places_are_exact():
    texts = {3: " A b c.\n", 4: " \n", 7: "D e. F."}
    pages = [report(text, file="b.txt")[0]._replace(number=number) for number, text in texts.items()]
    pages += report("G. H.")
    cut = chunk_pages(pages, count_tokens=count_words, size=5, overlap=2)
    assert list(zip(texts_of(cut), (chunk.places for chunk in cut), strict=True)) == [
        ("A b c.\nD e.", (Place("b.txt", 3, 7),)),
        ("D e. F.", (Place("b.txt", 7, 7),)),
        ("G. H.", (Place("a.txt", 1, 1),)),
    ]
    cut = chunk_pages(pages, count_tokens=count_words, size=5, overlap=2, by_page=True)
    assert list(zip(texts_of(cut), (chunk.places for chunk in cut), strict=True)) == [
        ("A b c.", (Place("b.txt", 3, 3),)),
        ("D e. F.", (Place("b.txt", 7, 7),)),
        ("G. H.", (Place("a.txt", 1, 1),)),
    ]
    assert chunk_pages(pages[1:2], count_tokens=count_words, size=5) == []


def test_the_id_is_of_the_text_and_equal_texts_are_one_chunk():
    pages = [*report("Same.", "Other.", "Same."), *report("Same.", file="b.txt")]
    cut = chunk_pages(pages, count_tokens=count_words, size=9, by_page=True)
    # printf 'Same.' | sha256sum
    assert cut[0] == Chunk(SAME_ID, "Same.", 1, (Place("a.txt", 1, 1), Place("a.txt", 3, 3), Place("b.txt", 1, 1)))
    assert len(cut) == 2


SAME_ID = __import__("hashlib").sha256(b"Same.").hexdigest()[:16]


@pytest.mark.parametrize(("size", "overlap"), [(0, 0), (5, 5), (5, -1), (-1, 0)])
def test_a_size_that_makes_no_sense(size, overlap):
    with pytest.raises(ValueError, match=naming("size", size, "overlap", overlap)):
        chunk_pages(report("a"), count_tokens=count_words, size=size, overlap=overlap)


def unique_text(generator, num_words):
    """No letter occurs twice, so that each piece shows its position; short words may end sentences and lines."""
    letters = iter(generator.sample(range(0x4E00, 0x9FA5), 12 * num_words))
    found = []
    for _ in range(num_words):
        word = "".join(chr(next(letters)) for _ in range(generator.choice((1, 2, 3, 12))))
        found.append(word + (generator.choice(("", "", ".", "!", "?", "\n")) if len(word) <= 3 else ""))
    return " ".join(found)


@pytest.mark.parametrize("count", [count_words, count_characters, count_merged])
def test_properties_on_random_texts(count):
    generator = random.Random(1)
    num_shared = 0
    for _ in range(150):
        size = generator.randint(4, 14)
        overlap = generator.randrange(size)
        text = unique_text(generator, 30)
        cut = chunk_pages([Page("a.txt", 1, text)], count_tokens=count, size=size, overlap=overlap)
        assert count([chunk.text for chunk in cut]) == [chunk.num_tokens for chunk in cut]
        assert all(1 <= chunk.num_tokens <= size and chunk.text == chunk.text.strip() for chunk in cut)
        joined = text.strip()
        start = end = 0
        for chunk in cut:
            place = joined.index(chunk.text)
            assert place > start or end == 0
            assert place + len(chunk.text) > end
            if place < end:
                assert count([joined[place:end]])[0] <= overlap
                assert (place, end) != (start, end)
                starts, ends = zip(*sentence_spans(joined), strict=True)
                assert place in starts
                assert end in ends
                num_shared += 1
            assert joined[end:place].strip() == ""
            start, end = place, place + len(chunk.text)
        assert end == len(joined)
    assert num_shared > 50


def test_chunks_are_as_full_as_whole_sentences_allow():
    """Against a naive cutter that counts every candidate."""
    generator = random.Random(3)
    for _ in range(200):
        sentences = [" ".join("x" * generator.randint(1, 3) for _ in range(generator.randint(1, 4))) for _ in range(12)]
        text = "\n".join(f"{sentence}{i}" for i, sentence in enumerate(sentences))
        for count in (count_words, count_characters, count_merged):
            size = generator.randint(18, 30) if count is count_characters else generator.randint(6, 9)
            expected, lines = [], text.split("\n")
            while lines:
                fitting = max(n for n in range(1, len(lines) + 1) if count(["\n".join(lines[:n])])[0] <= size)
                expected.append("\n".join(lines[:fitting]))
                lines = lines[fitting:]
            cut = chunk_pages([Page("a.txt", 1, text)], count_tokens=count, size=size)
            assert [chunk.text for chunk in cut] == expected


# Near-copies.


def test_shingles_are_runs_of_eight_words():
    text = "One two, three four five-six seven eight nine."
    assert words(text) == ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    assert len(shingles(text)) == 2
    assert shingles(text) == shingles(text.upper().replace(",", ";\n"))
    assert len(shingles(text) & shingles("Zero " + text)) == 2
    assert shingles("one two") != shingles("two one")
    assert shingles("one") & shingles("one two") == set()
    assert shingles("— —") == shingles("——") != shingles("…")
    assert len(shingles("")) == 1


def numbered(*ranges):
    return " ".join(f"w{i}" for start, stop in ranges for i in range(start, stop))


def test_more_than_half_is_a_copy():
    twenty, ten = numbered((0, 27)), numbered((0, 17))
    assert (len(shingles(twenty)), len(shingles(ten))) == (20, 10)
    assert near_copies([twenty], [f"{ten} {numbered((90, 120))}"]) == [False]
    assert near_copies([twenty], [f"{numbered((0, 18))} {numbered((90, 120))}"]) == [True]
    # The whole of a short text in a long one, both ways; half of it in two others together.
    long, short = numbered((0, 60)), numbered((50, 60))
    assert near_copies([long, short], [short]) == [True, True]
    assert near_copies([short, numbered((70, 90))], [long]) == [True, False]
    assert near_copies([numbered((0, 27))], [numbered((0, 17), (90, 120))]) == [False]
    assert near_copies([numbered((0, 27))], [numbered((0, 17), (90, 120)), numbered((17, 27), (200, 230))]) == [True]
    assert near_copies(["a b", "b a", "A, b!"], ["a b"]) == [True, False, True]
    assert near_copies(["a"], []) == [False]


# Splits.


@pytest.mark.parametrize(
    ("text", "ranges"),
    [("1-90", [(1, 90)]), ("1-90,120-130", [(1, 90), (120, 130)]), (" 5 , 7 - 9", [(5, 5), (7, 9)]), ("3-3", [(3, 3)])],
)
def test_page_ranges(text, ranges):
    assert parse_pages(text) == ranges


@pytest.mark.parametrize(
    ("text", "part"),
    [("", ""), ("1-90,", ""), ("1-90,x", "x"), *((text, text) for text in ("1-", "-5", "1-2-3", "9-1", "0-3"))],
)
def test_page_ranges_that_are_none(text, part):
    with pytest.raises(ValueError, match=naming("train_pages", repr(text), repr(part), "1-90,120")):
        parse_pages(text)


def piece(name, first=1, last=None, file="a.pdf", text=None, more=()):
    text = text or " ".join(f"{name}{i}" for i in range(20))
    return Chunk(name, text, None, (Place(file, first, last or first), *more))


def ids(sides):
    return tuple([chunk.id for chunk in side] for side in sides)


def test_split_by_pages():
    chunks = [
        piece("a", 1),
        piece("b", 2, 3),
        piece("c", 3, 4),  # across the boundary
        piece("d", 4),
        piece("e", 6, 7),
        piece("f", 3, 6),  # begins and ends inside
        piece("g", 2, more=[Place("a.pdf", 9, 9)]),  # stands in validation as well
        piece("h", 1, more=[Place("a.pdf", 3, 4)]),  # and across
        piece("i", 2, file="b.pdf"),
        piece("j", 3, 4, more=[Place("a.pdf", 9, 9)]),  # across, and in validation as a whole
    ]
    assert ids(split_chunks(chunks, train_pages=[(1, 3), (6, 7)])) == (["a", "b", "e", "i"], ["d", "g", "j"])


def test_split_by_files():
    chunks = [piece("a"), piece("b", file="b.pdf"), piece("c", more=[Place("b.pdf", 1, 1)]), piece("d", file="c.pdf")]
    assert ids(split_chunks(chunks, train_files=["a.pdf", "c.pdf"])) == (["a", "d"], ["b", "c"])


def test_split_by_share_is_seeded_and_keeps_the_order():
    chunks = [Chunk(f"{i:02}", f"text{i} of its own") for i in range(40)]
    train, validation = ids(split_chunks(chunks, train_share=0.8))
    assert (len(train), len(validation)) == (32, 8)
    assert train == sorted(train)
    assert sorted(train + validation) == [chunk.id for chunk in chunks]
    assert ids(split_chunks(chunks, train_share=0.8, seed=0))[0] == train
    assert ids(split_chunks(chunks, train_share=0.8, seed=1))[0] != train


def test_training_loses_near_copies_and_validation_nothing():
    chunks = [
        piece("same", 1, text=numbered((0, 20))),
        piece("part", 1, text=numbered((5, 15))),
        piece("more", 1, text=numbered((0, 20), (100, 160))),
        piece("little", 1, text=numbered((0, 12), (200, 230))),
        piece("short", 1, text="None."),
        piece("other", 1, text="Not applicable."),
        piece("copied", 2, text=numbered((0, 20), (300, 301))),
        piece("copied again", 2, text=numbered((0, 20), (302, 303))),
        piece("short again", 2, text="NONE"),
    ]
    sides = ids(split_chunks(chunks, train_pages=[(1, 1)]))
    assert sides == (["little", "other"], ["copied", "copied again", "short again"])


def test_training_loses_what_shares_an_overlap_with_validation():
    def sentence(name):
        return " ".join(f"{name}{i}" for i in range(30)).capitalize() + "."

    first, second, third, fourth = map(sentence, "abcd")
    tail = "It is shared."

    def sides(*chunks):
        return ids(split_chunks(chunks, train_pages=[(1, 1)]))

    # Ends as the next one begins, and begins as the one before ends: across list neighbours or not.
    chunks = [
        piece("a", 1, text=f"{first} {tail}"),
        piece("b", 1, 2, text=third),
        piece("c", 2, text=f"{tail} {second}"),
    ]
    assert sides(*chunks, piece("d", 1, text=fourth))[0] == ["a", "d"]  # on other pages: the words are elsewhere too
    near = [
        piece("a", 1, text=f"{first} {tail}"),
        piece("c", 1, 2, text=f"{tail} {second}"),
        piece("d", 1, text=fourth),
    ]
    far = [*near[1:], near[0]]
    for order in (near, far):
        assert tuple(map(sorted, sides(*order, piece("e", 2, text=third)))) == (["a", "d"], ["e"])
    # By share every neighbour may be on the other side; two sentences are shared here.
    window = [f"{sentence(f'x{i}')} {tail[:-1]} {i}. Yes {i}." for i in range(12)]
    texts = [f"{tail[:-1]} {i - 1}. Yes {i - 1}. {text}" if i else text for i, text in enumerate(window)]
    for places in (True, False):
        chunks = [Chunk(str(i), text, None, (Place("a", 1, 1),) if places else ()) for i, text in enumerate(texts)]
        for seed in range(5):
            train, validation = ids(split_chunks(chunks, train_share=0.7, seed=seed))
            assert len(train) + len(validation) < len(chunks)
            assert not {int(a) for a in train} & {int(b) + step for b in validation for step in (-1, 1)}
    other_file = [piece("a", 1, text=f"{first} {tail}"), piece("b", 1, file="b.pdf", text=f"{tail} {second}")]
    assert ids(split_chunks(other_file, train_files=["a.pdf"])) == (["a"], ["b"])


@pytest.mark.parametrize(
    ("ways", "facts"),
    [
        ({}, ("train_files", "train_pages", "train_share", "none")),
        ({"train_share": 0.5, "train_files": []}, ("train_pages", "train_files, train_share")),
        ({"train_share": 0.0}, ("train_share", 0.0, 0, 1)),
        ({"train_share": 1.0}, ("train_share", 1.0, 0, 1)),
        ({"train_share": 0.1}, ("train_share", "training", "0 of 2", "validation", 2)),
        ({"train_share": 0.9}, ("train_share", "training", "2 of 2", "validation", 0)),
        ({"train_pages": [(1, 9)]}, ("train_pages", "training", "2 of 2", "validation", 0)),
        ({"train_pages": []}, ("train_pages", "training", "0 of 2", "validation", 2)),
        ({"train_files": ["b.pdf"]}, ("train_files", "b.pdf", "a.pdf")),
    ],
)
def test_splits_that_cannot_be(ways, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        split_chunks([piece("a"), piece("b", 2)], **ways)


def test_splits_of_chunks_from_elsewhere_and_of_copies():
    with pytest.raises(ValueError, match=naming("'b'", "places", "file", "page")):
        split_chunks([piece("a"), Chunk("b", "text")], train_pages=[(1, 1)])
    with pytest.raises(ValueError, match=naming("training", 1, "text", "validation")):
        split_chunks([piece("a", text="same"), piece("b", 2, text="Same.")], train_pages=[(1, 1)])


# Files.


def test_chunks_come_back_as_they_were(tmp_path):
    chunks = [
        Chunk("a", "text ä\nmore", 3, (Place("x.pdf", 1, 2), Place("y.pdf", 4, 4))),
        Chunk("b", "elsewhere"),
        Chunk("c", "no token", 0, headings=("Mill", "Owner")),
    ]
    save_chunks(tmp_path / "chunks.jsonl", chunks)
    assert load_chunks(tmp_path / "chunks.jsonl") == chunks
    second = (tmp_path / "chunks.jsonl").read_text(encoding="utf-8").split("\n")[1]
    assert second == '{"id": "b", "text": "elsewhere"}'


def test_any_lines_with_id_and_text_are_chunks(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 7, "text": " as it is ", "title": "x"}\n')
    assert load_chunks(path) == [Chunk("7", " as it is ")]


PLACE = '{"file": "a.pdf", "first_page": %s, "last_page": 2}'


@pytest.mark.parametrize(
    ("lines", "facts"),
    [
        ("", ("chunks",)),
        ('{"id": "a"}', (1, "object", "id", "text", {"id": "a"})),
        ("[]", (1, "object", "id", "text", [])),
        ('{"id": "a", "text": " "}', (1, "text", "empty")),
        ('{"id": true, "text": "x"}', (1, "id", "string", True)),
        ('{"id": "a", "text": 5}', (1, "text", "string", 5)),
        ('{"id": "7", "text": "x"}\n{"id": 7, "text": "y"}', (2, "id", 7)),
        ('{"id": "a", "text": "x", "places": [{"page": 1}]}', (1, "places", "file", "last_page", [{"page": 1}])),
        ('{"id": "a", "text": "x", "headings": "Ab"}', (1, "headings", "list", "strings", "'Ab'")),
        ('{"id": "a", "text": "x", "headings": [null]}', (1, "headings", "list", "strings", [None])),
        ('{"id": "a", "text": "x", "places": [5]}', (1, "places", "file", "last_page", [5])),
        ('{"id": "a", "text": "x", "places": 5}', (1, "places", "file", "last_page", 5)),
        (f'{{"id": "a", "text": "x", "places": [{PLACE % "true"}]}}', (1, "places", "first_page", "True")),
        (f'{{"id": "a", "text": "x", "places": [{PLACE % "0"}]}}', (1, "places", "first_page", 0)),
        (f'{{"id": "a", "text": "x", "places": [{PLACE % "9"}]}}', (1, "places", "first_page", 9)),
        (f'{{"id": "a", "text": "x", "places": [{PLACE % "null"}]}}', (1, "places", "first_page", "None")),
        *(
            (f'{{"id": "a", "text": "x", "num_tokens": {value}}}', (1, "num_tokens", repr(json.loads(value)), "int"))
            for value in ('"7"', "1.5", "true", "[7]")
        ),
    ],
)
def test_lines_that_are_no_chunks(tmp_path, lines, facts):
    (tmp_path / "a.jsonl").write_text(lines)
    with pytest.raises(ValueError, match=naming(tmp_path / "a.jsonl", *facts)):
        load_chunks(tmp_path / "a.jsonl")


def test_a_blob_that_is_one_unknown_token_is_cut():
    """all-MiniLM-L6-v2 takes a word of 300,000 letters for one token."""
    count_tokens = load_tokenizer("sentence-transformers/all-MiniLM-L6-v2")[0].count
    blob = "".join(random.Random(0).choices("abcdefghij", k=300_000))
    assert count_tokens([blob]) == [1]
    chunks = chunk_pages([Page("a.txt", 1, f"One sentence. {blob} Another one.")], count_tokens=count_tokens, size=50)
    assert max(len(chunk.text) for chunk in chunks) <= 51 * 100
    assert "".join(chunk.text for chunk in chunks).replace(" ", "") == f"Onesentence.{blob}Anotherone."


@pytest.mark.parametrize(
    ("text", "num_sentences"),
    [
        ("磨坊建于一八二〇年。镇上拥有它！谁在里面工作？面包店早上六点开门。", 4),
        ("製粉所は町のものです。「誰がそこで働きますか？」パン屋は朝六時に開きます。", 3),
        ("चक्की 1820 में बनी थी। शहर इसका मालिक है। बेकरी सुबह छह बजे खुलती है।", 3),
        ("متى بنيت المطحنة؟ بنيت قديما.", 2),
        ("El molino es de 1820. ¿Quién lo posee? ¡El pueblo! «Abre a las seis.»", 4),
        ("Ջրաղացը կառուցվել է։ Այն քաղաքինն է։", 2),
        ("The firm (est. 1820) is owned by the town. It bakes.", 2),
        ("彼は「誰が住んでいますか。」と聞いた。その後、帰った。", 2),
        ("「町のものです！」って言った。『春。』の本（絶版。）を読む。", 2),
        ("「終わり。」 町は静かだ。", 2),
        ("磨坊建于1820年.面包店开门!谁在里面?版本3.5。", 4),
        ("彼は「誰?」と聞いた。製粉所です｡誰が働きますか?パン屋です", 4),
        ("C'est fini. « Qui vient ? » M. Dupont rit. Il dit : « Oui. » et partit.", 4),
        ("Er ging. »Wer arbeitet dort?« Sie kam. »Ich«, sagte sie.", 4),
        ("Am 3. März begann der Umbau. Er endete am 31. Dez. 2021 mit einem Fest.", 2),
        ("Vom 1. Januar bis 3. 5. 2021 war zu. Die Mühle des 19. Jahrhunderts steht im 2. Hof.", 2),
        ("Es waren 12. Danach kamen mehr. In all there were 3. March followed.", 4),
        ('"Wer ist da?" überlegte sie. « Qui ? » émit-il. "Кто там?" спросил он.', 3),
        ("წისქვილი ძველია. სოფელს ეკუთვნის.", 2),
        *((f"{text}{mark} {text}{mark}", 2) for mark in "៕܂߹᠃᱾꯫꧉᭞꩝‼⁇‽" for text in ("Mill", "កិន")),
        ("Πού είναι ο μύλος; Στο χωριό· εκεί.", 2),
        ("The mill; the oven; the town.", 1),
    ],
)
def test_sentence_ends_of_other_scripts(text, num_sentences):
    spans = sentence_spans(text)
    assert len(spans) == num_sentences
    assert "".join("".join(text[slice(*span)].split()) for span in spans) == "".join(text.split())


def test_a_code_block_is_one_sentence():
    text = "Before. It runs.\n```\na. B\n\nc\n```\nAfter."
    assert [text[slice(*span)] for span in sentence_spans(text)] == [
        "Before.",
        "It runs.",
        "```\na. B\n\nc\n```",
        "After.",
    ]


def test_chinese_pages_join_without_a_blank():
    pages = report("磨坊建于一八二〇年并且从那时起一直属于这个位于北方山脚的镇", "所有。它很大。")
    (chunk,) = chunk_pages(pages, count_tokens=count_characters, size=99)
    assert chunk.text == pages[0].text + pages[1].text


def test_a_long_word_takes_linear_time():
    """The total length of the texts counted stays within a small multiple of the document."""
    total = 0

    def count(texts):
        nonlocal total
        total += sum(map(len, texts))
        return [len(text.split()) for text in texts]  # one token for the blob, however long

    for length in (25_000, 100_000):
        total = 0
        chunk_pages([Page("a.txt", 1, f"First. {'ab' * (length // 2)} Last.")], count_tokens=count, size=50)
        assert total < 80 * length
