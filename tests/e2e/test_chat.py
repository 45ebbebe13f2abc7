"""`draftloom chat`: history, template, thinking switch, commands; piped in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx_lm
import pytest

LOOKUP = ("--drafter", "prompt-lookup", "--block-size", 4, "--max-tokens", 6)


@pytest.fixture(scope="session")
def answers(tiny_chat: Path) -> Callable[..., str]:
    """What the target alone answers: (messages, template options) -> text."""
    model, tokenizer = mlx_lm.load(str(tiny_chat))

    def answer(messages: list[dict[str, str]], **options: Any) -> str:
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **options)
        return mlx_lm.generate(model, tokenizer, prompt, max_tokens=6)

    return answer


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.slow
def test_piped_conversation(
    process: Callable[..., Any], tiny_chat: Path, answers: Callable[..., str]
) -> None:
    done = process("chat", "--target", tiny_chat, *LOOKUP, stdin="one\n\n  two  \n")
    first = answers([user("one")])
    second = answers([user("one"), assistant(first), user("two")])
    assert first != answers([user("two")])
    assert (done.code, done.err) == (0, "")
    assert done.out == f"{first}\n{second}\n"


def test_commands(cli: Callable[..., Any], tiny_chat: Path, answers: Callable[..., str]) -> None:
    lines = [
        "/stats", "one", "/reset", "two", "/thinking on", "/reset", "three", "/system Be brief.",
        "/thinking auto", "four", "/help", "/stats", "/quit", "never read",
    ]  # fmt: skip
    done = cli("chat", "--target", tiny_chat, *LOOKUP, stdin="\n".join(lines).encode())
    expected = [
        answers([user("one")]),
        answers([user("two")]),
        answers([user("three")], enable_thinking=True),
        answers([{"role": "system", "content": "Be brief."}, user("four")]),
    ]
    assert done.code == 0
    assert done.out == "".join(f"{text}\n" for text in expected)
    assert expected[2] != answers([user("three")])
    assert "no answer yet" in done.err
    assert "/thinking on|off|auto" in done.err
    assert "6 tokens" in done.err


def test_system_message_and_thinking_as_options(
    cli: Callable[..., Any], tiny_chat: Path, answers: Callable[..., str]
) -> None:
    options = ("--target", tiny_chat, *LOOKUP, "--system", "Be kind.", "--thinking")
    done = cli("chat", *options, stdin=b"hello")
    messages = [{"role": "system", "content": "Be kind."}, user("hello")]
    assert answers(messages, enable_thinking=True) != answers(messages)
    assert done.out == answers(messages, enable_thinking=True) + "\n"


def test_mistakes(cli: Callable[..., Any], tiny: Path, tiny_chat: Path) -> None:
    done = cli("chat", "--target", tiny, "--drafter", "prompt-lookup", stdin=b"hello")
    done.assert_mistake("no chat template", "draftloom generate")
    options = ("chat", "--target", tiny_chat, *LOOKUP)
    cli(*options, stdin=b"/rest").assert_mistake("/rest", "/reset")
    cli(*options, stdin=b"/thinking maybe").assert_mistake("/thinking maybe")
    cli(*options, stdin=b"x = 1 " * 500).assert_mistake("context holds 256")


def test_a_conversation_at_a_terminal_survives_a_long_message(
    cli: Callable[..., Any], tiny_chat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["x = 1 " * 500, "/nonsense", "hello"])

    def typed(_: bool) -> str | None:
        return next(lines, None)

    monkeypatch.setattr("draftloom.apps.cli.chat._read_line", typed)
    monkeypatch.setattr("draftloom.apps.cli.chat._interactive", lambda: True)
    done = cli("chat", "--target", tiny_chat, *LOOKUP)
    assert done.code == 0
    assert done.out.count("\n") >= 1
    assert "context holds 256" in done.err
    assert "/nonsense" in done.err
