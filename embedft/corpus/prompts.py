"""What a language model is asked, and how its reply is read.

Here: the default prompt, filling in a template, the JSON schema, and the parsing of replies, which takes JSON and plain
lines alike. Deliberately not here: sending (questions.py), judging whether a question is good (cleaning.py).

    prompt = fill_template(TEMPLATE, text=chunk.text, num_questions=2)
    parse_reply("1. Who founded Lyft?\n2. When was Lyft founded?", 2)
"""

import json
import re
from typing import Any

from .asking import asks

TEMPLATE = """\
Below is a passage from a larger collection of documents. Write {num_questions} questions that this passage answers.

Imagine the people who will ask them: they search the whole collection, have never seen this passage, and type what they
want to know. So each question must
- make sense alone and name what it is about, the company, person, product, place or year; never "the company", "the
  document" or "the table";
- be so specific that, among thousands of passages, this one is the best answer;
- be answered by the passage, without mentioning that there is a passage, text, context or excerpt;
- use the words that a person would use, instead of repeating sentences of the passage.
Ask about different facts. Write one question a line and nothing else.

Passage:
{text}
"""
SCHEMA = {
    "type": "object",
    "properties": {"questions": {"type": "array", "items": {"type": "string"}}},
    "required": ["questions"],
    "additionalProperties": False,
}
RESPONSE_FORMAT = {"type": "json_schema", "json_schema": {"name": "questions", "strict": True, "schema": SCHEMA}}

THOUGHT = re.compile(r"\s*<think>.*?(?:</think>|\Z)", re.DOTALL)
FENCE = re.compile(r"```\w*\s*\n(.*?)(?:```|\Z)", re.DOTALL)
# A list of strings or objects, but not the numbering in "[1] What is ...?".
JSON_START = re.compile(r"""\{ | \[\s*["{\]]""", re.VERBOSE)
NUMBERING = re.compile(
    r"""(?: [-*+•‣–—]\s+                                   # - What ...
          | \#+\s+                                         # ## What ...
          | \(?(?:\d{1,3}|[a-hA-H](?=\)))[.):]\**(?=\s|$)  # 1. What ...   (2) What ...   a) What ...   3: What ...
          | \[\d{1,3}\][.:]?\s                             # [1] What ...
          | (?:question|q)\s*\#?\d{0,3}\s*[.):]\**(?=\s|$) # Question 1: What ...   Q: What ...
        )""",
    re.VERBOSE | re.IGNORECASE,
)
NO_QUESTION = re.compile(r"(?:question|q)\s*#?\d{0,3}|answer\s*#?\d{0,3}\s*[.):].*|a\d{0,3}\s*:.*", re.IGNORECASE)
QUOTES = ("**", "__", '""', "''", "“”", "‘’", "«»", "``")
PREAMBLE = re.compile(
    r"(?:sure|certainly|of course|absolutely|okay|ok|here (?:are|is)|here's|below are)\b[^?]*", re.IGNORECASE
)


def fill_template(template: str, *, text: str, num_questions: int) -> str:
    """The prompt for a passage: {text} and {num_questions} filled in, every other brace as it stands.

    Raises:
        ValueError: the template has no {text}.
    """
    if "{text}" not in template:
        raise ValueError("the prompt template has no {text}, which is where the chunk goes")
    values = {"{text}": text, "{num_questions}": str(num_questions)}
    # In one pass, so that what the passage itself says in braces stays as it is.
    return re.sub(r"\{(?:text|num_questions)\}", lambda match: values[match[0]], template)


def parse_reply(text: str, num_questions: int) -> list[str]:
    """The first `num_questions` distinct questions of a reply.

    JSON (a list of strings, or an object with one under "questions"; also inside a ``` fence) is read as such, all else
    line by line without numbering, bullets and quotes; empty lines, preambles ("Here are two questions:", "Sure!"),
    bare headings ("Question 1") and answers ("A1: ...") are passed over, and where enough lines ask, so are those that
    do not. What a model thinks aloud between <think> and </think> is no part of the reply. Questions that differ in
    case or white space alone are the same.

    Raises:
        ValueError: JSON that is cut short or holds something else, or fewer questions.
    """
    text = THOUGHT.sub("", text, count=1).strip() if THOUGHT.match(text) else text.strip()
    fence = FENCE.search(text)
    inner = fence[1].strip() if fence else text
    if JSON_START.match(inner):
        found = _json_questions(inner)
    else:
        found = [line for line in inner.splitlines() if not _is_preamble(line.strip())]
    distinct: dict[str, str] = {}
    for line in found:
        question = strip_numbering(line)
        if any(map(str.isalnum, question)) and not NO_QUESTION.fullmatch(question):
            distinct.setdefault(question.casefold(), question)
    asking = {key: question for key, question in distinct.items() if asks(question)}
    distinct = asking if len(asking) >= num_questions else distinct
    if len(distinct) < num_questions:
        raise ValueError(f"{len(distinct)} of {num_questions} questions in the reply")
    return list(distinct.values())[:num_questions]


def strip_numbering(line: str) -> str:
    """A line without the numbering, bullets, bold marks and quotes around it, and with single spaces inside.

    Quotes and marks go only when they hold the whole line: `"Cost" or "price"?` stays as it is.
    """
    line = " ".join(line.split())
    while True:
        before = line
        line = line.removesuffix(",") if line[:1] == '"' else line
        for pair in QUOTES:
            opening, closing = (pair, pair) if pair in ("**", "__") else (pair[0], pair[1])
            inside = line[len(opening) : -len(closing)]
            if len(line) > len(pair) and line.startswith(opening) and line.endswith(closing):
                line = line if opening in inside or closing in inside else inside.strip()
        bold = line.startswith("**")
        match = NUMBERING.match(line, 2 if bold else 0)
        # "**1.** What" and "**Question 1: What**": the numbering goes, and with it the mark that opened before it.
        if match:
            rest = line[match.end() :].strip()
            line = rest.removesuffix("**") if bold and not match[0].endswith("**") else rest
        if line == before:
            return line


def _is_preamble(line: str) -> bool:
    return line.rstrip("*_ ").endswith(":") or PREAMBLE.fullmatch(line) is not None


def _json_questions(text: str) -> list[str]:
    try:
        value: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"invalid JSON in the reply ({error.msg}, character {error.pos} of {len(text)})") from None
    except RecursionError:
        raise ValueError("invalid JSON in the reply (nested too deep)") from None
    if isinstance(value, dict):
        value = value.get("questions")
    if not isinstance(value, list) or not all(isinstance(question, str) for question in value):
        raise ValueError('the JSON of the reply is no list of strings under "questions"')
    return value
