"""A chat template: a program in Jinja by whoever published a model, run without a clock and within
bounds.
"""

import datetime
import functools
import json
import math
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.utils import Namespace

from ictjax.sandbox import BoundedEnvironment, Bounds, Exceeded

# What templates are told is today: the ids of a prompt must not change at midnight. Llama's
# templates fall back to the same day.
_TODAY = datetime.datetime(2024, 7, 26)
_CPU_S = 3  # of processor time for one text; published templates take milliseconds
_MEMORY_BYTES = 2**29  # of the process that tries a template, of which Python takes a tenth
# That one text may take, all values that the template makes together; published ones make about ten
# times what they are given.
_BUILT_BYTES = 2**27
_BUILT_PER_CHAR = 64
_MAX_CHARS = 2**20  # that a template may write around the messages
_WAIT_S = 120.0  # for that process, which ends by itself: a machine may be busy

Messages = Sequence[Mapping[str, str]]


class TemplateError(ValueError):
    """A template that cannot be used: says which, and why."""


class ChatTemplate:
    """A chat template as transformers renders it, except that its day is always the same.

    Args:
      text: in Jinja.
      variables: of the template, by name: the special tokens.
      source: the folder or the name of the tokenizer, for messages.
    """

    def __init__(self, text: str, variables: Mapping[str, str], source: str) -> None:
        self._text, self._variables, self._source = text, dict(variables), source

    def check(self, conversations: Sequence[Messages], switches: Mapping[str, bool]) -> None:
        """Renders conversations in a process of its own, so that a template which never ends or
        fills the memory is found before it is run here. Answers are kept: the same question costs
        nothing again.

        Raises:
          TemplateError: it takes too long, too much memory, or writes too much. What else is wrong
            with a template `render` says.
        """
        fault = _tried(
            json.dumps(
                {
                    "text": self._text,
                    "variables": self._variables,
                    "conversations": [list(map(dict, messages)) for messages in conversations],
                    "switches": dict(switches),
                    "cpu_s": _CPU_S,
                }
            )
        )
        if fault:
            self._refuse(fault)

    def render(self, messages: Messages, switches: Mapping[str, bool]) -> str:
        """The text of a conversation up to where the assistant's next reply begins.

        Raises:
          TemplateError: the template refuses the conversation, is wrong, or exceeds a bound.
        """
        try:
            return _render(self._text, self._variables, messages, switches, _CPU_S)
        except Exceeded as error:
            self._refuse(str(error))
        except Exception as error:  # jinja raises what the template asks for
            detail = " ".join(str(error).split())[:300] or type(error).__name__
            raise TemplateError(
                f"The chat template of {self._source} refuses a conversation of system, user and"
                f" assistant messages ({detail})."
            ) from error

    def _refuse(self, fault: str) -> NoReturn:
        raise TemplateError(
            f"The chat template of {self._source} {fault}: take the template that the model was"
            " published with."
        )


class _Generation(Extension):
    """`{% generation %}` marks replies for training; what is in it is written as it is."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own type)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Names(Namespace):
    """Jinja's namespace without names that lead into Python."""

    def __init__(*args: Any, **values: Any) -> None:
        Namespace.__init__(*args, **values)
        for name in dict(*args[1:], **values):
            _public(name)

    def __setitem__(self, name: str, value: Any) -> None:
        _public(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"  # they may hold each other, and so be endless when written out


def _public(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace holds no {name!r}")


def _environment() -> BoundedEnvironment:
    """What transformers gives to templates (transformers.utils.chat_template_utils), but for the
    clock and for Jinja's random texts.
    """
    environment = BoundedEnvironment(
        filters={"tojson": _to_json},
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, loopcontrols],
    )
    del environment.filters["random"], environment.globals["lipsum"]
    given: Mapping[str, Any] = {
        "raise_exception": _raise,
        "strftime_now": _TODAY.strftime,
        "dict": _to_dict,
        "namespace": _Names,
    }
    environment.globals.update(given)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _to_dict(*args: Any, **values: Any) -> dict[str, Any]:
    return dict(*args, **values)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


@functools.lru_cache(maxsize=16)
def _compiled(text: str) -> tuple[BoundedEnvironment, jinja2.Template]:
    environment = _environment()
    return environment, environment.from_string(text)


def _render(
    text: str,
    variables: Mapping[str, str],
    messages: Messages,
    switches: Mapping[str, bool],
    cpu_s: float,
) -> str:
    environment, template = _compiled(text)
    given = sum(len(message["content"]) for message in messages)
    return environment.run(
        template,
        Bounds(cpu_s, _BUILT_BYTES + _BUILT_PER_CHAR * given),
        _MAX_CHARS + 2 * given,
        {
            "messages": [dict(message) for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": True,
            **variables,
            **switches,
        },
    )


@functools.lru_cache(maxsize=64)
def _tried(question: str) -> str:
    """Asks another process; returns what is wrong, "" for nothing."""
    root = str(pathlib.Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", "from ictjax.template import _answer; _answer()"],
            input=question.encode(),
            capture_output=True,
            env={**os.environ, "PYTHONPATH": path},
            cwd=os.sep,
            start_new_session=True,  # Ctrl-C is the parent's
            timeout=_WAIT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise TemplateError(
            f"No process could be started to try a chat template in ({error}): free memory and"
            " processes of this machine."
        ) from error
    if done.returncode == 0:
        return done.stdout.decode()
    if done.returncode == -signal.SIGXCPU:
        return f"takes more than {_CPU_S} seconds for one text"
    if done.returncode < 0:
        return f"cannot be rendered in {_MEMORY_BYTES >> 20} MB of memory"
    complaint = (done.stderr.decode(errors="replace").strip().splitlines() or ["no reason"])[-1]
    raise TemplateError(
        f"The process that tries a chat template has failed ({complaint}): install ictjax for"
        f" {sys.executable}."
    )


def _answer() -> None:
    """The other process: reads a question, writes what is wrong."""
    question = json.load(sys.stdin)
    conversations, cpu_s = question.pop("conversations"), question["cpu_s"]
    # whoever started this one may ignore or hold back what ends it
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGXCPU})
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_AS, _MEMORY_BYTES)
    fault = ""
    for messages in conversations:
        _limit(resource.RLIMIT_CPU, math.ceil(time.process_time() + cpu_s) + 1)
        try:
            _render(messages=messages, **question)
        except Exceeded as error:
            fault = str(error)
        except MemoryError:
            fault = f"takes more than {_MEMORY_BYTES >> 20} MB of memory"
        except Exception:  # `render` says what is wrong with the template otherwise
            continue
        if fault:
            break
    sys.stdout.write(fault)


def _limit(kind: int, amount: int) -> None:
    hard = resource.getrlimit(kind)[1]
    soft = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
    resource.setrlimit(kind, (soft, hard))
