"""Builds prompts for a language model, parses its replies, and recognizes (English) questions.

questions = parse_reply(reply_to(fill_template(TEMPLATE, text=chunk.text, num_questions=2)), 2)

Besides questions, a model can write claims, keyword searches and titles (`KINDS`): people search with all of these.
Source: CADET (arXiv 2505.19274), where a mix of kinds trains better than any one; the prompts are our own.
"""

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

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
CLAIM_TEMPLATE = """\
Below is a passage from a larger collection of documents. Write {num_questions} claims that this passage supports.

Imagine the people who will check them: they search the whole collection, have never seen this passage, and type a
statement to find out whether it holds. So each claim must
- be one declarative sentence that is true according to the passage;
- make sense alone and name what it is about, the company, person, product, place or year; never "the company", "the
  document" or "the table";
- be so specific that, among thousands of passages, this one is the best evidence;
- use other words than the passage, without mentioning that there is a passage, text, context or excerpt.
State different facts. Write one claim a line and nothing else.

Passage:
{text}
"""
KEYWORDS_TEMPLATE = """\
Below is a passage from a larger collection of documents. Write {num_questions} keyword searches that should find it.

Imagine the people who will search: they have never seen this passage, and type a few words instead of a sentence. So
each search must
- be three to eight words or names, separated by spaces, and neither a sentence nor a question;
- name what it is about, the company, person, product, place or year;
- be so specific that, among thousands of passages, this one is the best result;
- mix the passage's own terms with other words for the same things.
Search for different facts. Write one whole search a line and nothing else.

Passage:
{text}
"""
TITLE_TEMPLATE = """\
Below is a passage from a larger collection of documents. Write {num_questions} titles for it.

Imagine one long table of contents for the whole collection, in which people look for what they need. So each title must
- be three to twelve words, and neither a sentence nor a question;
- name what the passage is about, the company, person, product, place or year;
- be so specific that it fits none of the thousands of other passages;
- not mention that there is a passage, text, context or excerpt.
Write different titles, one a line, and nothing else.

Passage:
{text}
"""

THOUGHT = r"(?:think|thinking|thoughts?|reason|reasoning|reflection|analysis|scratchpad)"
THOUGHT_TAG = r"[\w:-]{0,20}?(?:think|thought|reason|reflect|analysis|scratchpad|monologue|\bplan\b)[\w-]{0,20}"
# Everything before the last match is reasoning or a role header. "What does the </think> tag do?" has none.
END_OF_THOUGHT = re.compile(rf"""(?ix) (?<!the\ )(?<!`)<\s?\\?/\s?{THOUGHT_TAG}\s*> | \[/(?:THINK|INST)\] | ◁/think▷
    | assistantfinal | Here\ is\ my\ response: | <\|(?:message|end_header_id|end\w*_{THOUGHT})\|> | <channel\|>
    | <unused95>""")
# Everything after the first match is unfinished reasoning or leftover markup. Inside a sentence, a tag is asked about.
END_OF_REPLY = re.compile(rf"""(?imx) (?:^|(?<=[^\w\s,`'"(]))[ \t]*<{THOUGHT_TAG}(?:\s[^<>]*)?> | \[THINK\] | ◁think▷
    | <\|(?:start|begin)\w*_{THOUGHT}\|> | <\|channel>thought | <unused94> | (?<=\S)\s*<(?:[|｜][\w▁]+|turn)[|｜]>""")
# The line before the answer, if questions follow: a heading, or a closing tag of any name but those for the questions.
ANSWER_FOLLOWS = re.compile(r"""(?imx) ^[#*_\ \t]* (?:
    </ (?!(?:[\w:-]*(?:question|quer|answer|output|response|result|solution|json|list|item)
        |(?:[qpbisu]|q\d+|em|strong|span|ol|ul|li|d[dlt]|div|html|body|section|table|t[dhr]|pre|code|blockquote)\s*>))
        \w[\w:-]*\s*>
    | (?:final\ (?:answer|questions|response|output)|questions) ) [:*_\ \t]*$""")
