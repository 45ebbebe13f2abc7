"""Errors: one line each, with the nearest name where a name is unknown."""

import pytest

from draftloom import (
    DraftloomError,
    GenerationError,
    GraphError,
    ModelError,
    PluginError,
    Problem,
    UnknownNameError,
    UnsupportedModelError,
    UsageError,
)
from draftloom.errors import did_you_mean

KNOWN = ("greedy", "speculative-sampling", "auto")


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("gready", "greedy"),
        ("speculative_sampling", "speculative-sampling"),
        ("speculativ", "speculative-sampling"),
    ],
)
def test_did_you_mean_names_the_nearest_and_all(wrong: str, nearest: str) -> None:
    hint = did_you_mean(wrong, KNOWN)
    assert hint == f"did you mean {nearest!r}? known: auto, greedy, speculative-sampling"


def test_did_you_mean_does_not_guess_wildly() -> None:
    assert did_you_mean("xyzzy", KNOWN) == "known: auto, greedy, speculative-sampling"


def test_did_you_mean_with_nothing_known() -> None:
    assert did_you_mean("xyzzy", ()) == "none are registered"


def test_hint_follows_the_message() -> None:
    error = UsageError("width must be positive", "leave it out")
    assert str(error) == "width must be positive (leave it out)"
    assert (error.message, error.hint) == ("width must be positive", "leave it out")
    assert str(UsageError("width must be positive")) == "width must be positive"


def test_unknown_name_says_kind_name_and_nearest() -> None:
    error = UnknownNameError("acceptance", "gready", KNOWN)
    assert str(error).startswith("no acceptance named 'gready' (did you mean 'greedy'?")
    assert (error.kind, error.name) == ("acceptance", "gready")


def test_graph_error_lists_every_problem_in_order() -> None:
    problems = [Problem("verify", "reads nothing", "connect it"), Problem("accept", "too late")]
    error = GraphError(problems)
    assert error.problems == tuple(problems)
    assert str(error) == "2 problems: verify: reads nothing (connect it); accept: too late"


def test_graph_error_with_one_problem_does_not_count() -> None:
    assert str(GraphError([Problem("dtype", "unknown")])) == "dtype: unknown"


def test_generation_error_carries_what_was_committed() -> None:
    assert GenerationError("broken", token_ids=[3, 4]).token_ids == (3, 4)


@pytest.mark.parametrize(
    ("error", "builtin"), [(UsageError, ValueError), (UnknownNameError, LookupError)]
)
def test_usual_except_clauses_catch_them(error: type, builtin: type) -> None:
    assert issubclass(error, builtin)


@pytest.mark.parametrize(
    "error", [UsageError, ModelError, UnsupportedModelError, PluginError, GenerationError]
)
def test_one_base_class_and_one_line(error: type[DraftloomError]) -> None:
    raised = error("something is wrong", "do this")
    assert isinstance(raised, DraftloomError)
    assert "\n" not in str(raised)
