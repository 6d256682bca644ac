"""The one shape of a finding."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One finding; `remedy` where it failed; node: the node of a cluster that it is about, None for this machine or all of them."""

    name: str
    finding: str
    remedy: str | None = None
    node: str | None = None

    @property
    def failed(self) -> bool:
        return self.remedy is not None

    def __str__(self) -> str:
        place = "" if self.node is None else f"node {self.node}: "
        remedy = "" if self.remedy is None else f" - {self.remedy}"
        return f"{'FAILED' if self.failed else 'ok    '} {place}{self.name}: {self.finding}{remedy}"
