"""Words that this project no longer uses; CONTRIBUTING.md has those that it does."""

import re

_WORDS = (
    "science",
    "dearest",
    "anew",
    "(?:cannot|could not|can) be had",
    "(?:is|are) said",
    "and said(?=[.,;:])",
    "go(?:es)? on",
    "went on",
    "what came of",
)
OLD_WORDS = re.compile(rf"\b(?:{'|'.join(_WORDS)})\b")
