"""Which of a model's prompts is for queries, and which for documents, by the names that published models give them.

    choose_prompts({"s2p_query": "Given a question, ...: ", "s2s_query": "..."})      # adds "query"

The names "query" and "document" always win, even with an empty text. Of several other names of a role, none is chosen
unless their texts are the same: --query-prompt NAME and --document-prompt NAME then choose.
"""

import re
from collections.abc import Iterable, Mapping

from .adapter import ROLES

# {role: other names that it has}, in lower case, with one _ for each run of other characters. The only names of
# semantic similarity, clustering or classification are left out: those tasks have no query and no document.
ALIASES = {
    "query": ("queries", "question", "search_query", "retrieval_query", "s2p_query", "web_search_query"),
    "document": ("doc", "documents", "passage", "passages", "corpus", "search_document", "search_passage",
                 "retrieval_document", "retrieval_passage", "s2p_document", "s2p_passage"),
}  # fmt: skip
SUFFIXES = ("", "_prefix", "_prompt", "_instruction")  # "query_prefix", "document_prompt"


def names_of(role: str, names: Iterable[str]) -> list[str]:
    """Those of the names that stand for a role: the role's own, or else all of its aliases."""
    names = list(names)
    if role in names:
        return [role]
    known = {alias + suffix for alias in (role, *ALIASES[role]) for suffix in SUFFIXES}
    return [name for name in names if re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") in known]


def choose_prompts(prompts: Mapping[str, str]) -> dict[str, str]:
    """The prompts, with those of queries and documents under these names too, where their aliases agree on one text."""
    chosen = {}
    for role in ROLES:
        texts = {prompts[name] or "" for name in names_of(role, prompts)}
        if len(texts) == 1 and role not in prompts:
            chosen[role] = texts.pop()
    return {**prompts, **chosen}
