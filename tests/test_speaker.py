"""Whoever answers: a model in a sampler and a Python function, through one interface."""

import collections
import contextlib
import itertools
import pathlib
import re
import subprocess
import sys
import threading
import time

import jax
import pytest

from ictjax.actions import parse_react
from ictjax.chat import ChatTokenizer
from ictjax.config import SamplerConfig
from ictjax.function_speaker import FunctionSpeaker
from ictjax.model_speaker import ModelSpeaker
from ictjax.models import transformer
from ictjax.models.config import ModelConfig
from ictjax.records import Message, ParseFailure
from ictjax.reflector import ask_groups
from ictjax.sampler import Sampler
from ictjax.speaker import MAX_REPLY_CHARS, Finish, Limits, estimate_tokens, is_speaker
from tests.tiny import ScriptedSampler, byte_tokenizer

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOKENIZER = byte_tokenizer()
CHAT = ChatTokenizer(TOKENIZER)
END = TOKENIZER.eos_token_id
LIMITS = Limits(max_tokens=30, temperature=0.0)
KEY = (1, 2)
PROMPT = "Play well."


def system(content=PROMPT):
    return Message(role="system", content=content)


def user(content):
    return Message(role="user", content=content)


def encoded(*messages):
    """The ids of a whole conversation by the template alone, ready for a reply."""
    plain = [{"role": message.role, "content": message.content} for message in messages]
    text = TOKENIZER.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    return tuple(TOKENIZER(text)["input_ids"])


def ids_of(text):
    return tuple(TOKENIZER(text)["input_ids"])


def echo(ids, request):
    """Says the last message that it was told."""
    last = TOKENIZER.decode(ids).split("<|im_start|>")[-2]
    return [*ids_of(last.removesuffix("<|im_end|>\n").partition("\n")[2]), END]


class Double(ScriptedSampler):
    """With the rest of what a speaker uses."""

    params = weights_step = None

    def set_params(self, params, step=None):
        self.params, self.weights_step = params, step

    def close(self, conversation):
        super().close(conversation)
        self._asked = collections.deque(pair for pair in self._asked if pair[0] != conversation)


def finish(speaker, count=1, within_s=20.0):
    """The next replies."""
    replies, until_s = [], time.monotonic() + within_s
    while len(replies) < count:
        assert time.monotonic() < until_s, f"{len(replies)} of {count} replies"
        replies += speaker.step()
    assert len(replies) == count
    return replies


def say(speaker, conversation, text, limits=LIMITS):
    """One turn: a message, and the reply to it."""
    speaker.hear(conversation, user(text))
    speaker.ask(conversation, limits, KEY)
    (reply,) = finish(speaker)
    assert reply.conversation == conversation
    return reply


# --- a model in a sampler ---


def test_messages_become_the_tokens_of_the_template_turn_by_turn():
    double = Double(echo)
    speaker = ModelSpeaker(double, CHAT)
    number = speaker.open([system()])
    said, before = [system()], ()
    for text in ("one", "two words", "three\nlines"):
        said.append(user(text))
        reply = say(speaker, number, text)
        assert (reply.text, reply.finish, reply.truncated) == (text, Finish.STOP, False)
        assert reply.prompt_ids == encoded(*said)
        assert reply.prompt_ids[: len(before)] == before
        assert reply.ids == (*ids_of(text), END)
        assert reply.logprobs == (-0.5,) * len(reply.ids)
        said.append(Message(role="assistant", content=text))
        before = reply.prompt_ids + reply.ids
    assert [ids for ids, _ in double.requests][-1] == reply.prompt_ids
    speaker.close(number)
    assert not double.ids


def test_a_reply_that_was_cut_off_is_closed_before_the_next_turn():
    speaker = ModelSpeaker(Double(echo), CHAT)
    number = speaker.open([system()])
    cut = say(speaker, number, "a long story", Limits(max_tokens=4, temperature=0.0))
    assert (cut.text, cut.finish, cut.truncated) == ("a lo", Finish.LENGTH, True)
    reply = say(speaker, number, "go on")
    assistant = Message(role="assistant", content="a lo")
    assert reply.prompt_ids == encoded(system(), user("a long story"), assistant, user("go on"))