ROLE = re.compile(r"""(?ix) \A (?:<\|\w+\|>)?[#*\s]*
    (?:assistant|model|ai|final\ answer|answer|output|response) [*\s]*(?::[*\s]*|\n)""")
FENCE = re.compile(r"```(?:\w*[^\S\n]*\n)?(.*?)(?:```|\Z)", re.DOTALL)
JSON_START = re.compile(r"""\{\s*["'}]|\[\s*["'{\[]""")
JSON_LINE = re.compile(rf"^[`json \t]*(?:{JSON_START.pattern})", re.MULTILINE)
MAX_CHARACTERS = 1_000  # of a question
STRING = re.compile(rf"""(["'])(.{{1,{MAX_CHARACTERS}}}?)(?<!\\)\1(?=\s*(?:[,:\]}}]|\Z))""", re.DOTALL)
LINE_END = re.compile(r"<br\b[^<>]*>|(?<=>)(?=<)|(?<=[?？])\s+(?=\(?\d{1,2}[.)]\s)")
CONTROL = re.compile(r"\x1b\[[\d;]*[A-Za-z]|[\x00-\x08\x0e-\x1b\x7f\u200b\ufeff]")  # and colours
TAG = r"<(?:/?[A-Za-z][^<>]*|[|｜][^<>]*[|｜])>"
ESCAPED_TAG = re.compile(r"""(?ix) &(?:amp;)*(?:lt|\#0*60|\#x0*3c); (/?[a-z][^<>&]* | [|｜][^<>&]*[|｜])
    &(?:amp;)*(?:gt|\#0*62|\#x0*3e);""")  # &lt;think&gt;
# Tags in front; behind, closing ones, and those that follow a full stop, a question mark, a quote or the like.
EDGE_TAG = re.compile(rf"^(?:{TAG}\s*)+|(?<=\S)\s*</[^<>]*>$|(?<=[^\w\s])\s*{TAG}$")
QUESTION_LABEL = r"(?:question|q)\s*\#?(?:\d{0,3}|one|two|three|four|five|six|seven|eight|nine|ten)"
NUMBERING = re.compile(rf"""(?ix)
    [-*+>|–—]\s+ | \#+\s+                               # - What ...   ## What ...
    | [•‣⁃←-⇿①-⓿■-➿⬀-⯿\U0001f300-\U0001faff]\ufe0f?\s*  # ● What ...   → What ...   ① What ...   ✅ What ...
    | [(（]?(?:\d{{1,3}}|[a-z](?=[)）])|[ivx]{{2,5}}(?=[.)）]))  # 1. What ...   (2) What ...   a) What ...
      (?:[.):|][*_]*(?=\s|$)|[、．：）]|\ufe0f?\u20e3)          # 3: What ...   4、What ...   iv. What ...
    | \[(?:\d{{1,3}}|[\sx]?)\][.:]?\s                      # [1] What ...   [ ] What ...
    | {QUESTION_LABEL}\s*(?:[.):][*_]*(?=\s|$)|：)       # Question 1: What ...   Question one: What ...   Q: What ...
    """)
NO_QUESTION = re.compile(rf"(?i)[*_]*(?:{QUESTION_LABEL}|answer\s*#?\d*\s*[.):].*|a\d*\s*:.*|{THOUGHT}[*_\s]*:.*)")
QUOTES = (("**", "**"), ("__", "__"), *('""', "''", "“”", "‘’", "«»", "``", "**", "__"))
PREAMBLE = re.compile(r"(?i)(?:sure|certainly|of course|absolutely|okay|ok|here (?:are|is)|here's|below are)\b[^?]*")
CLOSING = re.compile(r"(?i)(?:please )?(?:let me know|feel free|i hope (?:this|these|you)|hope (?:this|these) help).*")
LABEL = re.compile(r"""(?ix)\A [*_]{0,2} (?:claim|statement|keywords?|keyword\ search|search(?:\ query)?|title)
    \s*\#?\d*\s* [*_]{0,2} \s*[:：]\s* [*_]{0,2} \s*""")
