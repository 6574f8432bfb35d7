"""Questions from chunks written here, and from docstrings of a package made here and of the standard library."""

import sys
import warnings
from collections import Counter
from textwrap import dedent

import pytest
from naming import names as mentions
from naming import naming

from embedft.corpus import pseudo
from embedft.corpus.chunks import Chunk
from embedft.corpus.pseudo import (
    docstring_datasets,
    docstring_pairs,
    inverse_cloze,
    split_docstring,
    titles,
    without_sentence,
    without_title,
)


def prose(topic: str, num_words: int = 24) -> str:
    """Words that no other topic shares, on lines of eight."""
    words = [f"{topic}{i}" for i in range(num_words)]
    return "\n".join(" ".join(words[i : i + 8]) for i in range(0, num_words, 8))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A function that writes {file: source} as the package `made`, which raises when it is imported."""

    def write(files: dict[str, str | bytes]) -> None:
        for name, source in {"__init__.py": "raise RuntimeError('imported')\n", **files}.items():
            path = tmp_path / "made" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(source if isinstance(source, bytes) else source.encode())

    monkeypatch.syspath_prepend(tmp_path)
    return write


def function(name: str, docstring: str, *, head: str = "def", indent: int = 0) -> str:
    source = f'{head} {name}():\n    r"""{docstring}"""\n'
    return "\n".join(" " * indent + line if line else line for line in source.split("\n"))


def names(pairs) -> list[str]:
    return [pair.name for pair in pairs]


def test_modules_classes_methods_and_async_functions_are_read_in_the_order_of_the_lines(package):
    source = f'"""Tools for reading rivers.\n\n{prose("module")}\n"""\n'
    source += "class Outer:\n" + f'    """A river with many arms.\n\n{prose("outer")}\n    """\n'
    source += function("flow", f"Move the water along.\n\n{prose('flow')}\n", head="async def", indent=4)
    source += "    class Inner:\n" + f'        """One arm of a river.\n\n{prose("inner")}\n        """\n'
    source += "try:\n    import absent\nexcept ImportError:\n"
    source += function("fallback", f"Wade through the water.\n\n{prose('fallback')}\n", indent=4)
    source += "def outer():\n" + function("local", f"Hide inside a function.\n\n{prose('local')}\n", indent=4)
    package({"a/rivers.py": source, "lakes.py": function("fill", f"Fill the lake up.\n\n{prose('fill')}\n")})
    pairs = docstring_pairs(["made"])
    inside = ["", ".Outer", ".Outer.flow", ".Outer.Inner", ".fallback"]
    assert names(pairs) == ["made.lakes.fill", *(f"made.a.rivers{name}" for name in inside)]
    assert pairs[3].query == "Move the water along."
    assert pairs[3].document == prose("flow")
    assert pairs[3].module == "made.a.rivers"
    assert "made" not in sys.modules


def test_docstrings_of_c_code_are_taken_from_the_calls_that_add_them(package):
    source = f'''
add_docstr(made.sail, r"""
sail(wind) -> Tensor

Sails before the wind.