@pytest.mark.parametrize(("stop", "said_before"), [("tor", "a long s"), ("a lon", "")])
def test_a_text_ends_a_reply_and_is_no_part_of_the_conversation(stop, said_before):
    speaker = ModelSpeaker(Double(echo), CHAT)
    number = speaker.open([system()])
    limits = Limits(max_tokens=30, temperature=0.0, stop=("never", stop))
    reply = say(speaker, number, "a long story", limits)
    assert (reply.text, reply.finish, reply.ids) == (said_before, Finish.STOP, ids_of(said_before))
    following = say(speaker, number, "go on", limits)
    assistant = Message(role="assistant", content=said_before)
    said = [system(), user("a long story"), assistant, user("go on")]
    assert following.prompt_ids == encoded(*said)
    assert (following.text, following.ids[-1]) == ("go on", END)  # the text does not occur


def test_a_full_conversation_is_told_as_such():
    double = Double(echo)
    double.max_len = 10
    speaker = ModelSpeaker(double, CHAT)
    reply = say(speaker, speaker.open([system()]), "one")
    assert (reply.text, reply.finish, reply.ids) == ("", Finish.CONTEXT, ())
    assert reply.truncated


def test_limits_and_key_reach_the_sampler():
    double = Double(echo)
    speaker = ModelSpeaker(double, CHAT)
    say(
        speaker,
        speaker.open([]),
        "one",
        Limits(max_tokens=7, temperature=0.5, top_k=3, top_p=0.25, min_p=0.125),
    )
    ((_, request),) = double.requests
    assert (request.max_new_tokens, request.temperature) == (7, 0.5)
    assert (request.top_k, request.top_p, request.stop_ids) == (3, 0.25, CHAT.stop_ids)
    assert (request.min_p, request.ends, request.key.tolist()) == (0.125, None, list(KEY))


@pytest.mark.parametrize("when", ["before a reply", "after a reply", "after another question"])
def test_a_fork_goes_its_own_way(when):
    double = Double(echo)
    speaker = ModelSpeaker(double, CHAT)
    number, said = speaker.open([system(), user("one")]), [system(), user("one")]
    if when != "before a reply":
        speaker.ask(number, LIMITS, KEY)
        finish(speaker)
        said.append(Message(role="assistant", content="one"))
    if when == "after another question":
        speaker.hear(number, user("two"))
        said.append(user("two"))
    forks = [speaker.fork(number), speaker.fork(number)]
    for index, member in enumerate([number, *forks]):
        heard = said
        if when == "after a reply":
            speaker.hear(member, user(f"two {index}"))
            heard = [*said, user(f"two {index}")]
        speaker.ask(member, LIMITS, KEY)
        (reply,) = finish(speaker)
        assert reply.prompt_ids == encoded(*heard)
        assert reply.text == heard[-1].content
        more = say(speaker, member, f"three {index}")
        answer = Message(role="assistant", content=reply.text)
        assert more.prompt_ids == encoded(*heard, answer, user(f"three {index}"))
    speaker.close(number)
    say(speaker, forks[0], "four")  # outlives its parent
    for fork in forks:
        speaker.close(fork)
    assert not double.ids


