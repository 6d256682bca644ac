"""Who may reach the doors: this machine alone, or whoever carries the token."""

from __future__ import annotations

import ipaddress
import os
import socket
from pathlib import Path

from app.config.serving import ServingConfig
from app.errors import ConfigError

TOKEN_VARIABLE = "CORRAL_SERVE_TOKEN"


def bearer_token(config: ServingConfig) -> str | None:
    """The token of `serving.token_file`, else of the environment, else None. Raises ConfigError for a file that holds none, and where
    the host is open to others and there is no token."""
    token = os.environ.get(TOKEN_VARIABLE) or None if config.token_file is None else _read(config.token_file)
    if token is None and not ipaddress.ip_address(listening_address(config.host)).is_loopback:
        raise ConfigError(
            f"serving.host = {config.host}: others can reach it and requests would need no token; "
            f"set serving.token_file or {TOKEN_VARIABLE}, or listen on 127.0.0.1"
        )
    return token


def listening_address(host: str) -> str:
    """The IP address of an interface that is named by address or name. Raises ConfigError."""
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise ConfigError(f"serving.host = {host}: no such host ({error.strerror}); use 127.0.0.1") from error


def _read(file: str) -> str:
    try:
        token = Path(file).expanduser().read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"serving.token_file = {file}: cannot be read ({error}); check the path") from error
    if not token.isascii() or len(token.split()) != 1:
        raise ConfigError(f"serving.token_file = {file}: holds no token; write one word into it, such as `openssl rand -hex 32` prints")
    return token
