"""Why a position of a block has no label; shared by alignment, labels and reports."""

REASONS = (
    "trained",
    "inside an expression",
    "before a repeated expression",
    "no boundary of the translation there",
    "last of its block",
    "no finite logit",
)
TRAINED, INSIDE, REPEATED, NO_BOUNDARY, LAST, NOT_FINITE = range(len(REASONS))