def test_a_conversation_is_used_in_turns():
    speaker = ModelSpeaker(Double(echo), CHAT)
    number = speaker.open([])
    with pytest.raises(ValueError, match="Conversation 0 has nothing to answer"):
        speaker.ask(number, LIMITS, KEY)
    speaker.hear(number, system())
    speaker.hear(number, user("one"))  # before the first reply any number of messages
    speaker.ask(number, LIMITS, KEY)
    for call in (
        lambda: speaker.ask(number, LIMITS, KEY),
        lambda: speaker.hear(number, user("two")),
        lambda: speaker.fork(number),
    ):
        with pytest.raises(ValueError, match="Conversation 0 waits for a reply: step until"):
            call()
    finish(speaker)
    with pytest.raises(ValueError, match="Conversation 0 has nothing to answer"):
        speaker.ask(number, LIMITS, KEY)
    speaker.hear(number, user("two"))
    with pytest.raises(ValueError, match="hears one message after each reply: ask before"):
        speaker.hear(number, user("three"))
    fork = speaker.fork(number)
    for member in (number, fork):  # what was forked is a question already
        with pytest.raises(ValueError, match="hears one message after each reply: ask before"):
            speaker.hear(member, user("three"))
    speaker.close(number)
    for call in (
        lambda: speaker.ask(number, LIMITS, KEY),
        lambda: speaker.hear(number, user("two")),
        lambda: speaker.fork(number),
        lambda: speaker.close(number),
        lambda: speaker.sampled(number),
    ):
        with pytest.raises(ValueError, match="Conversation 0 is not open: it was closed, or never"):
            call()


def test_closing_drops_a_reply_that_is_under_way():
    double = Double(echo)
    speaker = ModelSpeaker(double, CHAT)
    first, second = speaker.open([user("one")]), speaker.open([user("two")])
    speaker.close(second)
    speaker.ask(first, LIMITS, KEY)
    assert [reply.text for reply in finish(speaker)] == ["one"]
    assert speaker.idle
    assert speaker.step() == []


def lead(speaker, count=3, prompt=PROMPT):
    """Conversations under one prompt, asked in order."""
    numbers = [speaker.open([system(prompt)]) for _ in range(count)]
    for number in numbers:
        speaker.hear(number, user(f"say {number}"))
        speaker.ask(number, LIMITS, KEY)
    return numbers


def test_conversations_wait_for_the_first_reply_under_their_prompt():
    double = Double(echo, num_slots=1)
    speaker = ModelSpeaker(double, CHAT, share_min_tokens=10)
    numbers = lead(speaker)
    assert len(double.ids) == 1
    with pytest.raises(ValueError, match="waits for a reply"):
        speaker.hear(numbers[1], user("more"))
    (reply,) = speaker.step()
    assert (reply.conversation, reply.text) == (numbers[0], "say 0")
    assert len(double.ids) == 3  # the others have started
    assert sorted(reply.text for reply in finish(speaker, 2)) == ["say 1", "say 2"]
    more = lead(speaker, 2)  # the prefix is known by now: nobody waits
    assert len(double.ids) == 5
    for number in (*numbers, *more):
        speaker.close(number)
    assert not double.ids
    lead(speaker)  # and forgotten when all are closed
    assert len(double.ids) == 1


def test_followers_start_when_their_leader_is_closed():
    double = Double(echo)
    speaker = ModelSpeaker(double, CHAT, share_min_tokens=10)
    leader, second, third = lead(speaker)
    speaker.close(second)  # one that waits may go
    assert list(double.ids) == [0]
    speaker.close(leader)
    assert len(double.ids) == 1
    (reply,) = finish(speaker)
    assert (reply.conversation, reply.text) == (third, f"say {third}")


@pytest.mark.parametrize(
    ("share_min_tokens", "prompts"),
    [(None, (PROMPT,) * 3), (10_000, (PROMPT,) * 3), (10, ("a", "b", "c"))],
)
def test_nobody_waits_without_need(share_min_tokens, prompts):
    double = Double(echo)
    speaker = ModelSpeaker(double, CHAT, share_min_tokens=share_min_tokens)
    for prompt in prompts:
        lead(speaker, 1, prompt)
    assert len(double.ids) == 3
    finish(speaker, 3)


def test_a_conversation_without_a_system_prompt_waits_for_none():
    double = Double(echo)
    speaker = ModelSpeaker(double, CHAT, share_min_tokens=1)
    for _ in range(2):
        speaker.ask(speaker.open([user("one")]), LIMITS, KEY)
    assert len(double.ids) == 2


