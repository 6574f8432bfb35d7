"""What the words of a question show: whether it asks, repeats the prompt or points at a text that is not there.

The word lists are English. Not here: what is done with such questions (cleaning.py).
"""

import re

QUESTION_MARK = re.compile("[?？؟\u037e՞፧⁇¿]")
AUXILIARY = r"(?:is|are|was|were|do|does|did|can|could|will|would|should|shall|has|have|had|must|might)"
INTERROGATIVE = rf"""(?: (?:what|why|who|whose|whom|which|how)\b | (?:when|where)\s+{AUXILIARY}\b
    | (?:in|on|at|to|for|from|by|under|with|of|during|through)\s+(?:what|which|whose|whom)\b
    | {AUXILIARY}\s+(?!not\b)\w )"""
# The second group are nouns and adjectives too ("List of subsidiaries", "State law"): what follows decides.
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

PROMPT = re.compile(
    r"""\b(?: as\ an?\ (?:teacher|professor|instructor|educator|lecturer)\b
      | (?:teacher|professor)s?\ ?(?:/|or)\ ?(?:teacher|professor)
      | your\ students?\b | quiz(?:zes)?\b | diverse\ questions?\b
      | (?:exam|examination|test)\ questions?\b | questions?\ in\ an?\ exam | (?:upcoming|next)\ exam(?:ination)?\b
      | (?:would\ you\ like|do\ you\ want|let\ me\ know)\b.*\bquestions?\b )""",
    re.IGNORECASE | re.VERBOSE,
)

TEXT = r"(?:text|passage|document|excerpt|article|paragraph|snippet|chunk|context)"
SHOWN = r"(?:information|data|details|tables?|schedules?|statements?|figures?|definitions?|list|examples?|content)"
# What follows gives it another meaning: the text of the law, the text messages, the document retention policy,
# paragraph (d); the context of revenue recognition; information provided to investors.
OTHER_THING = r"""(?! \ of\b | \ \(?(?:\d|[a-z]\)|[ivx]+\b) | -\w
    | \ (?:messages?|fields?|editor|box|format|retention|management|review|requests?|production|holder|types?|titles?)\b
    )"""
OTHER_CONTEXT = rf"""(?! \ (?:of|for|in\ which|within\ which|surrounding|behind|around|where|when)\b
    (?!\ (?:the|this|an?)\ (?:given\ |provided\ )?{TEXT}\b) )"""
NOT_TO_SOMEBODY = (
    r"(?!\ (?:to|by|in|under|on|with|for|at|through|during|pursuant|within|that|as)\b"
    rf"(?!\ (?:the|this)\ {TEXT}\b))"
)
SOURCE = re.compile(
    rf"""\b(?: context\ information\b
      | (?:the|this)\ (?!context\b){TEXT}\b {OTHER_THING}
      | (?:the|from|per)\ context(?:\ information)?\b {OTHER_CONTEXT}
      | (?:the|this|these|from|in|on|under|to|per|using)\ (?:given|provided|above)
        \ (?:[\w-]+\ ){{0,3}}? (?:{TEXT}|{SHOWN}|information)s?\b
      | the\ following\ (?:text|passage|excerpt|paragraph|table|snippet)s?\b
      | {TEXT}\ (?:provided|given|above|below)\b
      | (?:{SHOWN}|information)\ (?:provided|given|presented|mentioned)\b {NOT_TO_SOMEBODY}
      | the\ above\b
      | (?:information|table|statement|section|figure|list)s?\ (?:above|below)\b
      | (?:as\ )?(?:mentioned|described|discussed|stated|listed|shown|outlined|presented|noted)\ (?:above|earlier|below|
          previously|here)\b
      | (?<!be\ )(?:mentioned|described|discussed)(?=[.,;?!]|$)
      | (?:in|from|on|according\ to|per)\ the\ (?:table|chart|figure|graph)s?\b (?!\ of\ (?!contents))
      | (?:the|this)\ authors?\b (?=['’,]|\ (?:say|state|argue|mention|suggest|mean|of\ (?:the|this)\ {TEXT}))
      | according\ to\ the\ author\b
      | (?:the|a)\ previous\ question\b )""",
    re.IGNORECASE | re.VERBOSE,
)


def asks(text: str) -> bool:
    """Whether a text has a question mark, or a sentence that asks or tells to ("In the context of x, explain y")."""
    has_letter = any(map(str.isalpha, text))
    return has_letter and bool(QUESTION_MARK.search(text) or (not text.endswith(":") and ASKS.search(text)))
