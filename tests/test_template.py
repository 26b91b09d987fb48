"""Chat templates of strangers: rendered as transformers does, within bounds, without a clock."""

import signal
import sys
import tracemalloc

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


def test_whoever_holds_back_the_signal_of_the_limit_holds_back_nothing(monkeypatch, tmp_path):
    # what no bound inside knows: one long computation
    python = tmp_path / "python"
    python.write_text(
        f"#!{sys.executable}\nfrom ictjax import template\n"
        "template._render = lambda **_: 7 ** (10**8)\ntemplate._answer()\n"
    )
    python.chmod(0o700)
    monkeypatch.setattr(template.sys, "executable", str(python))
    before = signal.signal(signal.SIGXCPU, signal.SIG_IGN)
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGXCPU})
    try:
        with pytest.raises(TemplateError, match="takes more than 0.25 seconds"):
            use(ChatTemplate("held back", {}, "the/folder"))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        signal.signal(signal.SIGXCPU, before)


def test_a_loop_that_a_later_text_starts_is_stopped_too():
    later = ChatTemplate("{% if 'go' in messages[-1].content %}" + ENDLESS + "{% endif %}", {}, "f")
    later.check([ASKED, TALK], {})
    assert later.render(TALK, {}) == ""
    with pytest.raises(TemplateError, match=r"^The chat template of f takes more than 0\.25 sec"):
        later.render([{"role": "user", "content": "go"}], {})


NESTED = DOUBLED.replace("VALUE", "['a']").replace("STEP", "{% set n.x = [n.x, n.x] %}")
NAMES = "{% set n = namespace(x='') %}{% for i in range(99) %}{% set n.x = namespace(x=n.x, y=n.x)"
TEN = "'aaaaaaaaaa'"


