"""`EndpointSpeaker` against a server on this machine that does everything a server can do wrong."""

import dataclasses
import gc
import logging
import pathlib
import sys
import threading
import time

import pytest

from envs.api import GameId, Outcome
from envs.fake import FakeEnvironment
from envs.local import LocalPool
from ictjax import MetaEnv
from ictjax.config import EndpointConfig, RolloutConfig
from ictjax.endpoint_speaker import EndpointSpeaker
from ictjax.extras import install
from ictjax.records import Message, ParseFailure, to_json
from ictjax.rollout import Episode, rollout
from ictjax.speaker import Finish, Limits, is_speaker
from tests.chat_server import (
    ChatServer,
    completion,
    cuts_the_body,
    cuts_the_line,
    endless,
    never,
    refuses,
    says,
    sends,
)

pytest.importorskip("openai")

KEY = "sk-secret/0123456789"
LIMITS = Limits(max_tokens=20, temperature=0.0)


@pytest.fixture(autouse=True)
def _on_this_machine(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name in (
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
        "http_proxy",
        "https_proxy",
        "all_proxy",
    ):
        monkeypatch.delenv(name, raising=False)


def serve(*answers, models=("only",)):
    """A server that answers the n-th request with the n-th answer, and then with the last."""
    return ChatServer(lambda number, fields: answers[min(number, len(answers) - 1)], models)


def config(server, **settings):
    return EndpointConfig(
        **{"url": server.url, "timeout_s": 5.0, "max_retries": 2, "first_wait_s": 0.01, **settings}
    )


def ask(speaker, *texts, limits=LIMITS, key=(1, 2)):
    """The replies to one conversation for each text, in that order."""
    numbers = [speaker.open([Message(role="user", content=text)]) for text in texts]
    for number in numbers:
        speaker.ask(number, limits, key)
    replies = {}
    until_s = time.monotonic() + 60
    while len(replies) < len(numbers):
        assert time.monotonic() < until_s
        replies |= {reply.conversation: reply for reply in speaker.step()}
    for number in numbers:
        speaker.close(number)
    return [replies[number] for number in numbers]


def ask_once(*answers, limits=LIMITS, **settings):
    """One reply of a server, the speaker's counts, and what the server was asked."""
    with serve(*answers) as server, EndpointSpeaker(config(server, **settings), "m") as speaker:
        (reply,) = ask(speaker, "Hello", limits=limits)
        return reply, speaker.stats, server.requests


def test_a_conversation_is_sent_whole_and_its_replies_become_part_of_it():
    with serve(says("first"), says("second")) as server:
        with EndpointSpeaker(config(server), "m") as speaker:
            assert is_speaker(speaker)
            system = Message(role="system", content="Play.")
            number = speaker.open([system])
            texts = []
            for heard in ("one", "two"):
                speaker.hear(number, Message(role="user", content=heard), ("walk",))
                speaker.ask(number, LIMITS, (0, 0))
                while not (replies := speaker.step()):
                    assert not speaker.idle
                texts.append(replies[0].text)
                assert speaker.idle
            fork = speaker.fork(number)
            speaker.hear(fork, Message(role="user", content="three"))
            speaker.ask(fork, LIMITS, (0, 0))
            while not speaker.step():
                pass
        assert texts == ["first", "second"]
        assert [[(m["role"], m["content"]) for m in r["messages"]] for r in server.requests] == [
            [("system", "Play."), ("user", "one")],
            [("system", "Play."), ("user", "one"), ("assistant", "first"), ("user", "two")],
            [
                ("system", "Play."),
                ("user", "one"),
                ("assistant", "first"),
                ("user", "two"),
                ("assistant", "second"),
                ("user", "three"),
            ],
        ]
        assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}


def test_the_fields_of_a_request_are_the_limits():
    _, _, (greedy,) = ask_once(says("x"))
    assert {name: greedy[name] for name in ("model", "temperature", "top_p", "max_tokens")} == {
        "model": "m",
        "temperature": 0.0,
        "top_p": 1.0,
        "max_tokens": 20,
    }
    assert set(greedy) == {"model", "temperature", "top_p", "max_tokens", "messages", "seed"}
    limits = Limits(
        max_tokens=9, temperature=0.5, top_p=0.9, top_k=40, min_p=0.25, stop=("END", "\n")
    )
    _, _, (other,) = ask_once(
        says("x"), limits=limits, seeded=False, tokens_parameter="max_completion_tokens"
    )
    assert "seed" not in other and "max_tokens" not in other
    assert (other["max_completion_tokens"], other["top_p"], other["top_k"]) == (9, 0.9, 40)
    assert (other["min_p"], other["stop"]) == (0.25, ["END", "\n"])