def test_a_model_repeats_itself_where_it_is_greedy_and_counts_exactly():
    double = Double(echo)
    speaker = ModelSpeaker(double, CHAT)
    assert speaker.repeats(Limits(max_tokens=1, temperature=0.0))
    assert not speaker.repeats(Limits(max_tokens=1, temperature=0.1))
    assert speaker.num_tokens("four") == 4
    assert speaker.num_tokens([system(), user("one")]) == len(encoded(system(), user("one")))
    speaker.set_params({"some": "weights"}, 7)
    assert (double.params, double.weights_step) == ({"some": "weights"}, 7)


# --- groups ---


@pytest.mark.parametrize("order", range(3))
def test_replies_of_groups_come_back_in_order(order):
    def script(ids, request):
        return [*echo(ids, request)[:-1], *ids_of(f" {request.key[0]}"), END]

    double = Double(script, num_slots=2, order=order)
    seen = []
    groups = ask_groups(
        ModelSpeaker(double, CHAT),
        [[system(), user("a")], [system(), user("b")]],
        LIMITS,
        [[(1, 0), (2, 0), (3, 0)], [(4, 0)]],
        lambda done, total: seen.append((done, total)),
    )
    assert [[r.text for r in group] for group in groups] == [["a 1", "a 2", "a 3"], ["b 4"]]
    assert {reply.prompt_ids for reply in groups[0]} == {encoded(system(), user("a"))}
    assert seen == [(number, 4) for number in (1, 2, 3, 4)]
    assert not double.ids


@pytest.mark.parametrize("where", ["open", "fork", "generate", "step", "progress"])
def test_conversations_are_closed_after_an_exception(where):
    class Failing(Double):
        def _count(self, call):
            if call == where and next(counter) == 1:
                raise RuntimeError("broken")

        def open(self, ids):
            self._count("open")
            return super().open(ids)

        def fork(self, conversation):
            self._count("fork")
            return super().open(self.ids[conversation])

        def generate(self, conversation, request):
            self._count("generate")
            super().generate(conversation, request)

        def step(self):
            self._count("step")
            return super().step()

    counter = itertools.count()
    double = Failing(echo, num_slots=1)
    with pytest.raises(RuntimeError, match="broken"):
        ask_groups(
            ModelSpeaker(double, CHAT),
            [[user("a")], [user("b")]],
            LIMITS,
            [[KEY] * 3] * 2,
            lambda done, total: double._count("progress"),
        )
    assert not double.ids


# --- a real sampler ---

MODEL = ModelConfig(
    vocab_size=len(TOKENIZER),
    num_layers=1,
    d_model=16,
    d_ff=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_positions=256,
)
SIZES = SamplerConfig(
    num_slots=4,
    max_len=256,
    extend_buckets=(64,),
    row_buckets=(4,),
    decode_steps=4,
    max_top_k=1,
    attended_buckets=(256,),
)


def weights(seed):
    drawn = transformer.init_params(MODEL, jax.random.key(seed))
    return jax.tree.map(lambda leaf: leaf * (12 if leaf.ndim > 1 else 1), drawn)