SEPARATOR, MAX_KEY = re.compile(r"[\s,;、，]"), 10
QUESTION_MARK = re.compile("[?？؟\u037e՞፧⁇¿]")
AUXILIARY = r"(?:is|are|was|were|do|does|did|can|could|will|would|should|shall|has|have|had|must|might)"
INTERROGATIVE = rf"""(?: (?:what|why|who|whose|whom|which|how)\b | (?:when|where)\s+{AUXILIARY}\b
    | (?:in|on|at|to|for|from|by|under|with|of|during|through)\s+(?:what|which|whose|whom)\b
    | {AUXILIARY}\s+(?!not\b)\w )"""
# Words of the second group can also be nouns or adjectives ("List of subsidiaries", "State law"): what follows decides.
IMPERATIVE = r"""(?: (?:explain|discuss|describe|define|compare|identify|calculate|compute|analy[sz]e|summari[sz]e|
        evaluate|assess|illustrate|elaborate|enumerate|clarify|distinguish|differentiate|justify|interpret)\b
    | (?:list|name|outline|provide|give|tell|state|show|find|mention|specify|determine|estimate|highlight|examine|
        consider)\s+
      (?:the|an?|all|any|at|each|every|some|one|two|three|four|five|\d+|how|what|why|who|when|where|which|whether|
        me|us|its|their|your|details?|specific|examples?|reasons?)\b )"""
REFERS_BACK = re.compile(r"(?i)\b(?:it|its|they|them|their|he|him|his|she|her|this|that|these|those)\b")
CLAUSE_OPENING = r"""(?:in|on|at|to|for|from|by|under|with|given|during|based|according|using|as|if|considering|after|
    before|when|per|regarding|concerning|assuming|additionally|also|then|finally|next|furthermore)\b"""
ASKS = re.compile(rf"""(?ix) (?:^|[.!;:]["'”)]*\s+) (?:please\s+)? (?: {INTERROGATIVE} | {IMPERATIVE}
    | {CLAUSE_OPENING} (?:(?:[^,.!]|\.(?=\S))+,){{1,4}} \s* (?:please\s+)? (?:{IMPERATIVE} | (?:what|why|how)\b) )""")


@dataclass(frozen=True)
class Kind:
    """A kind of text to search with: how a model is asked for it, and how it is found in the reply."""

    name: str
    keys: tuple[str, ...]  # of the list in a JSON reply; the model is asked for the first
    template: str
    fits: Callable[[str], bool]  # whether a line can be one

    @property
    def response_format(self) -> dict[str, Any]:
        """JSON with the list alone, as the chat API wants it described."""
        properties = {self.keys[0]: {"type": "array", "items": {"type": "string"}}}
        schema = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
        return {"type": "json_schema", "json_schema": {"name": self.keys[0], "strict": True, "schema": schema}}


def _states(text: str) -> bool:
    """Whether a text asks nothing and is longer than a JSON key."""
    return len(text) > MAX_KEY and not QUESTION_MARK.search(text)


def _has_several_words(text: str) -> bool:
    return bool(SEPARATOR.search(text) and not QUESTION_MARK.search(text))


def fill_template(template: str, *, text: str, num_questions: int) -> str:
    """Fills {text} and {num_questions} into a prompt template; other braces stay. `ValueError`: it lacks {text}."""
    if "{text}" not in template:
        raise ValueError("the prompt template has no {text} placeholder for the chunk")
    # In one pass, so that braces in the passage itself are not replaced.
    return re.sub(r"\{(?:(text)|num_questions)\}", lambda match: text if match[1] else str(num_questions), template)


def message_text(content: Any) -> str:
    """The text of a chat message: a string, a part with a "text", or a list of both. Parts of another type than "text"
    or "output_text" are left out: thinking, images and the like."""
    if isinstance(content, list):
        return "".join(map(message_text, content))
    if isinstance(content, dict) and content.get("type", "text") in ("text", "output_text"):
        content = content.get("text")
    return content if isinstance(content, str) else ""