def test_the_seed_follows_from_the_key_of_a_reply():
    with serve(says("x")) as server, EndpointSpeaker(config(server), "m") as speaker:
        for key in ((2**32 - 1, 5), (2**32 - 1, 5), (0, 5)):
            ask(speaker, "Hello", key=key)
        assert [request["seed"] for request in server.requests] == [2**31 - 1, 2**31 - 1, 0]


def test_tokens_are_counted_and_priced_and_a_cut_reply_is_marked():
    reply, stats, _ = ask_once(
        says("half a sen", finish="length"), input_price=2_000_000.0, output_price=10_000_000.0
    )
    assert (reply.text, reply.finish, reply.truncated) == ("half a sen", Finish.LENGTH, True)
    assert dict(stats) == {
        "calls": 1,
        "failures": 0,
        "retries": 0,
        "prompt_tokens": 7,
        "reply_tokens": 3,
        "cost": 7 * 2.0 + 3 * 10.0,
    }


@pytest.mark.parametrize(
    "usage",
    [None, {}, {"prompt_tokens": None}, {"prompt_tokens": -5, "completion_tokens": 1e999}, "lots"],
)
def test_a_server_that_counts_no_tokens_is_understood(usage):
    reply, stats, _ = ask_once(sends({**completion("fine"), "usage": usage}))
    assert (reply.text, reply.finish) == ("fine", Finish.STOP)
    assert stats["prompt_tokens"] == stats["reply_tokens"] == stats["cost"] == 0


def test_a_silent_reply_and_half_a_character_are_texts():
    for answer, text in ((says(None), ""), (says("a\ud83d!"), "a?!")):
        reply, _, _ = ask_once(answer)
        assert (reply.text, reply.finish, reply.error) == (text, Finish.STOP, "")
        reply.text.encode()


@pytest.mark.parametrize(
    "answer",
    [
        refuses(408),
        refuses(409),
        refuses(429),
        refuses(429, Retry_After="Fri, 31 Dec 1999 23:59:59 GMT"),
        refuses(500),
        refuses(503, Retry_After="0"),
        sends(b"<html>bad gateway</html>", 502, Content_Type="text/html"),
        cuts_the_line,
        cuts_the_body,
    ],
)
def test_what_may_pass_is_tried_again(answer):
    reply, stats, requests = ask_once(answer, answer, says("at last"))
    assert (reply.text, reply.error) == ("at last", "")
    assert (stats["calls"], stats["failures"], stats["retries"]) == (1, 0, 2)
    assert requests[0] == requests[1] == requests[2]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (refuses(429, "slow down"), "HTTP 429: slow down (after 3 tries)"),
        (sends(b"<html>\n busy </html>", 503), "HTTP 503: <html> busy </html> (after 3 tries)"),
        (cuts_the_line, "(after 3 tries)"),
        (cuts_the_body, "(after 3 tries)"),
    ],
)
def test_tries_are_counted_and_the_last_error_is_told(answer, error):
    reply, stats, requests = ask_once(answer)
    assert reply.finish is Finish.FAILED
    assert reply.error.endswith(error)
    assert len(reply.error) > len("(after 3 tries)")
    assert (stats["calls"], stats["failures"], stats["retries"], len(requests)) == (1, 1, 2, 3)


def test_without_retries_one_try_is_all():
    reply, stats, requests = ask_once(refuses(500, "broken"), max_retries=0)
    assert reply.error == "HTTP 500: broken"
    assert (stats["retries"], len(requests)) == (0, 1)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (refuses(400, "no such field"), "HTTP 400: no such field"),
        (refuses(404, "no such model"), "HTTP 404: no such model"),
        (refuses(401, "who are you?"), "HTTP 401: who are you? (OPENAI_API_KEY is set)"),
        (sends(b"<html>Log in\n first</html>"), "no chat completion: <html>Log in first</html>"),
        (sends({"choices": []}), 'no chat completion: {"choices": []}'),
        (sends([1]), "no chat completion: [1]"),
        (sends({"choices": [{"message": "hi"}]}), "no chat completion: {"),
        (sends(b"[" * 100_000), "no chat completion: [[["),
        (sends(b""), "no chat completion: (nothing)"),
        (says(None, "tool_calls", tool_calls=[]), "it ended with 'tool_calls'"),
        (says("I cannot", "content_filter"), "it ended with 'content_filter'"),
        (says([{"type": "text", "text": "x"}]), "it ended with 'stop'"),
        (says("x", ["stop"] * 1000), "it ended with ['stop', 'stop'"),
    ],
)
def test_what_will_not_pass_is_not_tried_again(answer, error):
    reply, stats, requests = ask_once(answer)
    assert (reply.finish, reply.text) == (Finish.FAILED, "")
    assert error in reply.error
    assert len(reply.error) < 400 and "\n" not in reply.error
    assert (stats["failures"], stats["retries"], len(requests)) == (1, 0, 1)


