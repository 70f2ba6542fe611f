"""What a conversation remembers."""

from __future__ import annotations

import pytest

from mindgen.text.chat import Command, Conversation, parse_command


def said(conversation: Conversation) -> list[str]:
    return [message["content"] for message in conversation.messages]


def talk(conversation: Conversation, num_turns: int) -> Conversation:
    for turn in range(num_turns):
        conversation.add_user(f"q{turn}")
        conversation.add_assistant(f"a{turn}")
    return conversation


def test_messages_are_in_order_with_their_roles() -> None:
    conversation = Conversation(system="be brief")
    conversation.add_user("hi")
    assert conversation.messages == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
    ]
    conversation.add_assistant("hello")
    assert conversation.messages[2:] == [{"role": "assistant", "content": "hello"}]


def test_the_oldest_turns_are_dropped_and_the_system_message_stays() -> None:
    conversation = talk(Conversation(history_turns=2, system="s"), 4)
    assert said(conversation) == ["s", "q2", "a2", "q3", "a3"]
    conversation.add_user("now")
    assert said(conversation) == ["s", "q2", "a2", "q3", "a3", "now"]


def test_no_history_is_the_question_alone() -> None:
    conversation = talk(Conversation(history_turns=0), 2)
    conversation.add_user("now")
    assert said(conversation) == ["now"]


def test_without_a_limit_everything_is_remembered() -> None:
    assert len(talk(Conversation(), 50).messages) == 100


def test_clear_forgets_all_but_the_system_message() -> None:
    conversation = talk(Conversation(system="s"), 2)
    conversation.add_user("unanswered")
    conversation.clear()
    assert said(conversation) == ["s"]
    assert said(talk(conversation, 1)) == ["s", "q0", "a0"]


def test_a_refused_question_can_be_withdrawn() -> None:
    conversation = talk(Conversation(), 1)
    conversation.add_user("too long")
    conversation.withdraw()
    assert said(conversation) == ["q0", "a0"]
    conversation.add_user("shorter")
    assert said(conversation) == ["q0", "a0", "shorter"]


def test_messages_are_a_copy() -> None:
    conversation = talk(Conversation(), 1)
    conversation.messages.clear()
    assert said(conversation) == ["q0", "a0"]


def test_a_negative_history_names_the_flag() -> None:
    with pytest.raises(ValueError, match="--history-turns is -1"):
        Conversation(history_turns=-1)


@pytest.mark.parametrize(
    ("line", "command"),
    [
        *((word, Command.END) for word in ("q", "quit", "exit", " q \n")),
        *((word, Command.WIPE) for word in ("clear", "new", "new\r\n")),
        *((line, None) for line in ("", "quit now", "Q", "qq", "what is new?", "clear the table")),
    ],
)
def test_commands_are_whole_lines(line: str, command: Command | None) -> None:
    assert parse_command(line) is command