def parse_reply(text: str, num_questions: int, kind: Kind | None = None) -> list[str]:
    """Returns up to `num_questions` distinct questions from a reply; raises `ValueError` if there are none.

    Drops reasoning: everything before a closing tag such as </think>, or after an opening one. If a heading such as
    "Final answer:" or a line with any other closing tag is followed by questions, only those count. In JSON, they are
    the strings under "questions", else those that ask; in broken JSON, complete strings that ask; elsewhere, lines that
    ask, without numbering, bullets and quotes, but no preambles ("Here are two questions:") or answers ("A1: ...").
    "What is A? What is B?" on one line is two questions if `num_questions` leaves room for both. So for another kind
    (None: QUESTION), under its own keys, where a text must fit the kind instead of asking."""
    kind = kind or QUESTION
    text = _without_thoughts(text.strip("\ufeff \n"))
    if '\\"' in text and '"' not in text.replace('\\"', ""):  # JSON, escaped without quotes around it
        text = text.replace('\\"', '"')
    for part in dict.fromkeys((ANSWER_FOLLOWS.split(text)[-1], text)):
        if found := _find_questions(part, num_questions, kind):
            return _apart(found, num_questions)
    raise ValueError(f"no {kind.name} in the reply")


def _find_questions(text: str, num_questions: int, kind: Kind) -> list[str]:
    found = _first_distinct(_json_questions(text, num_questions, kind), num_questions, kind)
    if not found and not JSON_LINE.search(text):
        fence = FENCE.search(text)
        found = _first_distinct(_fitting_lines(fence[1], kind), num_questions, kind) if fence else []
        found = found or _first_distinct(_fitting_lines(text, kind), num_questions, kind)
    return found


def _apart(questions: list[str], num_questions: int) -> list[str]:
    """The questions, with those on one line apart if that makes no more than `num_questions`."""
    parts = [part for question in questions for part in _parts(question)]
    return (
        _first_distinct(parts, num_questions, QUESTION) if len(questions) < len(parts) <= num_questions else questions
    )


def _parts(question: str) -> list[str]:
    """The questions of "What is A? What is B?"; a single one if another part is short or refers back ("Why is it?")."""
    first, *others = re.split(r"(?<=\?)\s+", question)
    are_whole = all(len(part.split()) > 2 for part in (first, *others))
    stand_alone = all(ASKS.match(part) and not REFERS_BACK.search(part) for part in others)
    return [first, *others] if are_whole and stand_alone else [question]


def _first_distinct(lines: Iterable[str], num_questions: int, kind: Kind) -> list[str]:
    """The first `num_questions` questions among `lines`, read only that far: a reply may have 400,000 lines."""
    distinct: dict[str, str] = {}
    for line in lines:
        question = strip_numbering(line) if len(line) <= MAX_CHARACTERS else ""
        if kind is not QUESTION:  # a question listed in JSON is trusted, since it may be in any language
            question = LABEL.sub("", question)
            question = question if kind.fits(question) else ""
        is_whole = not any("\ud800" <= character <= "\udfff" for character in question)  # no lone surrogate
        if is_whole and any(map(str.isalnum, question)) and not NO_QUESTION.fullmatch(question):
            distinct.setdefault(question.casefold(), question)
        if len(distinct) == num_questions:
            break
    return list(distinct.values())


def asks(text: str) -> bool:
    """Whether a text has a question mark, or a sentence that asks or instructs ("In the context of x, explain y")."""
    has_letter = any(map(str.isalpha, text))
    return has_letter and bool(QUESTION_MARK.search(text) or (not text.endswith(":") and ASKS.search(text)))


def _without_thoughts(text: str) -> str:
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(text)
        return _without_thoughts(value) if isinstance(value, str) else text  # JSON, whatever its questions mention
    answer = ROLE.sub("", END_OF_THOUGHT.split(ESCAPED_TAG.sub(r"<\1>", text))[-1].lstrip())
    return END_OF_REPLY.split(answer, maxsplit=1)[0]


