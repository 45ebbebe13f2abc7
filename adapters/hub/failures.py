"""What went wrong at the hub, as one line and one hint."""

from __future__ import annotations

from typing import cast

from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from draftloom.errors import ModelError

from .repository import Repository

__all__ = ["FAILURES", "explain", "is_unreachable"]

LOGIN = "`hf auth login` with a token that may read it, or set HF_TOKEN"
CACHED = "what is in the cache serves with --offline"

TransportError = cast(
    "type[Exception]", next(c for c in HfHubHTTPError.__mro__ if c.__name__ == "HTTPError")
)
"""Base of what the hub client's HTTP library raises; which library that is differs by version."""

FAILURES = (HfHubHTTPError, EntryNotFoundError, TransportError, OSError, ValueError)
"""All that a download can raise."""


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error stands for."""
    response = getattr(error, "response", None)
    return getattr(response, "status_code", None) if isinstance(error, HfHubHTTPError) else None


def is_unreachable(error: BaseException) -> bool:
    """Whether the hub gave no answer, or none for now: then what is cached may serve."""
    status = status_of(error)
    if status is not None:
        return status >= 500 or status in (408, 429)
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, TransportError):
        return is_unreachable(error.__cause__)
    return isinstance(error, OfflineModeIsEnabled | TransportError | LocalEntryNotFoundError)


def explain(repository: Repository, error: BaseException) -> ModelError:
    """The error that a user sees."""
    return ModelError(*_lines(repository, error))


def _lines(repository: Repository, error: BaseException) -> tuple[str, str]:
    name, status = repository.name, status_of(error)
    if isinstance(error, GatedRepoError):
        if status == 401:
            return f"{name} is gated, and you are not logged in", f"accept its terms, then {LOGIN}"
        return (
            f"{name} is gated, and your account may not read it",
            "accept its terms on its page at the hub, with the account of your token",
        )
    if isinstance(error, DisabledRepoError):
        return f"{name} has been disabled by the hub", CACHED
    if isinstance(error, RevisionNotFoundError):
        return (
            f"{name} has no revision {repository.revision!r}",
            "after the @ comes a branch, a tag or a whole commit hash",
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"no hub repository {name} (or it is private), and no such folder",
            f"check the name; for a private one, {LOGIN}",
        )
    if status is not None:
        return _by_status(repository, status, error)
    if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError):
        return _offline(repository, error)
    first = _first_line(error)
    if isinstance(error, TransportError):
        return (
            f"{repository} cannot be downloaded, the connection failed: {first}",
            f"check the network and run it again: whole files are kept; {CACHED}",
        )
    return f"{repository} cannot be downloaded: {first}", "check the network and the disk"


def _by_status(repository: Repository, status: int, error: BaseException) -> tuple[str, str]:
    what = f"{repository} cannot be downloaded: the hub answers {status}"
    if status == 401:
        return f"{what}, you are not logged in or your token is not valid", LOGIN
    if status == 403:
        return f"{what}, your token may not read it", LOGIN
    if status == 404:
        missing = getattr(getattr(error, "response", None), "url", "")
        return f"{what} for {missing}", "was the repository changed? run it again"
    if status == 429:
        return f"{what}, too many requests", f"wait some minutes, or log in; {CACHED}"
    if status >= 500:
        return f"{what}, it has a problem of its own", f"try again later; {CACHED}"
    return f"{what}: {_first_line(error)}", "check name and revision"


def _offline(repository: Repository, error: BaseException) -> tuple[str, str]:
    cause = error.__cause__  # the hub client says "not cached" of whatever kept it from the hub
    if isinstance(cause, TransportError):
        return _lines(repository, cause)
    return (
        f"{repository} is not (wholly) in the cache, and this run is offline",
        "run it once without --offline and HF_HUB_OFFLINE",
    )


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