def test_a_real_sampler_speaks_and_reads_a_groups_question_once():
    sampler = Sampler(MODEL, weights(0), SIZES, CHAT.pad_id)
    limits = Limits(max_tokens=6, temperature=1.0)
    question = [system(), user("What is behind the door? " * 5)]
    keys = [(number, 0) for number in range(4)]
    with ModelSpeaker(sampler, CHAT) as speaker:
        assert is_speaker(speaker)
        (group,) = ask_groups(speaker, [question], limits, [keys])
        size = len(encoded(*question))
        # once, and the last token again in every row: replies start from its hidden state
        assert size <= speaker.stats["prefilled_tokens"] <= size + 4
        assert speaker.stats["reused_tokens"] >= 3 * (size - 2)
        assert len({reply.ids for reply in group}) > 1
        for reply, key in zip(group, keys, strict=True):
            assert reply.prompt_ids == encoded(*question)
            assert len(reply.ids) == len(reply.logprobs) > 0
            assert all(logprob < 0 for logprob in reply.logprobs)
            assert reply.text == CHAT.decode(reply.ids)
            number = speaker.open(question)  # alone, it says the same
            speaker.ask(number, limits, key)
            (alone,) = finish(speaker)
            assert alone.ids == reply.ids
            speaker.close(number)

        greedy = Limits(max_tokens=6, temperature=0.0)
        number = speaker.open([system()])
        speaker.hear(number, user("one"))
        speaker.ask(number, greedy, KEY)
        shown = [speaker.sampled(number)]
        while not (replies := speaker.step()):
            shown.append(speaker.sampled(number))
        (first,) = replies
        assert shown[0] == "" and len(shown[-1]) > 0  # it can be watched as it grows
        assert all(first.text.startswith(part.rstrip("\ufffd")) for part in shown)
        with pytest.raises(ValueError, match="1 conversations are open"):
            speaker.set_params(weights(1))
        second = say(speaker, number, "two", greedy)
        assert second.prompt_ids[: len(first.prompt_ids + first.ids)] == (
            first.prompt_ids + first.ids
        )
        speaker.close(number)
        speaker.set_params(weights(1))
        number = speaker.open([system()])
        other = say(speaker, number, "one", greedy)
        assert other.prompt_ids == first.prompt_ids and other.ids != first.ids
    with pytest.raises(ValueError, match="the sampler is closed"):
        speaker.step()


# --- a function ---


def asked(speaker, *texts):
    """A conversation for each text, asked in order."""
    numbers = [speaker.open([user(text)]) for text in texts]
    for number in numbers:
        speaker.ask(number, LIMITS, KEY)
    return numbers


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "ictjax-speaker"]


def wait_until(holds, within_s=10.0):
    until_s = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < until_s
        time.sleep(0.005)


@contextlib.contextmanager
def held():
    """An event that calls may wait for; they are let go at the end, and their threads end too."""
    before, event = threads(), threading.Event()
    try:
        yield event
    finally:
        event.set()
    wait_until(lambda: not set(threads()) - set(before))


def test_a_speaker_is_told_by_its_class_and_no_property_of_it_is_read():
    class Broken(FunctionSpeaker):
        @property
        def stats(self):
            raise AttributeError("read too early")

    with Broken(lambda messages, actions: "yes") as speaker:
        assert is_speaker(speaker)
    assert not is_speaker(Broken)
    assert not any(map(is_speaker, (None, print, "speaker", object())))


def test_a_function_hears_the_conversation_and_the_newest_actions():
    heard = []

    def function(messages, actions):
        heard.append((messages, actions))
        return f"reply {len(heard)}"

    with FunctionSpeaker(function) as speaker:
        assert is_speaker(speaker)
        number = speaker.open([system()])
        speaker.hear(number, user("one"), ["walk", "look"])
        speaker.ask(number, LIMITS, KEY)
        assert not speaker.idle
        (reply,) = finish(speaker)
        assert speaker.idle and speaker.step() == []
        assert (reply.text, reply.finish, reply.error) == ("reply 1", Finish.STOP, "")
        assert (reply.ids, reply.prompt_ids, reply.logprobs) == ((), (), ())
        fork = speaker.fork(number)
        assert say(speaker, number, "two").text == "reply 2"
        assert say(speaker, fork, "other").text == "reply 3"
        assert dict(speaker.stats) == {"calls": 3, "failures": 0}
    first = (system(), user("one"))
    assert heard == [
        (first, ("walk", "look")),
        ((*first, Message(role="assistant", content="reply 1"), user("two")), ()),
        ((*first, Message(role="assistant", content="reply 1"), user("other")), ()),
    ]