def _fitting_lines(text: str, kind: Kind) -> Iterator[str]:
    """The distinct lines that fit the kind (for questions: that ask) and are neither a preamble nor, as only other
    kinds could take it for one, a closing. HTML line breaks, adjacent tags and "? 2. " end a line, too."""
    for line in map(str.strip, dict.fromkeys(LINE_END.sub("\n", text).splitlines())):
        is_short = len(line) <= MAX_CHARACTERS and not line.rstrip("*_ ").endswith(":")
        is_frame = PREAMBLE.fullmatch(line) or (kind is not QUESTION and CLOSING.fullmatch(line))
        if is_short and not is_frame and kind.fits(strip_numbering(line)):
            yield line


def _json_questions(text: str, num_questions: int, kind: Kind, *, max_attempts: int = 1_000) -> list[str]:
    """The questions of the last JSON value that has enough, else of all; in broken JSON, strings that fit the kind."""
    values, position = [], 0
    for _ in range(max_attempts):
        if not (start := JSON_START.search(text, position)):
            break
        try:
            value, position = json.JSONDecoder().raw_decode(text, start.start())
            strings = list(_strings(value, kind.keys))
        except (ValueError, RecursionError):
            position = start.start() + 1
            continue
        listed = [string for string, is_listed in strings if is_listed]
        values.append(listed or [string for string, _ in strings if kind.fits(string[:MAX_CHARACTERS])])
    if not any(values):
        begin = JSON_START.search(text)
        broken = text[begin.start() : begin.start() + 20 * MAX_CHARACTERS] if begin else ""
        return [string for _, string in STRING.findall(broken) if kind.fits(string)]
    enough = [value for value in values if len(value) >= num_questions]
    return enough[-1] if enough else [string for value in values for string in value]


def _strings(value: Any, keys: tuple[str, ...], is_listed: bool = False) -> Iterator[tuple[str, bool]]:
    """Yields every string of a JSON value, and whether it is listed under one of the keys, such as "questions"."""
    with contextlib.suppress(TypeError, ValueError, RecursionError):
        value = json.loads(value) if JSON_START.match(value) else value  # JSON in a string of JSON
    if isinstance(value, str):
        yield value, is_listed
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _strings(inner, keys, key.casefold() in keys)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, keys, is_listed)


def strip_numbering(line: str, *, max_layers: int = 8) -> str:
    """Strips numbering, bullets, tags, control characters, and marks, quotes or table bars around a whole line."""
    line = " ".join(CONTROL.sub("", line).split())
    for _ in range(max_layers):
        before = line
        line = EDGE_TAG.sub("", line) if "<" in line else line
        line = line.removesuffix(",") if line[:1] == '"' else line
        for opening, closing in QUOTES:
            inside = line[len(opening) : -len(closing)]
            if inside and line.startswith(opening) and line.endswith(closing):
                line = line if opening in inside or closing in inside else inside.strip()
        if line[:1] == line[-1:] == "|":
            line = next(filter(asks, line.split("|")), line).strip("| ")
        # "**1.** What" and "**Question 1: What**": strips the numbering together with the mark before it.
        if match := NUMBERING.match(line) or NUMBERING.match(line, len(line) - len(line.lstrip("*_"))):
            mark, rest = line[: match.start()], line[match.end() :].strip()
            line = rest if match[0].endswith(mark) else rest.removesuffix(mark)
        if line == before:
            break
    return line


QUESTION = Kind("question", ("questions", "question"), TEMPLATE, asks)
CLAIM = Kind("claim", ("claims", "claim"), CLAIM_TEMPLATE, _states)
KEYWORDS = Kind("keywords", ("searches", "search", "keywords"), KEYWORDS_TEMPLATE, _has_several_words)
TITLE = Kind("title", ("titles", "title"), TITLE_TEMPLATE, _has_several_words)
KINDS = {kind.name: kind for kind in (QUESTION, CLAIM, KEYWORDS, TITLE)}
