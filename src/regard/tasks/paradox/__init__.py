"""The generative AI paradox (arXiv:2311.00059): what a model can create beside what it understands.

Of T items with generation scores g and understanding scores s in [0, 1],

    G = mean g,  U = mean s,  gap = G - U,  r = Pearson(g, s),  brittleness = mean s_easy - mean s_hard

where s is 1 if the answerer picks the right candidate out of K (selective; chance 1/K), or the share of questions about
its own output that it answers right (interrogative). The hypothesis: against people, models have G at least as high
and U lower (1), a weaker r (2), and more brittleness (3). People's scores are the caller's.
"""

from regard.tasks.paradox.items import ParadoxItem, read_records, shuffled, write_records
from regard.tasks.paradox.report import ParadoxReport, by_domain
from regard.tasks.paradox.select import Selection, read_letter, select_by_likelihood

__all__ = [
    "ParadoxItem",
    "ParadoxReport",
    "Selection",
    "by_domain",
    "read_letter",
    "read_records",
    "select_by_likelihood",
    "shuffled",
    "write_records",
]