@pytest.mark.parametrize(
    ("said", "repeated"),
    [
        ("Action: go", "Action: go"),
        ("<think>\nwait?\n</think>\n\nAction: go", "Action: go"),
        ("wait?\n</think>\n\nAction: go", "Action: go"),
        ("Action: say </think>", "Action: say </think>"),
        ("<think>\nwait?", "(no answer)"),
        ("<think>\nwait?\n</think>", "(no answer)"),
        ("", ""),
    ],
)
def test_thoughts_are_part_of_a_reply_and_not_of_later_turns(said, repeated):
    heard = []

    def function(messages, actions):
        heard.append(messages)
        return said

    with FunctionSpeaker(function) as speaker:
        number = speaker.open([system()])
        assert say(speaker, number, "one").text == said
        say(speaker, number, "two")
    assert heard[1] == (
        system(),
        user("one"),
        Message(role="assistant", content=repeated),
        user("two"),
    )


@pytest.mark.parametrize("length", [MAX_REPLY_CHARS, MAX_REPLY_CHARS + 1, 10 * 2**20])
def test_a_reply_without_an_end_is_cut(length):
    with FunctionSpeaker(lambda messages, actions: "*" * length) as speaker:
        number = speaker.open([system()])
        begun = time.process_time()
        reply = say(speaker, number, "one")
        parsed = parse_react(reply.text, truncated=reply.truncated)
        assert time.process_time() - begun < 4
        assert len(reply.text) == min(length, MAX_REPLY_CHARS) == 2**20
        assert reply.truncated == (length > MAX_REPLY_CHARS)
        assert parsed is (ParseFailure.TRUNCATED if reply.truncated else ParseFailure.NO_ACTION)


@pytest.mark.parametrize("text", ["\ud800", "a\udcffb"])
def test_half_a_character_of_a_reply_is_a_question_mark(text):
    with FunctionSpeaker(lambda messages, actions: text) as speaker:
        assert say(speaker, speaker.open([]), "one").text == re.sub("[\ud800-\udfff]", "?", text)


def test_calls_run_in_parallel_and_no_more_than_threads():
    barrier, lock, busy, peak = threading.Barrier(3), threading.Lock(), [0], [0]

    def function(messages, actions):
        with lock:
            busy[0] += 1
            peak[0] = max(peak[0], busy[0])
        barrier.wait(10)  # passed by three at once only
        with lock:
            busy[0] -= 1
        return messages[0].content

    with FunctionSpeaker(function, threads=3) as speaker:
        asked(speaker, *"abcdef")
        assert sorted(reply.text for reply in finish(speaker, 6)) == list("abcdef")
    assert peak == [3]


def test_replies_that_are_there_come_in_the_order_asked():
    second_done = threading.Event()

    def function(messages, actions):
        if messages[0].content == "a":
            assert second_done.wait(10)
        return messages[0].content

    with FunctionSpeaker(function, threads=2) as speaker:
        first, second = asked(speaker, "a", "b")
        (reply,) = finish(speaker)  # the slow one holds back no other
        assert (reply.conversation, reply.text) == (second, "b")
        second_done.set()
        assert finish(speaker)[0].conversation == first
    calls = []
    with FunctionSpeaker(lambda *said: calls.append(said) or "x", threads=4) as speaker:
        numbers = asked(speaker, *"abcd")
        wait_until(lambda: len(calls) == 4)
        time.sleep(0.2)
        assert [reply.conversation for reply in speaker.step()] == numbers


def test_one_thread_calls_in_the_order_asked():
    calls = []
    with FunctionSpeaker(lambda messages, actions: calls.append(messages) or "x", threads=1) as s:
        asked(s, *"abcd")
        finish(s, 4)
    assert [messages[0].content for messages in calls] == list("abcd")


class Odd(Exception):
    pass


def unwell(messages, actions):
    match messages[-1].content:
        case "raise":
            raise Odd("two\n lines")
        case "number":
            return 7
        case "nothing":
            return None
        case "stop":
            raise StopIteration
        case "half":
            return "a\ud83d!"
    return "fine"


