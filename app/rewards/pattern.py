"""A reward for responses that match a regular expression."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from pydantic import Field, field_validator

from app.rewards.part import IsolatedPart, Sample


class PatternReward(IsolatedPart):
    """`found` where the pattern matches the response text, else `missing`. Isolated: some patterns take for ever on some texts."""

    type: Literal["pattern"]
    pattern: str = Field(min_length=1)
    """Regular expression of Python's `re`; flags are written inside, such as `(?i)`."""
    whole: bool = False
    """Match the whole response instead of looking for the pattern anywhere in it."""
    found: float = 1.0
    """Score of a response that matches."""
    missing: float = 0.0
    """Score of one that does not."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"no regular expression ({error}): mend it, and write it in single quotes in TOML") from error
        return pattern

    def score(self, samples: Sequence[Sample]) -> list[float]:
        """One of the two scores per sample."""
        compiled = re.compile(self.pattern)
        match = compiled.fullmatch if self.whole else compiled.search
        return [self.found if match(sample.text) else self.missing for sample in samples]