@pytest.mark.parametrize(
    "text",
    [
        "{{ 'a' * 10 ** 10 }}",
        "{% set x = 10 ** 9 * 'ab' %}",
        "{% set x = ['a'] * 10 ** 9 %}",
        "{% set x = (1, 2) * 10 ** 9 %}",
        "{% set x = 'a'.encode() * 10 ** 10 %}",
        "{{ 7 ** (10 ** 8) }}",
        DOUBLED.replace("VALUE", "7").replace("STEP", "{% set n.x = n.x * n.x %}"),
        DOUBLED.replace("VALUE", TEN).replace("STEP", "{% set n.x = n.x ~ n.x %}"),
        DOUBLED.replace("VALUE", TEN).replace("STEP", "{% set n.x = n.x + n.x %}"),
        DOUBLED.replace("VALUE", TEN).replace("STEP", "{% set n.x = n.x|replace('a', n.x) %}"),
        DOUBLED.replace("VALUE", TEN).replace("STEP", "{% set n.x = n.x.replace('a', n.x) %}"),
        DOUBLED.replace("VALUE", TEN).replace("STEP", "{% set n.x = n.x.replace('', n.x) %}"),
        DOUBLED.replace("VALUE", TEN).replace("STEP", "{% set n.x = n.x.join(n.x) %}"),
        DOUBLED.replace("VALUE", TEN).replace("STEP", "{% set n.x = [n.x, n.x]|join(n.x) %}"),
        DOUBLED.replace("VALUE", TEN).replace("STEP", "{% set n.x = '%s%s' % (n.x, n.x) %}"),
        DOUBLED.replace("VALUE", TEN).replace("STEP", "{% set n.x = '%s%s'|format(n.x, n.x) %}"),
        DOUBLED.replace("VALUE", TEN).replace("STEP", "{% set n.x = '{0}{0}'.format(n.x) %}"),
        DOUBLED.replace("VALUE", TEN).replace(
            "STEP", "{% set n.x = '{x}{x}'.format_map({'x': n.x}) %}"
        ),
        DOUBLED.replace("VALUE", TEN).replace("STEP", "{% set n.x = [n.x, n.x]|tojson %}"),
        DOUBLED.replace("VALUE", TEN).replace("STEP", "{% set n.x = [n.x, n.x]|string %}"),
        DOUBLED.replace("VALUE", TEN).replace("STEP", "{% set n.x = n.x.translate({97: n.x}) %}"),
        DOUBLED.replace("VALUE", "'\"'").replace("STEP", "{% set n.x = n.x|tojson %}"),
        DOUBLED.replace("VALUE", "'&'").replace("STEP", "{% set n.x = (n.x ~ n.x)|forceescape %}"),
        DOUBLED.replace("VALUE", "[1]").replace("STEP", "{% set n.x = n.x + n.x %}"),
        DOUBLED.replace("VALUE", TEN).replace(
            "STEP", "{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}"
        ),
        DOUBLED.replace("VALUE", TEN).replace(
            "STEP", "{% set n.x %}{% filter upper %}{{ n.x }}{{ n.x }}{% endfilter %}{% endset %}"
        ),
        "{% macro f(n, x) %}{{ f(n - 1, x ~ x) if n else x }}{% endmacro %}{{ f(60, 'a') }}",
        "{% macro f(x, n) %}{{ f([x, x], n - 1) if n else x }}{% endmacro %}{{ f('a', 60) }}",
        "{% macro f(n) %}{{ f(n - 1, varargs, varargs) if n else varargs }}{% endmacro %}"
        "{{ f(60, 1, 2) }}",
        "{% macro f(n) %}{{ f(n - 1, a=kwargs, b=kwargs) if n else kwargs }}{% endmacro %}"
        "{{ f(60, a=1) }}",
        NESTED + "{{ n.x }}",
        NESTED + "{{ n.x|tojson }}",
        NESTED + "{{ n.x|pprint }}",
        NESTED + "{{ n.x ~ '' }}",
        NESTED + "{{ '%s' % (n.x,) }}",
        NESTED + "{{ '{}'.format(n.x) }}",
        NESTED + "{{ n.x is upper }}",
        NESTED + "{% set m = n.x %}" + NESTED + "{{ m == n.x }}",
        NESTED.replace("[n.x, n.x]", "(n.x, n.x)") + "{{ {n.x: 1} }}",
        NESTED.replace("[n.x, n.x]", "{'a': n.x, 'b': n.x}") + "{{ n.x }}",
        NESTED.replace("[n.x, n.x]", "dict(a=n.x, b=n.x)") + "{{ n.x }}",
        NESTED.replace("[n.x, n.x]", "{'a': n.x, 'b': n.x}.values()") + "{{ n.x }}",
        NESTED.replace("[n.x, n.x]", "{'a': n.x, 'b': n.x}|dictsort") + "{{ n.x }}",
        NESTED.replace("[n.x, n.x]", "[1]|batch(2, n.x)") + "{{ n.x }}",
        NESTED.replace("[n.x, n.x]", "[n.x]|slice(2, n.x)") + "{{ n.x }}",
        NESTED.replace("[n.x, n.x]", "[n.x] * 2") + "{{ n.x }}",
        DOUBLED.replace("60", "100000")
        .replace("VALUE", "1")
        .replace("STEP", "{% set n.x = (n.x,) %}"),
        DOUBLED.replace("60", "100000")
        .replace("VALUE", "[1]")
        .replace("STEP", "{% set n.x = n.x|map('abs') %}"),
        "{{ '%1000000000d' % 1 }}",
        "{{ '%.1000000000f' % 1 }}",
        "{{ '%*d' % (10 ** 9, 1) }}",
        "{{ '%(a(b))1000000000d' % {'a(b)': 1} }}",
        "{{ '%1000000000d'.encode() % 1 }}",
        "{{ '%1000000000d'|format(1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '{:{w}}'.format(1, w=10 ** 9) }}",
        "{{ '{0:{1[w]}}'.format(1, {'w': '>1000000000'}) }}",
        "{{ '{x:1000000000}'.format_map({'x': 1}) }}",
        "{{ ('{:1000000}' * 1000).format(*range(1000)) }}",
        "{{ 'a'|center(10 ** 10) }}",
        "{{ 'a'.center(10 ** 10) }}",
        "{{ 'a'.ljust(10 ** 10) }}",
        "{{ 'a'.rjust(10 ** 10) }}",
        "{{ '1'.zfill(10 ** 10) }}",
        "{{ '\t'.expandtabs(10 ** 9) }}",
        "{{ 'a\na'|indent(10 ** 10) }}",
        "{{ ('a\n' * 10000)|indent('a' * 1000000) }}",
        "{{ ('a' * 10000)|wordwrap(1, wrapstring='a' * 1000000) }}",
        "{{ ('a.com ' * 10000)|urlize(target='a' * 1000000) }}",
        "{{ {'a': 'b' * 1000000}|xmlattr * 1000 }}",
        "{{ [1] * 10000|int|tojson(indent=1000000) }}",
        "{{ ([1] * 1000)|tojson(indent=1000000) }}",
        "{{ ([1] * 1000)|tojson(separators=('a' * 1000000, ':')) }}",
        "{{ ([1] * 1000)|join('a' * 1000000) }}",
        "{{ ('a' * 1000000).join(range(1000)|map('string')) }}",
        "{{ [1]|batch(10 ** 9, 1)|list }}",
        "{{ [1]|slice(10 ** 9)|list }}",
        "{{ 1.5|round(10 ** 9, 'ceil') }}",
        "{{ (5).to_bytes(10 ** 10, 'big') }}",
        "{{ range(100000)|map('center', 1000000)|list }}",
        "{{ range(100000)|map('string')|map('center', 10000)|join }}",
        "{{ range(100000)|map('replace', '', 'a' * 10000)|list }}",
        "{{ {}.fromkeys(range(100000), 'a' * 1000000) }}",
        "{% set n = namespace(l=[], s='a' * 1000000) %}{% for i in range(100000) %}"
        "{% set n.l = [n.l, n.s[1:]] %}{% endfor %}",
        "{% set n = namespace(l=[]) %}{% for i in range(100000) %}"
        "{% set n.l = n.l + ['a' * 10000] %}{% endfor %}",
        "{% set x %}{% for i in range(100000) %}{% for i in range(100000) %}{{ 'ü€'[1] }}"
        "{% endfor %}{% endfor %}{% endset %}",
        "{% for i in range(100000) %}{{ 'a' * 10000 }}{% endfor %}",
        "{% autoescape true %}{{ '\"' * 30000000 }}{% endautoescape %}",
        "{{ cycler('a' * 10 ** 9, 1).next() }}",
        "{% set x = ('a ' * 5000000).split() %}",
        "{% set x = ('a' * 5000000)|list %}",
        "{{ ([[1] * 1000] * 1000)|sum(start=[])|length }}",
        NAMES + " %}{% endfor %}{{ n.x }}" + "{{ 'a' * 10 ** 10 }}",
        "{{ strftime_now('%Y' * 1000000) }}",
        "{% block a %}{% for i in range(9) %}{{ self.b() }}{% endfor %}{% endblock %}"
        "{% block b %}{% for i in range(9) %}{{ 'a' * 1000000 }}{% endfor %}{% endblock %}",
    ],
)
def test_a_template_that_builds_much_for_a_later_text_is_stopped_before_it_has(text):
    later = ChatTemplate("{% if 'go' in messages[-1].content %}" + text + "{% endif %}", {}, "f")
    if "block" not in text:  # these are written wherever they stand
        assert later.render(TALK, {}) == ""
    tracemalloc.start()
    try:
        with pytest.raises(
            TemplateError, match=r"of f (takes more|nests values more|writes) .*\.$"
        ):
            later.render([{"role": "user", "content": "go"}], {})
        assert tracemalloc.get_traced_memory()[1] < 2**28
    finally:
        tracemalloc.stop()


def test_long_conversations_are_rendered_by_templates_that_build_much():
    talk = [{"role": "user", "content": 'é\n"<x>' * 200_000}, *TALK[1:]] * 2
    text = (
        "{% set n = namespace(t='') %}{% for m in messages %}{% set n.t = n.t + m.role + "
        "(m.content|trim).split('</x>')[-1]|replace('x', 'yy') %}{% endfor %}{{ n.t|length }}"
        "{{ messages|tojson(indent=4)|length }}{{ messages|map(attribute='content')|join|length }}"
    )
    (expected,), _ = render_jinja_template([talk], chat_template=text, add_generation_prompt=True)
    assert ChatTemplate(text, {}, "x").render(talk, {}) == expected


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