def test_a_call_that_fails_costs_its_own_reply_only():
    with FunctionSpeaker(unwell, threads=2) as speaker:
        numbers = asked(speaker, "raise", "fine", "number", "nothing", "stop", "half", "fine")
        replies = sorted(finish(speaker, 7), key=lambda reply: reply.conversation)
        assert [reply.finish is Finish.FAILED for reply in replies] == [1, 0, 1, 1, 1, 0, 0]
        assert [reply.error for reply in replies] == [
            "Odd: two lines",
            "",
            "TypeError: it returned int where a reply (str) was expected",
            "TypeError: it returned NoneType where a reply (str) was expected",
            "StopIteration:",
            "",
            "",
        ]
        assert replies[5].text == "a?!"  # any file takes it
        assert dict(speaker.stats) == {"calls": 7, "failures": 4}
        assert not replies[0].truncated
        # a failed reply is no part of its conversation, which may go on
        speaker.ask(numbers[0], LIMITS, KEY)
        assert finish(speaker)[0].error == "Odd: two lines"
        assert say(speaker, numbers[0], "again").text == "fine"


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_a_thread_that_is_told_to_end_the_program_does(kind):
    def function(messages, actions):
        raise kind

    with FunctionSpeaker(function) as speaker:
        asked(speaker, "a")
        with pytest.raises(kind):
            finish(speaker)


def test_a_function_may_return_the_bare_action():
    replies = {
        "open": "Action: open",
        "Thought: near.\nAction: open": "Thought: near.\nAction: open",
        "": "Action: ",
        "I walk": "Action: I walk",
    }
    function = lambda messages, actions: messages[0].content  # noqa: E731
    with FunctionSpeaker(function, replies="action") as speaker:
        for text, expected in replies.items():
            asked(speaker, text)
            assert finish(speaker)[0].text == expected
    with FunctionSpeaker(function) as speaker:
        asked(speaker, "open")
        assert finish(speaker)[0].text == "open"


def slow_once(event, calls):
    """The first call waits for the event; the others do not."""

    def function(messages, actions):
        calls.append(messages[0].content)
        if len(calls) == 1:
            event.wait(60)
        return f"said {messages[0].content}"

    return function


def test_a_call_past_its_deadline_fails_and_its_thread_is_replaced():
    calls = []
    with (
        held() as event,
        FunctionSpeaker(slow_once(event, calls), threads=1, deadline_s=0.3) as speaker,
    ):
        started_s = time.monotonic()
        stuck, waiting = asked(speaker, "a", "b")
        replies = finish(speaker, 2)
        assert 0.3 < time.monotonic() - started_s < 1.3
        assert [reply.conversation for reply in replies] == [stuck, waiting]
        assert replies[0].finish is Finish.FAILED
        assert replies[0].error == "TimeoutError: no answer within 0.3 s"
        assert replies[1].text == "said b"
        assert dict(speaker.stats) == {"calls": 2, "failures": 1}
        # A late answer is no reply, and its thread is one too many.
        event.set()
        wait_until(lambda: len(threads()) == 1)
        assert speaker.step() == []
        assert say(speaker, stuck, "c").text == "said a"
        assert calls == ["a", "b", "a"]


def test_the_deadline_of_a_call_begins_when_it_does():
    def function(messages, actions):
        time.sleep(0.5)
        return "x"

    # on a crowded machine a call of 0.5 s takes longer, but not 2 s
    with FunctionSpeaker(function, threads=1, deadline_s=2.0) as speaker:
        asked(speaker, *"abcde")  # 2.5 s together
        assert [reply.finish for reply in finish(speaker, 5)] == [Finish.STOP] * 5


