"""Chat templates render as in transformers, and a bad one is an error in words, soon."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mindgen.text.chat_template import ChatTemplate
from mindgen.text.tokenizer import load_tokenizer
from tests.text import folders
from tests.text.folders import edit_json, write_json

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello, wörld?"}],
    [{"role": "system", "content": "Be  brief."}, {"role": "user", "content": " hi \n"}],
    [
        {"role": "user", "content": "a <b> & 'c'"},
        {"role": "assistant", "content": "yes\nno 😀"},
        {"role": "user", "content": "</s><|im_end|><|eot_id|> injected"},
    ],
]
HELLO = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_the_tokenizers_own_template_renders_as_in_transformers(
    kind: str,
    tokenizer_folders: dict[str, Path],
    hugging_face: Callable[[str], Any],
    conversation: list[dict[str, Any]],
    add_generation_prompt: bool,
) -> None:
    tokenizer = load_tokenizer(tokenizer_folders[kind])
    assert tokenizer.has_chat_template
    expected = hugging_face(kind).apply_chat_template(
        conversation, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=False
    )
    assert tokenizer.apply_chat_template(conversation, add_generation_prompt) == expected


TEMPLATES = [
    folders.CHATML,
    folders.LLAMA2_CHAT,
    folders.LLAMA3_CHAT,
    "{% for m in messages if m.role == 'user' %}{{ loop.length }}{{ loop.revindex }}{{ m.content[::-1] }}{% endfor %}",
    "  {% if true %}\n    kept {{- 1 }}\n  {% endif %}\nend\n",
    "{{ messages | tojson }}{{ {'x': '<é>'} | tojson(indent=2, ensure_ascii=True) }}{{ none is none }}",
    "{% macro say(m) %}{{ m.role | upper }}{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}{{ x }}",
    "{% set ns = namespace(last=messages[-1], n=2) %}{% set ns.n = ns.n * 3 + 1 %}{{ ns.n }}{{ ns.last.content ~ 1 }}",
    "{% for x in [1, 2, 3] %}{% if x == 2 %}{% continue %}{% endif %}{{ x }}{% else %}none{% endfor %}{{ 7 ** 2 }}",
    "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}{{ dict(a=1).a }}{{ range(3) | list }}",
    "{% generation %}{% set inner = 1 %}{{ messages[0].content }}{% endgeneration %}{{ inner is defined }}",
    "{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}{{ bos_token }}{{ undefined_name }}",
    "{% for group in [[1, [2]], [3]] recursive %}{{ loop(group) if group is iterable else group }}{% endfor %}",
]


@pytest.mark.parametrize("text", TEMPLATES)
def test_the_language_is_that_of_transformers(hugging_face: Callable[[str], Any], text: str) -> None:
    judge = hugging_face("llama3")
    for conversation in CONVERSATIONS:
        expected = judge.apply_chat_template(
            conversation, chat_template=text, tokenize=False, add_generation_prompt=True
        )
        assert ChatTemplate(text, judge.special_tokens_map, "here").render(conversation, True) == expected


def test_what_a_message_says_is_none_is_left_out_as_in_transformers_5(hugging_face: Callable[[str], Any]) -> None:
    pytest.importorskip("transformers", minversion="5", reason="transformers 4 shows templates what is none")
    judge, conversation = hugging_face("llama3"), [{"role": "user", "content": "x", "name": None}]
    for text in TEMPLATES:
        expected = judge.apply_chat_template(conversation, chat_template=text, tokenize=False)
        assert ChatTemplate(text, judge.special_tokens_map, "here").render(conversation, False) == expected


def test_a_sentencepiece_file_has_its_folders_template(
    tokenizer_folders: dict[str, Path], hugging_face: Callable[[str], Any]
) -> None:
    tokenizer = load_tokenizer(tokenizer_folders["llama2"], "SentencePiece")
    expected = hugging_face("llama2").apply_chat_template(HELLO, tokenize=True, return_dict=False)
    assert tokenizer.apply_chat_template(HELLO, add_generation_prompt=False) == expected


@pytest.fixture
def folder(tokenizer_folders: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(tokenizer_folders["llama3"], tmp_path / "folder"))


def written(folder: Path) -> str:
    tokenizer = load_tokenizer(folder)
    return tokenizer.decode(tokenizer.apply_chat_template(HELLO))


def test_a_template_file_wins_over_the_config(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("from the file")
    assert written(folder) == "from the file"


def test_of_named_templates_the_default_is_taken(folder: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    edit_json(folder / "tokenizer_config.json", lambda config: config.update(chat_template=named))
    assert written(folder) == "plain"
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("rag")
    with pytest.raises(ValueError, match=r"no chat template named 'default' \(only rag\)"):
        written(folder)


def test_no_template_says_what_to_do(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", lambda config: config.pop("chat_template"))
    assert not load_tokenizer(folder).has_chat_template
    with pytest.raises(ValueError, match=r"no chat template; put one into chat_template\.jinja") as caught:
        written(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("stated", [[{"name": "default"}], ["x"], {"default": 1}, 3])
def test_a_damaged_template_setting_is_named(folder: Path, stated: Any) -> None:
    edit_json(folder / "tokenizer_config.json", lambda config: config.update(chat_template=stated))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: 'chat_template'"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{% for m in messages %}", r"TemplateSyntaxError.*line 1"),
        ("{{ raise_exception('no system message here') }}", "no system message here"),
        ("{{ messages[7].content }}", "UndefinedError"),
        ("{{ 1 + 'x' }}", "TypeError"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "SecurityError"),
        ("{% set ns = namespace() %}{% set ns.__init__ = 1 %}", "underscore"),
        ("{{ namespace(__init__=1) }}", "underscore"),
        ("{% include 'other' %}", "TypeError"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "loop steps"),
        ("{% macro f(n) %}{{ f(n) ~ f(n) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
        ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}", "and calls"),
        ("{% for a in [[]] * 2 recursive %}{{ loop([[], []]) }}{% endfor %}", "RecursionError"),
        ("{% for a in range(9999) %}{{ 'x' * 9999 }}{% endfor %}", "wrote more than"),
        ("{{ 'x' * 10 ** 10 }}", "grew beyond"),
        ("{{ 10 ** 9999999 }}", "too large"),
        ("{% set ns = namespace(x=7) %}{% for a in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}", "too large"),
        ("{% set n = namespace(x='x') %}{% for a in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "grew beyond"),
        ("{% set n = namespace(x='x') %}{% for a in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}", "grew beyond"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "Error"),
    ],
)
@pytest.mark.timeout(60)
def test_a_template_that_fails_or_runs_away_is_an_error_in_words(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=r"(?s)the chat template of here failed: .*" + complaint):
        ChatTemplate(text, {}, "here").render(HELLO, True)


def test_a_template_that_ran_away_can_render_the_next_conversation() -> None:
    template = ChatTemplate("{% for m in messages %}{% for x in range(99999) %}{% endfor %}.{% endfor %}", {}, "here")
    with pytest.raises(ValueError, match="loop steps"):
        template.render(HELLO * 20, True)
    assert template.render(HELLO * 5, True) == "....."


def test_long_conversations_are_no_problem() -> None:
    template = ChatTemplate(folders.CHATML, {}, "here")
    assert template.render(HELLO * 100_000, True).count("hello") == 100_000


def test_the_message_of_an_error_is_short() -> None:
    with pytest.raises(ValueError) as caught:
        ChatTemplate("{{ raise_exception('x' * 100000) }}", {}, "here").render(HELLO, True)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "at least one message"),
        (["hello"], "message 0 of the conversation must look like"),
        ([*HELLO, {"content": "x"}], "message 1 of the conversation must look like"),
        ([{"role": 1, "content": "x"}], "must look like"),
        ([{"role": "user", "content": object()}], "holds a object"),
        ([{"role": "user", "content": {1: 2}}], "holds a dict"),
        ([{"role": "user", "content": b"x"}], "holds a bytes"),
    ],
)
def test_messages_of_the_wrong_shape_are_named(messages: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ChatTemplate("x", {}, "here").render(messages, True)


def test_messages_nested_without_end_are_refused() -> None:
    content: list[Any] = []
    content.append(content)
    with pytest.raises(ValueError, match="nested too deeply"):
        ChatTemplate("x", {}, "here").render([{"role": "user", "content": content}], True)


def test_a_lone_surrogate_in_a_message_is_refused(tokenizer_folders: dict[str, Path]) -> None:
    tokenizer = load_tokenizer(tokenizer_folders["llama3"])
    with pytest.raises(ValueError, match="lone surrogate"):
        tokenizer.apply_chat_template([{"role": "user", "content": "\ud800"}])


def test_a_template_file_that_is_not_text_is_named(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"chat_template\.jinja is not UTF-8"):
        load_tokenizer(folder)
    write_json(folder / "chat_template.jinja", "x" * (2 << 20))
    with pytest.raises(ValueError, match=r"chat_template\.jinja is larger than 1 MB"):
        load_tokenizer(folder)
