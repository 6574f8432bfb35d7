"""What an error must name, so that its wording can change.

pytest.raises(ValueError, match=naming("depth", 0, 1))
    "depth is 0, expected at least 1" and "expected a depth of 1 or more, got 0" match; "depth is 10" does not.
assert names(capsys.readouterr().err, "--size", 2)
"""

import re


def naming(*facts: object) -> str:
    """A pattern for messages with every fact in them, in any order: the field, the value, what was expected, the place.

    A fact is what `str` makes of it. It stands on its own: 1 is not in "10", "1.5", "1,000", "-1" or "row1", and
    "dim" not in "dims". A fact given twice must be there twice, and so must one that another fact contains, as a path
    does a name. Facts with `...` between them must come in that order: 7, ..., "base", ..., 8, ..., "other".
    """
    texts = [str(fact) for fact in facts if fact is not ...]
    assert all(texts), f"{facts}: an empty text is in every message"
    counts = {text: sum(len(re.findall(alone(text), other)) for other in texts) for text in texts}
    patterns = [rf"(?:.*?{alone(text)}){{{count}}}" for text, count in counts.items()]
    for before, between, after in zip(facts, facts[1:], facts[2:], strict=False):
        if between is ...:
            patterns.append(f".*?{alone(str(before))}.*?{alone(str(after))}")
    return r"(?s)\A" + "".join(f"(?={pattern})" for pattern in patterns)


def names(message: str, *facts: object) -> bool:
    """Whether `message` has every fact in it, as `naming` looks for them."""
    return re.search(naming(*facts), message) is not None


def alone(fact: str) -> str:
    before = after = ""
    if re.match(r"\w", fact):
        before = r"(?<!\w)" + (r"(?<!\d[.,])(?<!-)" if fact[0].isdigit() else "")
    elif fact[0] in "-.":
        before = rf"(?<![\w{fact[0]}])"
    if re.search(r"\w\Z", fact):
        after = r"(?!\w)" + (r"(?![.,]\d)" if fact[-1].isdigit() else "")
    return before + re.escape(fact) + after
