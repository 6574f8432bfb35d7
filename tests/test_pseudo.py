"""Docstring pairs: from a package made here and from a sample of the standard library; the split must not leak."""

import sys
import warnings
from collections import Counter
from textwrap import dedent

import pytest

from embedft.data import pseudo
from embedft.data.pseudo import docstring_datasets, docstring_pairs, split_docstring


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
    with pytest.warns(UserWarning, match=r"left out 3 of 6 files that do not parse: .*not_utf8\.py") as caught:
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
    package({"a.py": function("x", f"Get the value of x.\n\n{prose('get')}\n") + setter})
    assert names(docstring_pairs(["made"])) == ["made.a.x", "made.a.x#2"]


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


def test_errors_say_what_was_found(package):
    write_modules(package, [2, 2])
    with pytest.raises(ValueError, match=r"3 training and 2 held-out pairs .* made give 2 and 2 \(2 modules\)"):
        docstring_datasets(num_train=3, num_held_out=2, seed=0, packages=["made"])
    with pytest.raises(ValueError, match="must be at least 1, found 3 and 0"):
        docstring_datasets(num_train=3, num_held_out=0, seed=0, packages=["made"])
    for name in ("no_such_package", "made.m1", "sys", ""):
        with pytest.raises(ValueError, match=f"'{name}' is not an installed top-level package"):
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
