"""The bearer token at the doors. What travels to replicas and is kept there is its digest, not the token."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass

from app.errors import UnauthorizedError


@dataclass(frozen=True)
class Credentials:
    """digest: of the token that requests must carry; None lets everybody in."""

    digest: bytes | None = None

    @classmethod
    def of(cls, token: str | None) -> Credentials:
        return cls(None if token is None else _digest(token))

    def check(self, authorization: str | None) -> None:
        """`authorization`: the header's value, `Bearer TOKEN`. Raises UnauthorizedError; takes the same time for any wrong token."""
        if self.digest is None:
            return
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(_digest(token.strip()), self.digest):
            raise UnauthorizedError("the request needs the header `Authorization: Bearer TOKEN` with the service's token")


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="replace")).digest()