def test_waits_double_and_are_as_long_as_the_server_asks():
    with (
        serve(refuses(500)) as server,
        EndpointSpeaker(config(server, max_retries=3, first_wait_s=0.1), "m") as speaker,
    ):
        ask(speaker, "Hello")
        waits_s = [b - a for a, b in zip(server.times_s, server.times_s[1:], strict=False)]
    for wait_s, expected_s in zip(waits_s, (0.1, 0.2, 0.4), strict=True):
        assert 0.75 * expected_s <= wait_s < expected_s + 2
    with (
        serve(refuses(429, Retry_After="1"), says("x")) as server,
        EndpointSpeaker(config(server), "m") as speaker,
    ):
        ask(speaker, "Hello")
        assert 1.0 <= server.times_s[1] - server.times_s[0] < 4


@pytest.mark.parametrize("answer", [never, endless(200, 0.05), endless(500, 0.05)])
def test_a_try_is_bounded_in_time(answer):
    started_s = time.monotonic()
    reply, _, requests = ask_once(answer, timeout_s=0.4, max_retries=1)
    assert 0.8 <= time.monotonic() - started_s < 5
    assert reply.finish is Finish.FAILED and reply.error.endswith("(after 2 tries)")
    assert len(requests) == 2
    assert "within 0.4 s" in reply.error or "timed out" in reply.error.lower()


def test_an_endless_body_is_bounded_in_size():
    reply, stats, _ = ask_once(endless(200))
    assert reply.error == "the answer is longer than 16 MiB"
    assert stats["retries"] == 0
    reply, stats, _ = ask_once(endless(500), max_retries=1)
    assert reply.error.startswith("HTTP 500: ") and reply.error.endswith("(after 2 tries)")
    reply, _, _ = ask_once(endless(400))
    assert reply.error.startswith("HTTP 400: ")


def test_nobody_there_is_a_failed_reply():
    with serve(says("x")) as server:
        gone = config(server)
    with EndpointSpeaker(gone, "m") as speaker:
        (reply,) = ask(speaker, "Hello")
    assert reply.finish is Finish.FAILED
    assert "refused" in reply.error and reply.error.endswith("(after 3 tries)")


def test_calls_run_at_the_same_time_and_never_more_than_allowed():
    def slow(number, fields):
        def answer(handler):
            time.sleep(0.05)
            says(fields["messages"][0]["content"])(handler)

        return answer

    texts = [str(number) for number in range(20)]
    with ChatServer(slow) as server:
        with EndpointSpeaker(config(server, concurrency=4), "m") as speaker:
            started_s = time.monotonic()
            assert [reply.text for reply in ask(speaker, *texts)] == texts
            assert time.monotonic() - started_s >= 5 * 0.05
        assert server.peak == 4


def play(number, fields):
    """Walks up to the thing and opens it; in room 3 the server breaks down."""
    first, last = fields["messages"][1]["content"], fields["messages"][-1]["content"]
    if first.startswith("You are in room 3."):
        return refuses(401, f"Incorrect API key provided: {KEY}.")
    return says("Action: open" if "right here" in last else "Action: walk")


def game(key):
    return GameId(env="fake", family="door", key=str(key))


def test_a_server_that_fails_for_one_episode_costs_no_other():
    episodes = [Episode(game=game(key), system_prompt="Play.") for key in range(6)]
    with (
        ChatServer(play) as server,
        EndpointSpeaker(config(server), "m") as speaker,
        LocalPool(FakeEnvironment()) as pool,
    ):
        trajectories = rollout(
            speaker, pool, episodes, RolloutConfig(max_steps=5, max_turn_tokens=9)
        )
        assert speaker.idle
    assert [t.outcome for t in trajectories] == [
        Outcome.FAILED if key == 3 else Outcome.SUCCESS for key in range(6)
    ]
    assert trajectories[3].error == (
        "The actor failed: HTTP 401: Incorrect API key provided: ***. (OPENAI_API_KEY is set)."
    )
    assert not any(KEY in to_json(trajectory) for trajectory in trajectories)


