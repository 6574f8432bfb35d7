"""Whether a text asks something: by its question mark, or by how an English sentence opens.

    asks("Explain how drivers are paid.")   # True
    asks("Here are two questions:")         # False

Not here: whether the question is any good (cleaning.py).
"""

import re

QUESTION_MARK = re.compile("[?？؟\u037e՞፧⁇¿]")
AUXILIARY = r"(?:is|are|was|were|do|does|did|can|could|will|would|should|shall|has|have|had|must|might)"
INTERROGATIVE = rf"""(?: (?:what|why|who|whose|whom|which|how)\b | (?:when|where)\s+{AUXILIARY}\b
    | (?:in|on|at|to|for|from|by|under|with|of|during|through)\s+(?:what|which|whose|whom)\b
    | {AUXILIARY}\s+(?!not\b)\w )"""
# The second group are nouns and adjectives as well ("List of subsidiaries", "State law"): what follows decides.
IMPERATIVE = r"""(?: (?:explain|discuss|describe|define|compare|identify|calculate|compute|analy[sz]e|summari[sz]e|
        evaluate|assess|illustrate|elaborate|enumerate|clarify|distinguish|differentiate|justify|interpret)\b
    | (?:list|name|outline|provide|give|tell|state|show|find|mention|specify|determine|estimate|highlight|examine|
        consider)\s+
      (?:the|an?|all|any|at|each|every|some|one|two|three|four|five|\d+|how|what|why|who|when|where|which|whether|
        me|us|its|their|your|details?|specific|examples?|reasons?)\b )"""
CLAUSE_OPENING = r"""(?:in|on|at|to|for|from|by|under|with|given|during|based|according|using|as|if|considering|after|
    before|when|per|regarding|concerning|assuming|additionally|also|then|finally|next|furthermore)\b"""
ASKS = re.compile(
    rf"""(?:^|[.!;:]["'”)]*\s+) (?:please\s+)?
        (?: {INTERROGATIVE} | {IMPERATIVE}
          | {CLAUSE_OPENING} (?:(?:[^,.!]|\.(?=\S))+,){{1,4}} \s*
            (?:please\s+)? (?:{IMPERATIVE} | (?:what|why|how)\b) )""",
    re.IGNORECASE | re.VERBOSE,
)


def asks(text: str) -> bool:
    """Whether a text asks: a question mark, or a sentence that opens with an interrogative or asking imperative.

    The imperative may follow an opening clause ("In the context of revenue recognition, explain ..."). A text that
    ends with a colon announces; one without a letter asks nothing.
    """
    if not any(character.isalpha() for character in text):
        return False
    return bool(QUESTION_MARK.search(text) or (not text.endswith(":") and ASKS.search(text)))