""" + r"""
{prose("sail")} {{wind}} in {{{{braces}}}}
""".format(**common))
row = _add_docstr(_C._made.made_row, """Rows against the stream.\n\n{prose("row")}""")
add_newdoc("made.core", "boat", ("keel", """
    Keeps the boat upright.

    {prose("keel").replace(chr(10), chr(10) + "    ")}
    """))
add_docstr(made.computed, build("Not a literal at all." + text))
print("Prints a text that documents nothing.\\n\\n{prose("printed").replace(chr(10), " ")}")
'''
    package({"_docs.py": source})
    pairs = docstring_pairs(["made"])
    assert names(pairs) == ["made._docs.sail", "made._docs.made_row", "made._docs.boat.keel"]
    assert [pair.query for pair in pairs] == [
        "Sails before the wind.",
        "Rows against the stream.",
        "Keeps the boat upright.",
    ]
    assert pairs[0].document == f"sail(wind) -> Tensor\n\n{prose('sail')}  in {{braces}}"
    assert pairs[2].document == prose("keel")


@pytest.mark.parametrize(
    ("docstring", "summary", "rest"),
    [
        ("Do a thing.", "Do a thing.", ""),
        ("Do a thing\nover two lines. And more.\n\nRest.", "Do a thing over two lines.", "And more.\n\nRest."),
        ("Do it, e.g. The rest, i.e. All. Then stop.", "Do it, e.g. The rest, i.e. All.", "Then stop."),
        ("Do a thing\n\nArgs:\n    x: y", "Do a thing", "Args:\n    x: y"),
        ("Do a thing.\n\n    >>> code\n", "Do a thing.", "    >>> code\n"),
        ("Do a thing\nArgs:\n    x: y", "Do a thing", "Args:\n    x: y"),
        ("Do a thing\n- one\n- two", "Do a thing", "- one\n- two"),
        ("Do a thing.\n>>> thing()", "Do a thing.", ">>> thing()"),
        # Signatures stay in the document, however many lines they take.
        ("add(x1, x2, /)\n\nAdd the arguments.\n\nRest.", "Add the arguments.", "add(x1, x2, /)\n\nRest."),
        ("a(b,\n  c=(1, 2)) -> (Tensor, Tensor)\nAdd them.", "Add them.", "a(b,\n  c=(1, 2)) -> (Tensor, Tensor)\n"),
        ("f(x)\n--\n\nf(x)\n\nAdd them.\n\nRest.", "Add them.", "f(x)\n--\n\nf(x)\n\nRest."),
        # So do notices.
        (".. deprecated:: 1.2\n    Use y.\n\nAdd them up.", "Add them up.", ".. deprecated:: 1.2\n    Use y.\n\n"),
        # Markup.
        ("Like :func:`~a.b`, ``c`` and `text <target>`_.", "Like a.b, c and text.", ""),
        (":meth:`go` moves **all** of *it*, not *args or 2 ** 3.", None, None),
        ("Use :py:meth:`go` on **all** of *it*, *args and 2 ** 3.", "Use go on all of it, *args and 2 ** 3.", ""),
        ("Compute :math:`x_1 + y`.\n\nRest.", "Compute x_1 + y.", "Rest."),
        # No summary.
        ("", None, None),
        ("add(x1, x2)", None, None),
        ("Args:\n    x: The first one.", None, None),
        ("Parameters\n----------\nx : int", None, None),
        ("Title Of It\n===========\n\nProse.", None, None),
        (":param x: The first one.", None, None),
        (">>> add(1, 2)\n3", None, None),
        ("Note: This may change.", None, None),
        ("Do the following:\n\n- one", None, None),
        ("phrase = 1*word / obs-phrase", None, None),
        ("D.pop(k[,d]) -> v, remove the key and return the corresponding value.", None, None),
        (".. note::\n    All of it is a note.", None, None),
    ],
)
def test_split_docstring(docstring, summary, rest):
    assert split_docstring(docstring) == (None if summary is None else (summary, rest))


@pytest.mark.parametrize(
    ("repetition", "left"),
    [
        ("Count the fish of a lake.\n\n{body}", "{body}"),
        ("Count all the fish of a lake\nBy {body}", "By {body}"),
        ("{body}\n\nReturns\n-------\nn\n    Count of the fish of a lake.", "{body}\n\nReturns\n-------\nn"),
        ("First line.  Counts the fish of the lake.  Last line.\n{body}", "First line.    Last line.\n{body}"),
        # Half of the words, or all of them among many others, say something of their own.
        ("Count the birds of a forest.\n\n{body}", "Count the birds of a forest.\n\n{body}"),
        (
            "Count the fish of a lake by catching some, marking them and catching again some days later.\n{body}",
            "Count the fish of a lake by catching some, marking them and catching again some days later.\n{body}",
        ),
    ],
)
def test_what_repeats_the_summary_leaves_the_document(package, repetition, left):
    body = prose("body")
    docstring = f"Count the fish of a lake.\n\n{repetition.format(body=body)}\n"
    package({"fish.py": function("count", docstring)})
    (pair,) = docstring_pairs(["made"])
    assert pair.query == "Count the fish of a lake."
    assert pair.document == left.format(body=body)


def test_what_is_too_short_or_too_long_is_left_out(package):
    docstrings = {
        "three": f"Only three words.\n\n{prose('three')}\n",
        "four": f"Here are four words.\n\n{prose('four')}\n",
        "sixty": f"The {'word ' * 58}end.\n\n{prose('sixty')}\n",
        "sixty_one": f"A {'word ' * 59}end.\n\n{prose('long')}\n",
        "nineteen": f"The body is short.\n\n{prose('nineteen', 19)}\n",
        "twenty": f"The body is enough.\n\n{prose('twenty', 20)}\n",
        "one_liner": "There is no body at all.",
        "nothing": "",
    }
    package({"a.py": "".join(function(name, text) for name, text in docstrings.items())})
    assert names(docstring_pairs(["made"])) == ["made.a.four", "made.a.sixty", "made.a.twenty"]


def test_files_that_do_not_parse_are_counted_and_tests_are_not_read(package):
    good = function("f", f"Here are four words.\n\n{prose('good')}\n")
    other = good.replace("good", "other").replace("four", "some other")
    package(
        {
            "good.py": b"# -*- coding: latin-1 -*-\n" + good.replace("good", "gööd").encode("latin-1"),
            "not_utf8.py": b'"""\xff\xfe"""',
            "null.py": b'"""a"""\0',
            "syntax.py": '"""Doc."""\ndef (:\n',
            "escape.py": '"""\\d"""\n',
            "tests/test_it.py": other,
            "deep/testing/it.py": other,
            "notes.txt": other,
        }
    )
    with pytest.warns(UserWarning, match=naming(3, 6, "files", "not_utf8.py")) as caught:
        (pair,) = docstring_pairs(["made"])
    assert len(caught) == 1
    assert "gööd0" in pair.document


def test_copies_go_and_the_longest_stays(package):
    half = prose("shared", 20).replace("\n", " ")
    package(
        {
            "a.py": function("alias", f"Name the short one.\n\n{prose('same', 40)}\n")
            + function("within", f"Stand inside another.\n\n{prose('long', 32)}\n"),
            "b.py": function("original", f"Name the same thing again.\n\n{prose('same', 40)}\n")
            + function("whole", f"Hold all of the other.\n\n{prose('long', 64)}\n")
            # 13 runs of eight words in 20: with 20 words of its own, 13 of 33 are shared, with 4 it is 13 of 17.
            + function("shared", f"Own half of the words.\n\n{half} {prose('own', 30)}\n")
            + function("less", f"Own fewer of the words.\n\n{half} {prose('mine', 20)}\n")
            + function("least", f"Own hardly any words.\n\n{half} {prose('few', 4)}\n"),
        }
    )
    expected = ["made.a.alias", "made.b.whole", "made.b.shared", "made.b.less"]
    assert names(docstring_pairs(["made"])) == expected


def test_a_summary_of_several_documents_asks_for_none(package):
    package(
        {
            "a.py": function("f", f"Run the next step.\n\n{prose('af')}\n")
            + function("g", f"Run the last step.\n\n{prose('ag')}\n"),
            "b.py": function("f", f"run the next step.\n\n{prose('low')}\n")
            + function("h", f"Run the Next step.\n\n{prose('bh')}\n"),
        }
    )
    assert names(docstring_pairs(["made"])) == ["made.a.g"]


def test_equal_names_are_numbered(package):
    setter = function("x", f"Set the value of x.\n\n{prose('set')}\n")
    other = function("y", f"Get the value of y.\n\n{prose('why')}\n")
    package({"a.py": function("x", f"Get the value of x.\n\n{prose('get')}\n") + setter, "b.py": other})
    datasets = docstring_datasets(num_train=9, num_held_out=9, seed=0, packages=["made"])
    assert {id for dataset in datasets for id in dataset.corpus} == {"made.a.x", "made.a.x#2", "made.b.y"}


def write_modules(package, sizes: list[int]) -> None:
    package(
        {
            f"m{module}.py": "".join(
                function(f"f{i}", f"Explain part {i} of {module}.\n\n{prose(f'm{module}f{i}x')}\n") for i in range(size)
            )
            for module, size in enumerate(sizes)
        }
    )


def test_datasets_share_no_module_and_are_the_same_for_a_seed(package):
    write_modules(package, [3, 1, 4, 1, 5, 9, 2, 6, 5, 3])
    train, held_out = docstring_datasets(num_train=18, num_held_out=9, seed=0, packages=["made"])
    assert (len(train.queries), len(train.corpus), len(train.qrels)) == (18, 18, 18)
    assert len(held_out.corpus) == 9
    for dataset in (train, held_out):
        for query_id, relevant in dataset.qrels.items():
            (document_id,) = relevant
            assert relevant == {document_id: 1}
            assert query_id == f"{document_id}/q"
            module, function_name = document_id.removeprefix("made.m").split(".f")
            assert dataset.queries[query_id] == f"Explain part {function_name} of {module}."
            assert dataset.corpus[document_id] == prose(f"m{module}f{function_name}x")
    modules = [{document_id.split(".")[1] for document_id in dataset.corpus} for dataset in (train, held_out)]
    assert not modules[0] & modules[1]
    again, _ = docstring_datasets(num_train=18, num_held_out=9, seed=0, packages=["made"])
    assert list(again.corpus.items()) == list(train.corpus.items())
    other, _ = docstring_datasets(num_train=18, num_held_out=9, seed=1, packages=["made"])
    assert list(other.corpus) != list(train.corpus)


@pytest.mark.parametrize("counts", [(1, 4), (4, 1), (2, 3)])
def test_all_pairs_can_be_used(package, counts):
    write_modules(package, [1, 1, 1, 1, 1])
    datasets = docstring_datasets(num_train=counts[0], num_held_out=counts[1], seed=0, packages=["made"])
    assert tuple(len(dataset.corpus) for dataset in datasets) == counts


def test_where_there_are_fewer_pairs_all_are_taken(package):
    write_modules(package, [2, 3])
    datasets = docstring_datasets(num_train=9, num_held_out=4, seed=0, packages=["made"])
    assert sorted(len(dataset.queries) for dataset in datasets) == [2, 3]


def test_errors_say_what_was_found(package):
    write_modules(package, [4])
    with pytest.raises(ValueError, match=naming("made", 4, ..., "training", ..., 0, ..., "held-out", 1, "modules")):
        docstring_datasets(num_train=3, num_held_out=2, seed=0, packages=["made"])
    with pytest.raises(ValueError, match=naming("num_train", "num_held_out", 3, ..., 0, 1)):
        docstring_datasets(num_train=3, num_held_out=0, seed=0, packages=["made"])
    for name in ("no_such_package", "made.m1", "sys", ""):
        with pytest.raises(ValueError, match=naming(repr(name), "package", "stdlib")):
            docstring_pairs([name])


def test_standard_library(monkeypatch):
    """Three of its packages: what comes out reads as sentences, and no two documents are near-copies."""
    files = [file for file in pseudo._python_files("stdlib") if file[0].split(".")[0] in ("json", "email", "logging")]
    monkeypatch.setattr(pseudo, "_python_files", lambda package: files)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pairs = docstring_pairs(["stdlib"])
    by_name = {pair.name: pair for pair in pairs}
    assert 100 < len(pairs) < 500
    assert len(by_name) == len(pairs)
    assert by_name["json.dump"].query.startswith("Serialize obj as a JSON formatted stream to fp")
    assert "``skipkeys``" in by_name["json.dump"].document
    for pair in pairs:
        assert 4 <= len(pair.query.split()) <= 60
        assert pair.query[0].isupper()
        assert "`" not in pair.query
        assert "\n" not in pair.query
        assert pair.query not in " ".join(pair.document.split())
    sentences = Counter(run for pair in pairs for run in set(dedent(pair.document).split("\n\n")))
    assert all(count == 1 for text, count in sentences.items() if len(text.split()) > 40)


# Inverse cloze. PADDING is 20 words that are no sentence: what a chunk must keep, and nothing to ask with.

PADDING = "Below" + " below" * 19


def ict(text: str, **options) -> tuple[str, str] | None:
    """(query, document) of a chunk, or None. Beside it is another, so that there always is a question."""
    chunks = [Chunk("c", text), Chunk("other", f"Here is another whole sentence. {PADDING}")]
    dataset = inverse_cloze(chunks, **{"seed": 0, "keep_share": 0, **options})
    assert dataset.qrels == {query_id: {query_id[:-2]: 1} for query_id in dataset.queries}
    if "c/q" in dataset.queries:
        return dataset.queries["c/q"], dataset.corpus["c"]
    assert dataset.corpus["c"] == text
    return None


@pytest.mark.parametrize(
    ("text", "query", "document"),
    [
        (f"The depot is let until 2031. {PADDING}", "The depot is let until 2031.", PADDING),
        (f"{PADDING}\nThe depot is let until 2031.", "The depot is let until 2031.", PADDING),
        (f"{PADDING}\nThe depot is   let until 2031.\nMore.", "The depot is let until 2031.", f"{PADDING}\nMore."),
        (f"{PADDING}\n\nThe depot is not let.\n\n\nMore.", "The depot is not let.", f"{PADDING}\n\nMore."),
        (f"{PADDING}\nThe depot is let until 2031. More.", "The depot is let until 2031.", f"{PADDING}\nMore."),
        (f"More! The depot is let today.  {PADDING}", "The depot is let today.", f"More! {PADDING}"),
        (f'{PADDING}\n"Is the depot let today?"', '"Is the depot let today?"', PADDING),
        (f"{PADDING}\n(Élan owns the depot today!)", "(Élan owns the depot today!)", PADDING),
        # Five words, three of them of letters alone, and a hyphen in one.
        (f"{PADDING}\nCosts rose 5 7 year-to-date.", "Costs rose 5 7 year-to-date.", PADDING),
        (f"{PADDING}\nA {'word ' * 58}ends.", f"A {'word ' * 58}ends.", PADDING),
    ],
)
def test_the_sentence_leaves_the_chunk(text, query, document):
    assert ict(text) == (query, document)
    assert ict(text, keep_share=1) == (query, text)


@pytest.mark.parametrize(
    "text",
    [
        PADDING,
        f"{PADDING}\nFour words are few.",
        f"{PADDING}\n5. Labor Code Section 2870 Notice is due.",
        f"{PADDING}\nA {'word ' * 59}ends.",
        f"{PADDING}\nRevenue $ 3,208 $ 2,364 total.",
        f"{PADDING}\nCosts rose 5 7.",
        f"{PADDING}\nCosts of 5 7 9 total 21.",  # three of seven
        f"{PADDING}\nCosts are in this | table.",
        f"{PADDING}\nRisk Factors of the Whole Business",
        f"{PADDING}\nThe facility and its limits:",
        f"{PADDING}\nit began on the page before.",
        # One word fewer would be left.
        f"{PADDING[6:]}\nThe depot is let until 2031.",
        # What is said twice would stay; so would a part of something longer.
        f"The depot is let today. {PADDING}\nThe depot is  let today.",
        f"{PADDING}\nThe depot is let today.\nit is said (The depot is let today.) so",
    ],
)
def test_chunks_without_a_sentence_to_ask_with_are_left_out(text):
    assert ict(text) is None


ORDINALS = ("one", "two", "three", "four", "five")


def five_sentences(id: str) -> Chunk:
    return Chunk(id, " ".join(f"This is sentence {name} of chunk {id} in all." for name in ORDINALS))


def ordinal(query: str) -> int:
    return ORDINALS.index(query.split()[3])


def test_a_choice_depends_on_seed_and_id_alone():
    chunks = [five_sentences(f"c{i}") for i in range(400)]
    dataset = inverse_cloze(chunks, seed=0)
    assert len(dataset.queries) == 400
    assert list(dataset.corpus) == [chunk.id for chunk in chunks]
    # Every sentence in its turn: 80 times on average, with a standard deviation of 8.
    counts = Counter(map(ordinal, dataset.queries.values()))
    assert counts.keys() == set(range(5))
    assert all(48 < count < 112 for count in counts.values())
    # A tenth stays: 40 on average, with a standard deviation of 6.
    kept = [chunk.id for chunk in chunks if dataset.corpus[chunk.id] == chunk.text]
    assert 16 < len(kept) < 64
    for chunk in chunks:
        query = dataset.queries[f"{chunk.id}/q"]
        rest = " ".join(chunk.text.replace(query, "").split())
        assert dataset.corpus[chunk.id] == (chunk.text if chunk.id in kept else rest)
    # Which stays has nothing to do with which sentence it is.
    assert len({ordinal(dataset.queries[f"{i}/q"]) for i in kept}) > 2
    fewer = inverse_cloze(chunks[:100:-3], seed=0)
    for query_id, query in fewer.queries.items():
        assert dataset.queries[query_id] == query
        assert dataset.corpus[query_id[:-2]] == fewer.corpus[query_id[:-2]]
    none_kept = inverse_cloze(chunks, seed=0, keep_share=0)
    assert none_kept.queries == dataset.queries  # training and validation differ in what stays only
    assert not {chunk.text for chunk in chunks} & set(none_kept.corpus.values())
    other = inverse_cloze(chunks, seed=1)
    assert 200 < sum(other.queries[i] != query for i, query in dataset.queries.items()) < 400


def test_a_sentence_of_several_chunks_asks_for_none():
    first, second = five_sentences("a"), five_sentences("b")
    shared = "The accompanying notes are a part of this."
    chunks = [
        Chunk("a", f"{first.text} {shared}"),
        Chunk("b", f"{shared.replace(' notes', '  notes')} {second.text}"),
    ]
    found = {inverse_cloze(chunks, seed=seed).queries["a/q"] for seed in range(60)}
    assert len(found) == 5
    assert shared not in found
    alone = inverse_cloze([Chunk("c", f"{shared} {PADDING}"), second], seed=0)
    assert alone.queries["c/q"] == shared


def test_why_chunks_have_no_sentence():
    shared = "The accompanying notes are a part of this."
    chunks = [
        five_sentences("a"),
        Chunk("none", PADDING),
        Chunk("short", "The depot of the town is small."),
        Chunk("shared", f"{shared} {PADDING}"),
        Chunk("also", f"{shared} {shared} {PADDING}"),
        Chunk("both", f"{shared} The depot of the town is large."),
    ]
    reasons = without_sentence(chunks)
    assert reasons.keys() == {"none", "short", "shared", "also", "both"}
    assert mentions(reasons["none"], "no", "sentence", "5 to 60 words")
    assert mentions(reasons["short"], "fewer than 20 words")
    assert "more than once" in reasons["shared"] == reasons["also"]
    assert mentions(reasons["both"], "more than once", "fewer than 20 words")
    assert {query_id.removesuffix("/q") for query_id in inverse_cloze(chunks, seed=0).queries} == {"a"}


def test_inverse_cloze_is_the_same_everywhere():
    """Of one seed and some ids, written down: a change would change everybody's data."""
    dataset = inverse_cloze([five_sentences(i) for i in "abcdef"], seed=7)
    assert list(map(ordinal, dataset.queries.values())) == [2, 1, 3, 3, 3, 1]