def test_a_url_is_an_actor_of_the_meta_environment():
    with (
        ChatServer(play, models=("only",)) as server,
        MetaEnv(FakeEnvironment(), server.url, families=["door"], num_games=3) as env,
    ):
        context, info = env.reset()
        assert info["reward"] == 1.0
        assert env.play("Play.", [game(3)])[0].outcome is Outcome.FAILED
        _, reward, _, _, _ = env.step("Better.")
        assert reward == 1.0
        assert {request["model"] for request in server.requests} == {"only"}
        assert {request["messages"][0]["content"] for request in server.requests} == {
            context.system_prompt,
            "Play.",
            "Better.",
        }


def test_a_reply_without_an_action_is_a_parse_failure_of_its_turn():
    with (
        ChatServer(lambda number, fields: says(None)) as server,
        EndpointSpeaker(config(server), "m") as speaker,
        LocalPool(FakeEnvironment()) as pool,
    ):
        (trajectory,) = rollout(
            speaker,
            pool,
            [Episode(game=game(1), system_prompt="Play.")],
            RolloutConfig(max_steps=2, max_turn_tokens=9),
        )
    assert [turn.failure for turn in trajectory.turns] == [ParseFailure.NO_ACTION] * 2


def test_the_only_model_is_found():
    with serve(says("x")) as server, EndpointSpeaker(config(server)) as speaker:
        assert speaker.model == "only"
        ask(speaker, "Hello")
        assert server.requests[0]["model"] == "only"


@pytest.mark.parametrize(
    ("models", "error"),
    [
        (("b", "a"), "has 2 models (a, b): name one."),
        ((), "has 0 models (none): name one."),
        (tuple("abcdefghijkl"), "has 12 models (a, b, c, d, e, f, g, h): name one."),
        (refuses(401, f"No: {KEY}"), "(HTTP 401: No: *** (OPENAI_API_KEY is set)): name one."),
        (refuses(500), "(HTTP 500: not now): name one."),
        (sends(b"<html>"), "name one."),
        (sends({"models": []}), "name one."),
        (sends({"data": [1]}), "name one."),
        (sends({"data": [{"id": 1}, {"id": "a"}]}), "has 2 models (1, a): name one."),
        (never, "name one."),
        (endless(200, 0.05), "no whole answer within 0.5 s): name one."),
        (endless(200), "the answer is longer than 16 MiB): name one."),
    ],
)
def test_none_or_several_models_are_a_clear_error(models, error):
    waits = models is never or "0.5 s" in error
    with serve(says("x"), models=models) as server:
        with pytest.raises(ValueError) as caught:
            EndpointSpeaker(config(server, timeout_s=0.5 if waits else 5.0))
        assert str(caught.value).startswith(f"{server.url} (OPENAI_API_KEY is set) ")
        assert str(caught.value).endswith(error)
        assert KEY not in str(caught.value) and "\n" not in str(caught.value)
        until_s = time.monotonic() + 5
        while server.connections and models is not never:
            assert time.monotonic() < until_s, "the connection was left open"
            time.sleep(0.01)


