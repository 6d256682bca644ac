"""The doors' access log: one JSON object per request and line."""

from __future__ import annotations

import json
import logging
import sys
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from serve.protocol.messages import InferResponse

LOGGER = logging.getLogger("corral.access")
LONGEST_ID = 128


@dataclass
class Entry:
    """One request, filled in while it is answered. method: HTTP method and path, or the name of the remote procedure."""

    protocol: Literal["http", "grpc"]
    method: str
    request_id: str
    model: str = ""
    version: str = ""
    sequences: int = 0
    tokens: int = 0
    status: str = ""
    reason: str = ""
    started: float = field(default_factory=time.perf_counter)

    def answered(self, response: InferResponse) -> None:
        """Who answered, and how much."""
        self.model, self.version = response.identity.name, response.identity.version
        self.sequences, self.tokens = len(response.lengths), sum(response.lengths)

    def write(self) -> None:
        """The line."""
        record: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": self.request_id[:LONGEST_ID],
            "protocol": self.protocol,
            "method": self.method[:256],
            "model": self.model,
            "version": self.version,
            "sequences": self.sequences,
            "tokens": self.tokens,
            "status": self.status,
            "ms": round(1000 * (time.perf_counter() - self.started), 2),
        }
        if self.reason:
            record["reason"] = self.reason[:256]
        LOGGER.info(json.dumps(record))


def open_log(file: str | None) -> None:
    """Where lines go: appended to the file, or to standard output."""
    if file:
        Path(file).expanduser().parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(Path(file).expanduser()) if file else logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    LOGGER.handlers = [handler]
    LOGGER.propagate = False
    LOGGER.setLevel(logging.INFO)
