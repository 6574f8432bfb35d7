"""What an error must name, so that its wording can change.

pytest.raises(ValueError, match=naming("depth", 0, 1))
    "depth is 0, expected at least 1" and "expected a depth of 1 or more, got 0" match; "depth is 10" does not.
assert names(capsys.readouterr().err, "--size", 2)
"""

import re


def naming(*facts: object) -> str:
    """A pattern for messages with every fact in them, in any order: the field, the value, what was expected, the place.

    A fact is what `str` makes of it. It stands on its own: 1 is not in "10", "1.5", "1,000", "-1" or "row1", and
    "dim" not in "dims".
    """
    return r"(?s)\A" + "".join(rf"(?=.*{alone(str(fact))})" for fact in facts)


def names(message: str, *facts: object) -> bool:
    """Whether `message` has every fact in it, as `naming` looks for them."""
    return re.search(naming(*facts), message) is not None


def alone(fact: str) -> str:
    before = after = ""
    if re.match(r"\w", fact):
        before = r"(?<!\w)" + (r"(?<!\d[.,])(?<!-)" if fact[0].isdigit() else "")
    elif fact.startswith(("-", ".")):
        before = r"(?<![\w-])" if fact.startswith("-") else r"(?<!\.)"
    if re.search(r"\w\Z", fact):
        after = r"(?!\w)" + (r"(?![.,]\d)" if fact[-1].isdigit() else "")
    return before + re.escape(fact) + after
