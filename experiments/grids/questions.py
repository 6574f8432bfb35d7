"""Do questions of a language model train better than what the chunks themselves ask, and does a mix of kinds help?

Inverse cloze, and a mix of the published questions with titles, claims and keywords taken from the same chunks: whole,
and the questions or keywords of it. The whole mix has more pairs, and so more steps. Validation has questions by a
language model, so it is on their side. The chunks of the mix lack their titles and most of the claims' sentences.
"""

from experiments.grid_data import LYFT, lyft, tests

ICT, MIX = [lyft("ict")[0]], [lyft("mix")[0]]

BASE = LYFT
POINTS = [
    {"data": ICT},
    {"data": MIX},
    {"data": MIX, "kinds": ["question"]},
    {"data": MIX, "kinds": ["keywords"]},
    {"data": MIX, "kinds": ["question", "keywords"]},
]
SEEDS = [0, 1, 2]
TESTS = tests()
