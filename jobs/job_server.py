"""The job server of a running Ray cluster: connecting to it, following a job, and what its end means."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import aiohttp
import ray
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from app.errors import ConfigError, CorralError, first_line
from jobs.local_ray import use_token

ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"
TIMEOUT_SECONDS = (10.0, 120.0)
"""To connect, and between two pieces of an answer. Ray's own client waits for ever."""
RECONNECT_SECONDS, LOST_SECONDS = 2.0, 120.0
"""Between two looks at a job, and the longest time without an answer before following it is given up."""


REMEDY = "start one with `ray start --head`, or give --address=http://HEAD:8265"
TOKEN_REMEDY = "put the cluster's own (`ray get-auth-token` on its head) into RAY_AUTH_TOKEN, or into ~/.ray/auth_token"


class JobServer(JobSubmissionClient):
    """Ray's client, with deadlines. Make one with `connect`."""

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        return super()._do_request(method, endpoint, **({"timeout": TIMEOUT_SECONDS} | options))

    @property
    def ray_version(self) -> str:
        """Of the cluster."""
        return str(self._server_ray_version)


def connect(address: str | None) -> JobServer:
    """The job server at `address`, the URL of a Ray dashboard; None: the one that RAY_API_SERVER_ADDRESS or RAY_ADDRESS names, else a
    Ray on this machine. Raises ConfigError where none answers, it refuses the token, or its Ray is of another version."""
    use_token()
    where = address or os.environ.get(ADDRESS_VARIABLE) or os.environ.get("RAY_ADDRESS") or "the default address"
    try:
        with _preferred(address):
            server = JobServer()
    except AuthenticationError as error:
        raise ConfigError(f"{where} {_token_refused(error)}") from error
    except requests.RequestException as error:
        raise ConfigError(f"{where} is no Ray dashboard ({first_line(error)}): {REMEDY}") from error
    except (ConnectionError, RuntimeError, ValueError, KeyError) as error:
        raise ConfigError(f"no Ray cluster answers at {where} ({first_line(error)}): {REMEDY}") from error
    if server.ray_version != ray.__version__:
        raise ConfigError(
            f"{where} runs Ray {server.ray_version}, and this is Ray {ray.__version__}: install Ray {server.ray_version} here or "
            f"{ray.__version__} on the cluster"
        )
    return server


@contextmanager
def _preferred(address: str | None) -> Iterator[None]:
    """Ray prefers what the environment says to the address that its client is given: for the length of a block both say the same."""
    before = os.environ.get(ADDRESS_VARIABLE)
    if address is not None:
        os.environ[ADDRESS_VARIABLE] = _as_url(address)
    try:
        yield
    finally:
        if address is not None:
            del os.environ[ADDRESS_VARIABLE]
            os.environ.update({ADDRESS_VARIABLE: before} if before is not None else {})


def _as_url(address: str) -> str:
    """The address with a scheme. ConfigError for one that is no web address."""
    scheme, separator, _ = address.partition("://")
    if not separator:
        return f"http://{address}"
    if scheme not in ("http", "https"):
        raise ConfigError(f"--address={address}: give the URL of the Ray dashboard, such as http://head:8265")
    return address


def _token_refused(error: AuthenticationError) -> str:
    wrong = "Authentication failed" in str(error)
    return f"{'refuses the token it was given' if wrong else 'asks for a token'}: {TOKEN_REMEDY}"


def ask(question: Callable[[], Any]) -> Any:
    """An answer of the job server. Raises ConfigError for a job that it does not know, CorralError where it does not answer."""
    try:
        return question()
    except AuthenticationError as error:
        raise ConfigError(f"the cluster {_token_refused(error)}") from error
    except RuntimeError as error:
        raise ConfigError(f"the job server refused: {first_line(error)}; `corral runs --address=...` lists its jobs") from error
    except (requests.RequestException, ConnectionError) as error:
        raise CorralError(f"the job server does not answer any more ({first_line(error)}): look at the cluster's head") from error


def follow(server: JobServer, job: str, write: Callable[[str], object]) -> JobDetails:
    """Write a job's output as it comes, from its beginning, until the job ends. A connection that breaks is made again.

    Raises CorralError when nothing has answered for LOST_SECONDS; the job may go on nevertheless.
    """
    written = 0
    silent_since: float | None = None

    async def stream() -> None:
        nonlocal written, silent_since
        position = 0
        async for text in server.tail_job_logs(job):
            new = text[max(0, written - position) :]
            position += len(text)
            written = max(written, position)
            silent_since = None
            write(new)

    while True:
        with suppress(aiohttp.ClientError, RuntimeError, OSError):
            asyncio.run(stream())
        try:
            info = server.get_job_info(job)
            silent_since = None
            if info.status.is_terminal():
                return info
        except AuthenticationError as error:
            raise ConfigError(f"the cluster {_token_refused(error)}") from error
        except (requests.RequestException, ConnectionError, RuntimeError) as error:
            now = time.monotonic()
            silent_since = silent_since or now  # not since the last output: a job may say nothing for hours
            if now - silent_since >= LOST_SECONDS:
                raise CorralError(
                    f"the cluster has not answered for {LOST_SECONDS:g} s ({first_line(error)}); job {job} may go on: "
                    f"`corral logs {job} --follow` looks again"
                ) from error
        time.sleep(RECONNECT_SECONDS)


def exit_code(info: JobDetails) -> int:
    """What a command that ran the job itself would have returned: its own exit code, 130 where it was stopped."""
    if info.status == JobStatus.SUCCEEDED:
        return 0
    if info.status == JobStatus.STOPPED:
        return 130
    return int(info.driver_exit_code or 1)


def outcome(job: str, info: JobDetails) -> str:
    """How a job ended, in one line; with the reason where the job's own output cannot tell it."""
    reason = "" if info.driver_exit_code is not None or info.status != JobStatus.FAILED else f": {' '.join(str(info.message).split())}"
    return f"job {job}: {info.status}{reason}"
