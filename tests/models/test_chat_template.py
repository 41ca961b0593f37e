from datetime import datetime
from typing import Any

import pytest
from jinja2.sandbox import SecurityError

from shoal.errors import InvalidRequest
from shoal.models import chat_template
from shoal.models.chat_template import ChatTemplate

HELLO = [{"role": "user", "content": "Hi <b>&</b>"}]


def render(source: str, messages: list[dict[str, str]] = HELLO, **options: Any) -> str:
    clock = lambda: datetime(2031, 5, 6)  # noqa: E731
    template = ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}, clock)
    return template.render(messages, **options)


def test_blocks_leave_no_blank_lines_and_special_tokens_are_variables() -> None:
    source = """{{ bos_token }}
{% for message in messages %}
    {% if loop.first %}
<{{ message.role }}>{{ message['content'] }}{{ eos_token }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
<assistant>
{% endif %}"""
    assert render(source) == "<s>\n<user>Hi <b>&</b></s>\n<assistant>\n"
    assert render(source, add_generation_prompt=False) == "<s>\n<user>Hi <b>&</b></s>\n"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "Hi <b>&</b>"}'),
        ("{{ 'é' | tojson }}", '"é"'),
        ("{{ {'b': 1, 'a': [2]} | tojson(indent=1) }}", '{\n "b": 1,\n "a": [\n  2\n ]\n}'),
        ("{{ strftime_now('%d %b %Y') }}", "06 May 2031"),
        ("{% for n in range(9) %}{% if n == 2 %}{% break %}{% endif %}{{ n }}{% endfor %}", "01"),
        ("a{% generation %}b{% endgeneration %}c", "abc"),
        ("{{ tools is none }}{{ missing_token }}", "True"),
        ("{% set ns = namespace(x=1) %}{% set ns.x = 2 %}{{ ns.x }}", "2"),
    ],
)
def test_templates_find_what_transformers_gives_them(source: str, expected: str) -> None:
    assert render(source) == expected


def test_options_and_tools_reach_the_template_but_cannot_replace_the_messages() -> None:
    source = "{{ tools[0].name }} {{ thinking }} {{ bos_token }} {{ messages | length }}"
    assert render(source, tools=[{"name": "sum"}], thinking=False) == "sum False <s> 1"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{% if %}",
        "{{ messages[0].content + 1 }}",
        "{{ 1 / 0 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{% for n in range(1000000) %}x{% endfor %}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ missing.name }}",
    ],
)
def test_a_template_that_fails_is_an_invalid_request_that_says_why(source: str) -> None:
    with pytest.raises(InvalidRequest, match=r"chat template cannot use these messages: .+"):
        render(source)


def test_the_reason_that_a_template_gives_is_passed_on() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert caught.value.param == "messages"


def test_python_behind_the_template_is_out_of_reach() -> None:
    with pytest.raises(InvalidRequest) as caught:
        render("{{ messages.__class__.__base__.__subclasses__() }}")
    assert isinstance(caught.value.__cause__, SecurityError)


def test_the_prompt_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    source = "{% for n in range(60) %}x{% endfor %}"
    assert render(source) == "x" * 60
    monkeypatch.setattr(chat_template, "MAX_PROMPT_CHARACTERS", 59)
    with pytest.raises(InvalidRequest, match="more than 59 characters"):
        render(source)