def test_inverse_cloze_errors():
    chunks = [five_sentences("a")]
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=naming("keep_share", share, 0, 1)):
            inverse_cloze(chunks, seed=0, keep_share=share)
    with pytest.raises(ValueError, match=naming("chunk", "'a'", "twice")):
        inverse_cloze([*chunks, *chunks], seed=0)
    with pytest.raises(ValueError, match=naming(2, "chunks", "sentence", "query")):
        inverse_cloze([Chunk("a", "Too short."), Chunk("b", PADDING)], seed=0)
    with pytest.raises(ValueError, match=naming(0, "chunks", "sentence")):
        inverse_cloze([], seed=0)


# Titles.

BODY = (
    "The depot is let until 2031, with an option for five more years, which the tenant may use once, in writing, too."
)


@pytest.mark.parametrize(
    ("text", "heading"),
    [
        (f"Lease of the Depot\n{BODY}", "Lease of the Depot"),
        (f"## Lease of the Depot ##\n\n{BODY}", "Lease of the Depot"),
        (f"# lease\n{BODY}", "lease"),
        (f"  Item 7A.  Market Risk \n{BODY}", "Item 7A. Market Risk"),
        (f"2.1 Lease of the Depot\n{BODY}", "2.1 Lease of the Depot"),
        (f"Leases in 2021 and 2020\n{BODY}", "Leases in 2021 and 2020"),
        (f"Lease of the Depot\n- {BODY}\n{BODY}", "Lease of the Depot"),
        (f"{'Lease ' * 11}Depot\n{BODY}", f"{'Lease ' * 11}Depot"),
        (f"{'Lease ' * 12}Depot\n{BODY}", None),
        (BODY, None),
        (f"The depot is let.\n{BODY}", None),
        (f"Lease of the depot:\n{BODY}", None),
        (f"Thereafter —\n{BODY}", None),
        (f"Lease of the\n{BODY}", None),
        (f"LEASE OF THE\n{BODY}", None),
        (f"Lease of the depot\n{BODY[0].lower()}{BODY[1:]}\n{BODY}", None),
        (f"Lease of the depot\n(1) {BODY}", None),
        (f"lease of the depot\n{BODY}", None),
        (f"2021\n{BODY}", None),
        (f"Item 7\n{BODY}", None),
        (f"Cost of revenue 51.4 61.2\n{BODY}", None),
        (f"Cost of revenue (5) (7)\n{BODY}", None),
        (f"Cost of revenue 5,264\n{BODY}", None),
        (f"Cost of revenue $ 52\n{BODY}", None),
        (f"Cost of | revenue\n{BODY}", None),
        ("Lease of the Depot\nThe depot is let until 2031.", None),
        (f"Lease of the Depot\n{PADDING.title()}", None),
        ("Lease of the Depot", None),
        (f"###\n{BODY}", None),
    ],
)
def test_titles(text, heading):
    dataset = titles([Chunk("other", f"Another Heading\n{BODY}"), Chunk("c", text)])
    assert dataset.queries.get("c/q") == heading
    assert list(dataset.corpus) == ["other", "c"]
    assert dataset.corpus["other"] == BODY
    assert dataset.qrels == {query_id: {query_id[:-2]: 1} for query_id in dataset.queries}
    if heading is None:
        assert dataset.corpus["c"] == text
    else:
        assert dataset.corpus["c"] == text.strip().partition("\n")[2].strip()


def test_a_heading_of_several_chunks_asks_for_none():
    chunks = [
        Chunk(i, f"{title}\n{BODY}")
        for i, title in zip("abcd", ("Overview", "Fees", "# OVERVIEW", "Rent"), strict=True)
    ]
    dataset = titles(chunks)
    assert dataset.queries == {"b/q": "Fees", "d/q": "Rent"}
    assert dataset.corpus["a"] == chunks[0].text
    others = [Chunk("e", BODY), Chunk("f", "Lease\nToo short."), Chunk("g", f"Leases\n{PADDING.title()}")]
    reasons = without_title([*chunks, *others])
    assert reasons.keys() == set("acefg")
    facts = (("others",), ("others",), ("begin", "heading"), ("fewer than 20 words",), ("no", "sentence"))
    assert all(mentions(reasons[id], *fact) for id, fact in zip("acefg", facts, strict=True))


def test_titles_errors():
    with pytest.raises(ValueError, match=naming(2, "chunks", "unique", "heading", "query")):
        titles([Chunk(i, f"Overview\n{BODY}") for i in "ab"])
    with pytest.raises(ValueError, match=naming("chunk", "'a'", "twice")):
        titles([Chunk("a", f"{title}\n{BODY}") for title in ("Fees", "Rent")])
