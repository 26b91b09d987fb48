"""Chat templates of strangers: rendered as transformers does, within bounds, without a clock."""

import signal

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from ictjax import template
from ictjax.template import ChatTemplate, TemplateError
from tests.test_chat import TEMPLATES

ASKED = [{"role": "system", "content": " s "}, {"role": "user", "content": "u"}]
TALK = [*ASKED, {"role": "assistant", "content": "<think>a</think>b"}, *ASKED[1:]]
ENDLESS = (
    "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}"  # 10^10
)
MUCH = "takes more than"  # time or memory, by the machine
DOUBLED = "{% set n = namespace(x=VALUE) %}{% for i in range(60) %}STEP{% endfor %}"


def use(chat_template):
    chat_template.check([ASKED, TALK], {})
    chat_template.render(TALK, {})


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(template, "_CPU_S", 0.25)


@pytest.mark.parametrize("text", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("switches", [{}, {"enable_thinking": False}, {"enable_thinking": True}])
def test_renders_as_transformers_does(text, switches):
    ours = ChatTemplate(text.replace("strftime_now is defined", "false"), {"bos_token": "<b>"}, "x")
    for talk in (ASKED, TALK):
        (expected,), _ = render_jinja_template(
            [talk],
            chat_template=text.replace("strftime_now is defined", "false"),
            add_generation_prompt=True,
            bos_token="<b>",
            **switches,
        )
        ours.check([talk], switches)
        assert ours.render(talk, switches) == expected


@pytest.mark.parametrize(
    "text",
    [
        "{% generation %}{{ messages[0].content }}{% endgeneration %}\n  {%- set x = 3 %}",
        "{% for m in messages recursive %}{% if loop.last %}{% break %}{% endif %}{{ loop.index }}"
        "{% else %}nothing{% endfor %}",
        "{%- macro f(a, b='c') -%}\n  {{ a }}{{ b }}{{ caller() }}\n{%- endmacro -%}\n"
        "{% call f('x') %} y {% endcall %}",
        "{{ messages|tojson }}{{ messages|tojson(indent=2) }}{{ {'é': '<'}|tojson }}",
        "{% set n = namespace(found=false) %}{% for m in messages %}\n"
        "    {% set n.found = true %}\n{% endfor %}{{ n.found }}{{ dict(a=1) }}",
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content|trim }}"
        "{% endfor %}{{ tools is none }}{{ documents is none }}{{ undefined_name }}",
        "{# for #}{{ '{% for %}' }}{% raw %}{% for %}{% endraw %}",
    ],
)
def test_renders_what_templates_use(text):
    (expected,), _ = render_jinja_template([TALK], chat_template=text, add_generation_prompt=True)
    assert ChatTemplate(text, {}, "x").render(TALK, {}) == expected


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (ENDLESS, "takes more than 0.25 seconds"),
        (
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
            "{{ f(60) }}",
            "takes more than 0.25 seconds",
        ),
        (
            "{% for m in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}",
            "takes more than 0.25 seconds|refuses",
        ),
        ("{% for a in range(100000) %}{{ range(100000)|sum }}{% endfor %}", "takes more than 0.25"),
        ("{{ 7 ** (10 ** 9) }}", "takes more than 0.25 seconds|memory"),
        (DOUBLED.replace("VALUE", "'a'").replace("STEP", "{% set n.x = n.x ~ n.x %}"), MUCH),
        (
            DOUBLED.replace("VALUE", "'a'").replace(
                "STEP", "{% set y %}{{ n.x }}{{ n.x }}{% endset %}{% set n.x = y %}"
            ),
            MUCH,
        ),
        ("{{ 'a' * 10 ** 10 }}", "memory"),
        ("{{ 'a'|center(10000000000) }}", "memory"),
        ("{{ '{:10000000000}'.format(1) }}", "memory"),
        ("{{ 'a' * 2000000 }}", "writes 2000000 characters for one conversation"),
        ("{% if messages|length > 3 %}" + ENDLESS + "{% endif %}", "takes more than 0.25 seconds"),
    ],
)
def test_what_takes_too_much_is_stopped_in_another_process(text, fault):
    chat_template = ChatTemplate(text, {}, "the/folder")
    with pytest.raises(TemplateError, match=f"^The chat template of the/folder .*({fault})"):
        use(chat_template)


def test_whoever_holds_back_the_signal_of_the_limit_holds_back_nothing():
    before = signal.signal(signal.SIGXCPU, signal.SIG_IGN)
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGXCPU})
    try:
        chat_template = ChatTemplate("{{ 7 ** (10 ** 8) }}", {}, "the/folder")
        with pytest.raises(TemplateError, match="takes more than 0.25 seconds"):
            use(chat_template)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        signal.signal(signal.SIGXCPU, before)


def test_a_loop_that_a_later_text_starts_is_stopped_too():
    later = ChatTemplate("{% if 'go' in messages[-1].content %}" + ENDLESS + "{% endif %}", {}, "f")
    later.check([ASKED, TALK], {})
    assert later.render(TALK, {}) == ""
    with pytest.raises(TemplateError, match=r"^The chat template of f takes more than 0\.25 sec"):
        later.render([{"role": "user", "content": "go"}], {})


@pytest.mark.parametrize(
    "text",
    [
        "{{ messages.__class__ }}{{ ''.__class__.__mro__ }}",
        "{{ namespace(__init__=1) }}",
        "{{ dict.__init__.__globals__ }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ strftime_now.__self__.year }}",
        "{{ messages.append(1) }}",
        "{{ range(10000000) }}",
        "{% include '/etc/passwd' %}",
        "{{ lipsum() }}",
        "{{ messages|random }}",
        "{% for %}",
        "{{ " + 5_000 * "(" + "1" + 5_000 * ")" + " }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ raise_exception('{}') }}",
    ],
)
def test_what_is_wrong_with_a_template_is_said_in_one_sentence(text):
    chat_template = ChatTemplate(text, {}, "the/folder")
    with pytest.raises(
        TemplateError, match=r"^The chat template of the/folder refuses .*\(.*\)\.$"
    ):
        use(chat_template)


def test_the_same_question_is_asked_once(monkeypatch):
    chat_template = ChatTemplate("once", {}, "f")
    chat_template.check([TALK], {})
    monkeypatch.setattr(template.sys, "executable", "/nowhere/python")
    chat_template.check([TALK], {})
    with pytest.raises(TemplateError, match="No process could be started"):
        chat_template.check([ASKED], {})