@pytest.mark.parametrize("key", ["", "  \n"])
def test_a_server_of_ones_own_asks_for_no_key(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with serve(refuses(401, "a key, please")) as server:
        with EndpointSpeaker(config(server), "m") as speaker:
            (reply,) = ask(speaker, "Hello")
        assert reply.error == "HTTP 401: a key, please (OPENAI_API_KEY is not set)"
        assert server.headers[0]["Authorization"] == "Bearer none"


def test_a_key_is_read_from_the_variable_that_is_named_without_a_line_break(monkeypatch):
    monkeypatch.setenv("MY_KEY", "other-key\n")
    with (
        serve(says("x")) as server,
        EndpointSpeaker(config(server, key_variable="MY_KEY"), "m") as speaker,
    ):
        ask(speaker, "Hello")
        assert server.headers[0]["Authorization"] == "Bearer other-key"


@pytest.mark.parametrize("key", ["sk-a\nb", "sk a", "sk-\x01", "sk-é"])
def test_a_key_that_libraries_would_print_is_refused(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(
        ValueError, match="OPENAI_API_KEY holds characters that no key has"
    ) as caught:
        EndpointSpeaker(EndpointConfig(url="http://127.0.0.1:1/v1"), "m")
    assert key not in str(caught.value)


def test_the_key_is_told_to_nobody(tmp_path, caplog):
    """Echoed in any place of an answer, it stands in no error, count, representation or log."""
    caplog.set_level(logging.DEBUG)
    answers = [
        refuses(401, f"bad key {KEY}"),
        refuses(500, f"bad key {KEY}"),
        sends({"detail": f"bad key {KEY}"}, 403),
        sends(f"bad key {KEY}".encode(), 400),
        sends({"detail": f"bad key {KEY}"}),
        says("x", f"bad key {KEY}"),
        sends((f'{{"error": {{"message": "bad key {KEY}"}}}}'.replace("/", r"\/")).encode(), 401),
    ]
    for answer in answers:
        with (
            serve(answer) as server,
            EndpointSpeaker(config(server, max_retries=0), "m") as speaker,
        ):
            (reply,) = ask(speaker, "Hello")
            assert "bad key ***" in reply.error
            told = (reply, speaker, speaker.stats, config(server), reply.error)
            assert not any(KEY in f"{thing!r}{thing}" for thing in told)
    with serve(says("x"), models=refuses(401, f"bad key {KEY}")) as server:
        with pytest.raises(ValueError) as caught:
            EndpointSpeaker(config(server))
        assert KEY not in repr(caught.value)
        assert "bad key ***" in str(caught.value)
    assert KEY not in caplog.text


def test_shutting_down_waits_for_no_retry_and_closes_the_connections():
    def ours():
        return [thread for thread in threading.enumerate() if thread.name == "ictjax-speaker"]

    with serve(refuses(503, Retry_After="60")) as server:
        speaker = EndpointSpeaker(config(server, concurrency=2), "m")
        for text in "abcd":
            speaker.ask(speaker.open([Message(role="user", content=text)]), LIMITS, (0, 0))
        until_s = time.monotonic() + 10
        while len(server.requests) < 2:
            assert time.monotonic() < until_s
            time.sleep(0.01)
        started_s = time.monotonic()
        speaker.shut_down()
        speaker.shut_down()
        assert time.monotonic() - started_s < 1
        while ours() or server.connections:
            assert time.monotonic() < until_s
            time.sleep(0.01)
        assert len(server.requests) == 2  # those that waited for a thread are never sent
        with pytest.raises(ValueError, match="The speaker is shut down"):
            speaker.open([])
    gc.collect()  # a connection that was left open would warn now


def test_the_package_is_asked_for_in_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(ValueError) as caught:
        EndpointSpeaker(EndpointConfig(url="http://127.0.0.1:1/v1"), "m")
    assert str(caught.value) == (
        "To talk to http://127.0.0.1:1/v1 the package openai is needed: in the clone, run"
        f" `{install('api')}`."
    )


def test_a_speaker_without_a_url_is_refused():
    with pytest.raises(ValueError, match="endpoint.url is empty: give a base URL"):
        EndpointSpeaker(EndpointConfig())


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"url": "localhost:8000"}, "endpoint.url is 'localhost:8000': give http"),
        ({"concurrency": 0}, "endpoint.concurrency must be a whole number from 1 to 4,096, got 0"),
        ({"timeout_s": 0.0}, "endpoint.timeout_s must be from 0.001 to 86,400, got 0.0"),
        ({"timeout_s": float("inf")}, "endpoint.timeout_s must be from 0.001 to 86,400, got inf"),
        ({"max_retries": -1}, "endpoint.max_retries must be .*, got -1"),
        ({"first_wait_s": float("nan")}, "endpoint.first_wait_s must be .*, got nan"),
        (
            {"tokens_parameter": "tokens"},
            "endpoint.tokens_parameter must be one of .*, got 'tokens'",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, error):
    with pytest.raises(ValueError, match=error):
        EndpointConfig(**settings)


def test_the_configuration_holds_no_key():
    assert KEY not in str(dataclasses.asdict(EndpointConfig(url="http://x/v1")))
    source = pathlib.Path(sys.modules[EndpointSpeaker.__module__].__file__).read_text()
    assert source.count("os.environ") == 1
