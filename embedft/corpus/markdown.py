"""Splits Markdown into sections at its headings and strips HTML; code stays as it is."""

import html
import re
from collections.abc import Iterator, Sequence

FENCED_BLOCK = r"^[ \t]*(?P<fence>`{3,}|~{3,})[^\n]*(?:\n.*?^[ \t]*(?P=fence)[`~]*[ \t]*$|.*\Z)"
BLOCK = re.compile(rf"{FENCED_BLOCK}|^[^\n]*$", re.MULTILINE | re.DOTALL)
CODE = re.compile(rf"{FENCED_BLOCK}|(?<!`)(?P<ticks>`+)(?!`)(?:(?!\n\s*\n).)+?(?<!`)(?P=ticks)(?!`)", re.M | re.S)
HEADING = re.compile(r" {0,3}(#{1,6})(?:\s|$)")
UNDERLINE = re.compile(r" {0,3}(=+|-{2,})[ \t]*")
NO_TITLE = re.compile(r"\s*$| {4}|\s*(?:[-*+>|#]|\d+[.)]\s)")  # an underline makes no heading of such a line
HTML = re.compile(
    r"""<!--.*?(?:-->|\Z) | <(?P<raw>script|style)\b.*?(?:</(?P=raw)\s*>|\Z)
      | </?(?: a|abbr|b|bdi|bdo|big|button|cite|code|data|del|dfn|em|font|i|iframe|img|input|ins|kbd|label|mark|nobr
          |picture|q|s|samp|small|source|span|strike|strong|sub|sup|svg|path|time|tt|u|var|video|wbr
        | (?P<block>address|article|aside|blockquote|br|center|dd|details|div|dl|dt|figcaption|figure|footer|form|h[1-6]
          |header|hr|li|main|nav|ol|p|pre|section|summary|table|tbody|td|tfoot|th|thead|tr|ul) )(?:\s[^<>]*)?/?>""",
    re.DOTALL | re.IGNORECASE | re.VERBOSE,
)


def split_sections(pages: Sequence[str]) -> list[list[tuple[str, tuple[str, ...]]]]:
    """Returns the (text, headings) of the sections of each page; the headings go on from page to page.

    A section begins with its heading line. A heading that another one follows at once is in that one's section.
    """
    path: list[tuple[int, str]] = []
    result = []
    for page in pages:
        sections, lines, has_body = [], [], False
        for block, level, title in [*_blocks(strip_html(page)), ("", 1, None)]:
            if level and (has_body or title is None):
                sections.append(("\n".join(lines).strip("\n"), tuple(heading for _, heading in path)))
                lines, has_body = [], False
            if title:
                path = [heading for heading in path if heading[0] < level] + [(level, title)]
            has_body = has_body or (not level and bool(block.strip()))
            lines.append(block)
        result.append(sections)
    return result


def strip_html(text: str) -> str:
    """Removes tags and comments and decodes entities, except in code. Only names of HTML are tags: `<size>` stays."""
    parts, end = [], 0
    for start, stop in [*(code.span() for code in CODE.finditer(text)), (len(text), len(text))]:
        outside = HTML.sub(lambda tag: " " if tag["block"] else "", text[end:start])
        parts += [html.unescape(outside), text[start:stop]]
        end = stop
    return "".join(parts)


def _blocks(text: str) -> Iterator[tuple[str, int, str]]:
    """Yields (text, level, title) of each line, fenced code block and heading; level 0: no heading."""
    blocks = [(match[0], bool(match["fence"])) for match in BLOCK.finditer(text)]
    before, i = "", 0
    while i < len(blocks):
        block, is_code = blocks[i]
        below = blocks[i + 1][0] if i + 1 < len(blocks) else ""
        heading = None if is_code else HEADING.match(block)
        underline = None if is_code or before.strip() or NO_TITLE.match(block) else UNDERLINE.fullmatch(below)
        if heading:
            yield block, len(heading[1]), " ".join(re.sub(r"(?:^|\s)#+\s*$", "", block[heading.end() :]).split())
        elif underline:
            yield f"{block}\n{below}", 1 if "=" in underline[1] else 2, " ".join(block.split())
            i += 1
        else:
            yield block, 0, ""
        before = "" if is_code or heading or underline else block
        i += 1