@pytest.mark.parametrize("threads", [1, 4])
def test_a_stuck_call_of_a_closed_conversation_holds_back_no_other(threads):
    calls = []
    with (
        held() as event,
        FunctionSpeaker(slow_once(event, calls), threads=threads, deadline_s=0.3) as speaker,
    ):
        (stuck,) = asked(speaker, "a")
        wait_until(lambda: calls)
        speaker.close(stuck)
        assert speaker.idle
        asked(speaker, "b")
        assert [reply.text for reply in finish(speaker, within_s=1.3)] == ["said b"]
        event.set()
        time.sleep(0.05)
        assert speaker.step() == []  # nobody hears of the late answer
        assert dict(speaker.stats) == {"calls": 1, "failures": 0}


def test_what_is_closed_before_its_turn_is_never_called():
    calls = []
    with held() as event, FunctionSpeaker(slow_once(event, calls), threads=1) as speaker:
        _, second, _ = asked(speaker, "a", "b", "c")
        wait_until(lambda: calls)
        speaker.close(second)
        event.set()
        assert [reply.text for reply in finish(speaker, 2)] == ["said a", "said c"]
        assert calls == ["a", "c"]


def test_shutting_down_starts_no_further_call_and_is_idempotent():
    calls = []
    with held() as event:
        with FunctionSpeaker(slow_once(event, calls), threads=1) as speaker:
            asked(speaker, "a", "b")
            wait_until(lambda: calls)
            started_s = time.monotonic()
            speaker.shut_down()
            assert time.monotonic() - started_s < 0.5
            assert speaker.idle and speaker.step() == []
        speaker.shut_down()
        with pytest.raises(ValueError, match="The speaker is shut down: make another"):
            speaker.open([user("c")])
        event.set()
        wait_until(lambda: not threads())
        assert calls == ["a"]


def test_the_program_ends_although_a_call_never_does():
    code = """
import threading
from ictjax.function_speaker import FunctionSpeaker
from ictjax.records import Message
from ictjax.speaker import Limits
began = threading.Event()
def function(messages, actions):
    began.set()
    threading.Event().wait()
with FunctionSpeaker(function, threads=2) as speaker:
    number = speaker.open([Message(role="user", content="a")])
    speaker.ask(number, Limits(max_tokens=1, temperature=0.0), (0, 0))
    assert began.wait(20)
print("over")
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "over\n", "")


def test_a_conversation_with_a_function_is_used_in_turns():
    with held() as event, FunctionSpeaker(slow_once(event, [])) as speaker:
        (number,) = asked(speaker, "a")
        for call in (
            lambda: speaker.ask(number, LIMITS, KEY),
            lambda: speaker.hear(number, user("two")),
            lambda: speaker.fork(number),
        ):
            with pytest.raises(ValueError, match="Conversation 0 waits for a reply: step until"):
                call()
        speaker.close(number)
        for call in (
            lambda: speaker.ask(number, LIMITS, KEY),
            lambda: speaker.hear(number, user("two")),
            lambda: speaker.fork(number),
            lambda: speaker.close(number),
        ):
            with pytest.raises(ValueError, match="Conversation 0 is not open: it was closed"):
                call()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"function": 7}, "A speaker needs a function of .messages, actions.* got 7"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"replies": "json"}, "replies must be 'text' or 'action', got 'json'"),
        ({"deadline_s": 0.0}, "deadline_s must be above 0 seconds, got 0.0"),
        ({"deadline_s": float("nan")}, "deadline_s must be above 0 seconds, got nan"),
    ],
)
def test_settings_of_a_function_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        FunctionSpeaker(**{"function": unwell, **arguments})


def test_sizes_without_a_tokenizer_are_estimated_rather_too_high():
    with FunctionSpeaker(unwell) as speaker:
        assert speaker.num_tokens("") == 0
        assert speaker.num_tokens("ab") == 1
        assert speaker.num_tokens("a" * 300) == 100
        assert speaker.num_tokens([system("a" * 4), user("b" * 4)]) == 3
        assert not speaker.repeats(LIMITS)
    assert estimate_tokens("a" * 301) == 101
