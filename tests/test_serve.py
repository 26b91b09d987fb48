"""`ictjax serve`: OpenAI's own client, ours, and whoever sends nonsense, against a tiny model on
this machine.
"""

import asyncio
import contextlib
import dataclasses
import http.client
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping

import jax
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from experiments.fake_pair import FOLDER, TEMPLATE, chat_tokenizer
from experiments.held_model import read_weights
from experiments.shapes import PUBLISHED
from ictjax.chat import ChatTokenizer
from ictjax.config import EndpointConfig, LoraConfig, SamplerConfig
from ictjax.endpoint_speaker import EndpointSpeaker
from ictjax.model_speaker import ModelSpeaker
from ictjax.models import transformer
from ictjax.models.config import ModelConfig
from ictjax.models.hf.reader import read_config
from ictjax.models.lora import init_adapter, with_adapter
from ictjax.models.peft import save_adapter
from ictjax.records import Message
from ictjax.sampler import Sampler, row_programs, sampling_weights, turn_shapes
from ictjax.speaker import Limits as ReplyLimits
from tests.test_cli import refused
from tests.test_paged_sampler import check_pools
from tests.tiny import byte_tokenizer

openai = pytest.importorskip("openai")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from experiments.commands import serve as command  # noqa: E402
from experiments.serve import HttpServer, _open_models  # noqa: E402
from experiments.serve import _sizes as sizes_of  # noqa: E402
from experiments.serve_app import Api, Limits  # noqa: E402
from experiments.serve_protocol import (  # noqa: E402
    _IDLE,
    _READ,
    _REFUSED,
    MAX_BIAS_IDS,
    MAX_TOP_LOGPROBS,
    Answers,
    ApiError,
    Choice,
    read_chat,
)
from experiments.serve_thread import SamplerThread, Served, _token  # noqa: E402

ROOT = pathlib.Path(__file__).parent.parent
TOKENIZER = byte_tokenizer()
CHAT = ChatTokenizer(TOKENIZER)
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
    max_len=192,
    extend_buckets=(64,),
    row_buckets=(4,),
    decode_steps=3,
    max_top_k=8,
    attended_buckets=(192,),
    max_bias_ids=MAX_BIAS_IDS,
    max_top_logprobs=MAX_TOP_LOGPROBS,
)
# what it says is readable: letters, spaces, line breaks, and the end
SAID = {*TOKENIZER("abcdefgh \n")["input_ids"], TOKENIZER.eos_token_id}
UNUSED = tuple(range(i, i + 1) for i in range(MODEL.vocab_size) if i not in SAID)
PROMPTS = ("Hello", "a door\nb", "Where to?")
WAIT_S = 60.0


@dataclasses.dataclass(kw_only=True)
class Running:
    """A server in a thread of the tests."""

    api: Api
    server: HttpServer
    models: Mapping[str, Served]
    port: int
    thread: SamplerThread
    runner: threading.Thread

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    def client(self, kind=openai.OpenAI, **settings):
        return kind(
            base_url=self.url, **{"api_key": "none", "max_retries": 0, "timeout": WAIT_S} | settings
        )

    def send(self, fields, *, path="/v1/chat/completions", method="POST", **headers):
        """Status, headers and body of a raw request."""
        body = fields if isinstance(fields, bytes | None) else json.dumps(fields).encode()
        with contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_S)
        ) as connection:
            names = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, {"content-type": "application/json"} | names)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()

    def settled(self):
        """Waits until nothing is left of what was asked."""
        until_s = time.monotonic() + WAIT_S
        while self.api.num_replies or any(s.sampler.num_open for s in self.models.values()):
            assert time.monotonic() < until_s
            threading.Event().wait(0.01)


@contextlib.contextmanager
def running(models, *, grace_s=WAIT_S, **limits):
    settings = {"max_replies": 1000, "max_body_bytes": 100_000, "hosts": ("127.0.0.1",)} | limits
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    with (
        SamplerThread(models) as thread,
        contextlib.closing(Api(models, thread, Limits(**settings))) as api,
    ):
        server = HttpServer(api, thread, grace_s=grace_s)
        runner = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
        runner.start()
        try:
            yield Running(
                api=api,
                server=server,
                models=models,
                port=listener.getsockname()[1],
                thread=thread,
                runner=runner,
            )
        finally:
            server.should_exit = True
            runner.join()


@contextlib.contextmanager
def opened(**changes):
    """A base and an adapter on it, which hold the same arrays."""
    rng = np.random.default_rng(0)

    def drawn(path, leaf):
        norm = "norm" in jax.tree_util.keystr(path)
        return np.asarray(np.ones(leaf.shape) if norm else rng.normal(size=leaf.shape), leaf.dtype)

    params = jax.tree_util.tree_map_with_path(drawn, transformer.abstract_params(MODEL))
    base = sampling_weights(MODEL, params)
    lora = LoraConfig(rank=2, targets=("q", "down"))
    adapter = jax.tree.map(
        lambda leaf: np.asarray(leaf) + 1.0, init_adapter(MODEL, lora, jax.random.key(1))
    )
    # its replies take one dispatch, so that there is one program less to compile
    usual = dataclasses.replace(SIZES, **changes)
    quick = dataclasses.replace(usual, extend_steps=16)
    tuned = with_adapter(lora, base, adapter)
    with contextlib.ExitStack() as stack:
        yield {
            name: Served(
                sampler=stack.enter_context(
                    Sampler(MODEL, weights, sizes, CHAT.pad_id, unused=UNUSED)
                ),
                chat=CHAT,
                max_len=sizes.max_len,
                max_top_k=SIZES.max_top_k,
                max_top_logprobs=SIZES.max_top_logprobs,
            )
            for name, weights, sizes in (("tiny", base, usual), ("tuned", tuned, quick))
        }


@pytest.fixture(scope="module")
def models():
    with opened() as found:
        yield found


def said_by(speaker, *texts, limits=ReplyLimits(max_tokens=12, temperature=0.0)):  # noqa: B008
    """The replies to one conversation for each text."""
    numbers = [speaker.open([Message(role="user", content=text)]) for text in texts]
    for number in numbers:
        speaker.ask(number, limits, (1, 2))
    replies = {}
    while len(replies) < len(numbers):
        replies |= {reply.conversation: reply for reply in speaker.step()}
    for number in numbers:
        speaker.close(number)
    return [replies[number] for number in numbers]


@pytest.fixture(scope="module")
def direct(models):
    """What the models say to PROMPTS without a server."""
    return {
        name: said_by(ModelSpeaker(served.sampler, CHAT), *PROMPTS)
        for name, served in models.items()
    }


@pytest.fixture(scope="module")
def served(models, direct):
    """A server for the tests that only need some."""
    del direct  # the samplers are the server's from here on
    with running(models) as found:
        yield found


def ask(client, text, model="tiny", **fields):
    return client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": text}],
        **{"max_tokens": 12, "temperature": 0} | fields,
    )


def test_the_official_client_hears_what_the_model_says(served, direct):
    with served.client() as client:
        assert [model.id for model in client.models.list()] == ["tiny", "tuned"]
        assert client.models.retrieve("tuned").id == "tuned"
        for name, replies in direct.items():
            for text, reply in zip(PROMPTS, replies, strict=True):
                answer = ask(client, text, name, logprobs=True)
                (choice,) = answer.choices
                assert choice.message.content == reply.text
                assert choice.finish_reason == str(reply.finish)
                assert answer.usage.prompt_tokens == len(reply.prompt_ids)
                assert answer.usage.completion_tokens == len(reply.ids)
                assert "".join(token.token for token in choice.logprobs.content) == reply.text
                # greedy, so both are of the model itself
                np.testing.assert_allclose(
                    [token.logprob for token in choice.logprobs.content],
                    reply.logprobs[: len(choice.logprobs.content)],
                    atol=1e-4,
                )
    assert direct["tiny"][0].text != direct["tuned"][0].text
    served.settled()


def test_our_own_speaker_hears_the_same(served, direct, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for name, replies in direct.items():
        with EndpointSpeaker(EndpointConfig(url=served.url, max_retries=0), name) as speaker:
            heard = said_by(speaker, *PROMPTS)
            assert [(r.text, r.finish) for r in heard] == [(r.text, r.finish) for r in replies]
            whole = replies[1].text
            stop = whole[4:6]
            limits = ReplyLimits(max_tokens=12, temperature=0.0, stop=(stop,), min_p=0.01)
            (cut,) = said_by(speaker, PROMPTS[1], limits=limits)
            assert cut.text == whole[: whole.index(stop)]


@pytest.mark.parametrize("by", ["stop", "length"])
def test_a_stream_is_the_reply_in_pieces(served, direct, by):
    whole = direct["tiny"][1].text
    stop = [whole[5:8]] if by == "stop" else []
    fields = {"stream": True, "stream_options": {"include_usage": True}, "stop": stop}
    with served.client() as client:
        at_once = ask(client, PROMPTS[1], stop=stop, logprobs=True)
        chunks = list(ask(client, PROMPTS[1], logprobs=True, **fields))
    *chunks, last = chunks
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert len([piece for piece in pieces if piece]) > 1
    expected = whole[: whole.index(stop[0])] if stop else whole
    assert "".join(pieces) == expected == at_once.choices[0].message.content
    finishes = [chunk.choices[0].finish_reason for chunk in chunks]
    assert (set(finishes[:-1]), finishes[-1]) == ({None}, by)
    tokens = [
        token
        for chunk in chunks
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content
    ]
    assert tokens == at_once.choices[0].logprobs.content
    assert (last.choices, last.usage) == ([], at_once.usage)
    assert all(chunk.usage is None for chunk in chunks)
    raw = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    status, headers, body = served.send({**raw, "stream": True})
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    events = body.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and "usage" not in json.loads(events[0][6:])


def test_the_example_of_the_page(served, capsys):
    page = (ROOT / "docs" / "serve.md").read_text(encoding="utf-8")
    example = page.partition("```python\n")[2].partition("```")[0]
    exec(example.replace("http://localhost:8000/v1", served.url).replace('"actor"', '"tiny"'))
    assert len(capsys.readouterr().out) > 3


def test_choices_follow_from_the_seed(served):
    fields = {"n": 3, "temperature": 1.5, "top_p": 0.95, "max_tokens": 10}
    with served.client() as client:
        first, again, other = (
            [
                (choice.index, choice.message.content)
                for choice in ask(client, "Hello", seed=seed, **fields).choices
            ]
            for seed in (5, 5, 6)
        )
        # all three: one in a hundred pairs of single replies is equal
        free = [
            [choice.message.content for choice in ask(client, "Hello", **fields).choices]
            for _ in range(2)
        ]
        streamed = ["", "", ""]
        for chunk in ask(client, "Hello", seed=5, stream=True, **fields):
            choice = chunk.choices[0]
            streamed[choice.index] += choice.delta.content or ""
    assert first == again != other
    assert [index for index, _ in first] == [0, 1, 2]
    assert [text for _, text in first] == streamed
    assert len(set(streamed)) == 3 and free[0] != free[1]


def test_bias_and_further_fields(served):
    ids = {letter: TOKENIZER(letter)["input_ids"][0] for letter in "abcdefgh"}
    with served.client() as client:
        only = ask(client, "Hello", logit_bias={str(ids["c"]): 100}, max_tokens=5)
        assert only.choices[0].message.content == "ccccc"
        text = ask(
            client,
            [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}],
            max_completion_tokens=5,
            max_tokens=None,
            presence_penalty=0,
            tools=[],
            user="me",
            extra_body={"top_k": 1, "min_p": 0.5},
            temperature=1.0,
        )
        assert (
            text.choices[0].message.content
            == ask(client, "Hello", max_tokens=5).choices[0].message.content
        )


def logprobs_of(answer):
    return [
        (
            token.token,
            token.logprob,
            [(other.token, other.logprob, bytes(other.bytes)) for other in token.top_logprobs],
        )
        for token in answer.choices[0].logprobs.content
    ]


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_the_likeliest_tokens_are_those_of_the_model(served, temperature):
    """Against tokens that are forced one by one: whatever is sampled, each has the log-probability
    that it is listed with.
    """
    fields = {"temperature": temperature, "seed": 4, "max_tokens": 6, "logprobs": True}
    with served.client() as client:
        plain = ask(client, "Hello", **fields)
        answer = ask(client, "Hello", top_logprobs=20, **fields)
        chunks = ask(client, "Hello", top_logprobs=3, stream=True, **fields)
        streamed = [c for c in chunks if c.choices[0].logprobs]
        forced = {}
        for name, number in (*TOKENIZER.get_vocab().items(), ("", None)):
            if number in SAID:
                bias = {str(number): 100.0}
                one = ask(client, "Hello", logprobs=True, logit_bias=bias, max_tokens=1)
                text = one.choices[0].message.content
                forced[text or name] = one.choices[0].logprobs.content
    content, usual = logprobs_of(answer), logprobs_of(plain)
    assert [token[0] for token in content] == [token[0] for token in usual]
    np.testing.assert_allclose(*([one[1] for one in all_of] for all_of in (content, usual)), 1e-4)
    assert all(token[2] == [] for token in usual)
    for text, logprob, likeliest in content:
        # all that it can say, the likeliest first; and what it said is one of them
        assert len(likeliest) == len({name for name, _, _ in likeliest}) == len(SAID)
        weights = [weight for _, weight, _ in likeliest]
        assert weights == sorted(weights, reverse=True)
        assert all(spelling == name.encode() for name, _, spelling in likeliest)
        assert (text, logprob) in [(name, weight) for name, weight, _ in likeliest]
        assert temperature or (text, logprob) == likeliest[0][:2]
    first = {name: weight for name, weight, _ in content[0][2]}
    assert first.keys() == forced.keys()
    for name, (token,) in ((name, tokens) for name, tokens in forced.items() if tokens):
        np.testing.assert_allclose(token.logprob, first[name], atol=1e-4)
    pieces = [token for chunk in streamed for token in logprobs_of(chunk)]
    for (_, _, few), (_, _, all_of) in zip(pieces, content, strict=True):
        assert [name for name, _, _ in few] == [name for name, _, _ in all_of[:3]]
        np.testing.assert_allclose([one[1] for one in few], [one[1] for one in all_of[:3]], 1e-4)


def byte_fallback():
    """Words, and a token for every byte of what is no word, as SentencePiece has them."""
    words = {"<unk>": 0, "\u2581a": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(words, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("\u2581", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
    )
    return ChatTokenizer(chat_tokenizer(backend, TEMPLATE))


def test_the_page_on_performance_counts_the_programs_of_a_server():
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    model = PUBLISHED["Qwen/Qwen2.5-7B-Instruct"]
    for page_size, words in ((128, "pages"), (0, "slots, 8,192 positions")):
        args = command.ServeArgs(model="qwen", page_size=page_size)
        sizes = sizes_of(args, model, CHAT)
        count = len(list(turn_shapes(sizes))) + len(row_programs(sizes))
        assert f"| `serve` in {words} | {count} |" in page


@pytest.mark.parametrize("chat", [CHAT, byte_fallback()], ids=["byte-level", "byte fallback"])
def test_the_bytes_of_tokens_are_those_of_the_text(chat):
    """Also of characters that are several tokens, whose texts are all the same mark."""
    text = "\u00e9\U0001f642\ufffd\n\u6771"
    ids = [chat.encode_reply(character)[:-1] for character in text]
    assert [len(some) for some in ids] == [len(character.encode()) for character in text]
    ids = [number for some in ids for number in some]
    tokens = tuple(
        _token(
            chat,
            ids[max(index - 1, 0) : index],
            number,
            -1.0,
            ((number, -1.0), (ids[index - 1], -2.0), (chat.stop_ids[0], -3.0)),
        )
        for index, number in enumerate(ids)
    )
    asked = read_chat(json.dumps(GOOD | {"logprobs": True, "top_logprobs": 3}).encode())
    answer = Answers("1", "tiny", 1, asked).whole([Choice(text, "stop", len(ids) + 1, tokens)])
    content = answer["choices"][0]["logprobs"]["content"]
    spelled = [bytes(token["bytes"]) for token in content]
    assert b"".join(spelled) == text.encode()
    for index, token in enumerate(content):
        same, other, end = token.pop("top_logprobs")
        assert same == token
        assert bytes(other["bytes"]) == spelled[index - 1]
        assert end["token"] and bytes(end["bytes"]) == end["token"].encode()


def test_a_conversation_with_another_turn_starts_from_what_is_cached(served):
    sampler = served.models["tiny"].sampler
    said = [{"role": "system", "content": "Play."}, {"role": "user", "content": "A new game!"}]
    with served.client() as client:
        fields = {"model": "tiny", "temperature": 0, "max_tokens": 8}
        answer = client.chat.completions.create(messages=said, **fields)
        known = answer.usage.total_tokens
        before = sampler.stats
        reply = {"role": "assistant", "content": answer.choices[0].message.content}
        more = [*said, reply, {"role": "user", "content": "On."}]
        following = client.chat.completions.create(messages=more, **fields)
    # all but the token that was sampled last, which nothing has been computed from
    assert sampler.stats.reused_tokens - before.reused_tokens >= known - 1
    computed = sampler.stats.prefilled_tokens - before.prefilled_tokens
    assert computed <= following.usage.prompt_tokens - known + 1


GOOD = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}


@pytest.mark.parametrize(
    ("change", "status", "param", "words"),
    [
        (b"{", 400, None, "not JSON"),
        (b"[" * 50_000, 400, None, "nested too deeply"),
        (b'{"temperature": NaN}', 400, None, "NaN is no number"),
        (b"[]", 400, None, "no object"),
        (b"\xff\xfe", 400, None, "not JSON"),
        ({"\ud800": 1}, 400, "?", "is not known here"),
        (
            {"messages": [{"role": "user", "content": "x", "\ud800": 1}]},
            400,
            "messages[0].?",
            "messages[0].? is not known here",
        ),
        ({"model": None}, 400, "model", "is missing"),
        ({"model": 3}, 400, "model", "must be a text"),
        ({"model": "gpt-4"}, 404, "model", "use one of tiny, tuned"),
        ({"messages": []}, 400, "messages", "at least one"),
        ({"messages": ["x"]}, 400, "messages[0]", "must be an object"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages[0].role", "one of"),
        ({"messages": [{"role": "user"}]}, 400, "messages[0].content", "is missing"),
        (
            {"messages": [{"role": "user", "content": "x", "name": "me"}]},
            400,
            "messages[0].name",
            "is not supported",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "messages[0].content[0].type",
            "must be text",
        ),
        ({"messages": [{"role": "user", "content": "x" * 500}]}, 400, "messages", "room for 192"),
        ({"temperature": -1}, 400, "temperature", "must be"),
        ({"temperature": "hot"}, 400, "temperature", "must be"),
        ({"temperature": True}, 400, "temperature", "must be"),
        ({"top_p": 0}, 400, "top_p", "must be"),
        ({"top_k": 9}, 400, "top_k", "8 likeliest"),
        ({"max_tokens": 0}, 400, "max_tokens", "must be"),
        ({"max_tokens": 2**70}, 400, "max_tokens", "must be"),
        ({"max_completion_tokens": 2}, 400, "max_tokens", "differs"),
        ({"n": 0}, 400, "n", "must be"),
        ({"n": 129}, 400, "n", "must be"),
        ({"stop": [""]}, 400, "stop", "0 characters"),
        ({"stop": [3]}, 400, "stop[0]", "must be a text"),
        ({"logit_bias": {"a": 1}}, 400, "logit_bias", "ids of tokens"),
        ({"logit_bias": {"1": 101}}, 400, "logit_bias.1", "must be"),
        ({"logit_bias": {"9999": 1}}, 400, "logit_bias", "names the token 9999"),
        ({"stream_options": {"include_usage": True}}, 400, "stream_options", "stream = true"),
        ({"stream": 1}, 400, "stream", "true or false"),
        ({"tools": [{"type": "function"}]}, 400, "tools", "not supported"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format", "not supported"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty", "not supported"),
        ({"top_logprobs": 5}, 400, "top_logprobs", "logprobs = true"),
        ({"logprobs": False, "top_logprobs": 1}, 400, "top_logprobs", "logprobs = true"),
        ({"logprobs": True, "top_logprobs": 21}, 400, "top_logprobs", "from 0 to 20"),
        ({"logprobs": True, "top_logprobs": -1}, 400, "top_logprobs", "from 0 to 20"),
        ({"tempratur": 1}, 400, "tempratur", "not known"),
        (b" " * 200_000, 413, None, "more than 100000 bytes"),
    ],
)
def test_what_cannot_be_answered_is_refused_by_name(served, change, status, param, words):
    fields = change if isinstance(change, bytes) else GOOD | change
    got, _, body = served.send(fields)
    error = json.loads(body)["error"]
    assert (got, error["param"]) == (status, param)
    assert error["type"] == "invalid_request_error"
    assert words in error["message"] and len(error["message"]) < 400
    served.settled()


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@settings(max_examples=100, deadline=None)
@given(
    fields=st.dictionaries(st.sampled_from(sorted({*_READ, *_IDLE, *_REFUSED, "other"})), _JSON),
    message=st.dictionaries(st.sampled_from(["role", "content", "tool_calls"]), _JSON),
    bias=st.dictionaries(st.sampled_from(["1", "x", "-1", "²", "9" * 99]), _JSON),
)
def test_any_body_is_read_or_refused(fields, message, bias):
    refusals = []
    messages = [*GOOD["messages"], {"role": "user", "content": "x"} | message]
    for body in (fields, GOOD | fields, GOOD | {"messages": messages}, GOOD | {"logit_bias": bias}):
        try:
            asked = read_chat(json.dumps(body).encode())
        except ApiError as error:
            refusals.append(error)
        else:
            assert all(isinstance(said.content, str) for said in asked.messages)
            assert 1 <= asked.num_choices <= 128 and 0 <= asked.temperature <= 100
    assert all(error.status == 400 and len(str(error)) < 400 for error in refusals)


def test_the_deepest_bodies_are_read_or_refused():
    for depth in range(100, 1200, 10):
        for name in ("stop", "tools", "messages", "temperature"):
            with pytest.raises(ApiError):
                read_chat(b'{"%s": %s0%s}' % (name.encode(), b"[" * depth, b"]" * depth))


def test_paths_methods_hosts_and_kinds_of_content(served):
    assert served.send(None, path="/health", method="GET")[0] == 200
    for status, words, call in (
        (404, "there are POST /v1/chat/completions, ", {"path": "/v1/nothing"}),
        (404, "use one of tiny", {"path": "/v1/models/other", "method": "GET"}),
        (405, "Method Not Allowed", {"method": "GET"}),
        (415, "application/json", {"content_type": "text/plain"}),
        (403, "address", {"host": "evil.example:80"}),
        (403, "address", {"host": "evil.example", "path": "/health", "method": "GET"}),
    ):
        got, _, body = served.send(GOOD, **call)
        assert (got, words in json.loads(body)["error"]["message"]) == (status, True)


@pytest.mark.parametrize("key", ["", "wrong", "s3cret\u00e9"])
def test_whoever_has_no_key_is_told_nothing(models, key):
    with running({"tiny": models["tiny"]}, key="s3cret") as server:
        assert server.send(None, path="/health", method="GET")[0] == 200
        headers = {"authorization": f"Bearer {key}".encode("latin-1")} if key else {}
        for path, method in (("/v1/models", "GET"), ("/v1/chat/completions", "POST")):
            status, more, body = server.send(b"x", path=path, method=method, **headers)
            assert (status, more["WWW-Authenticate".lower()]) == (401, "Bearer")
            assert json.loads(body)["error"]["code"] == "invalid_api_key"
        with server.client(api_key="s3cret") as client:
            assert [model.id for model in client.models.list()] == ["tiny"]


def said(text):
    return {"messages": [{"role": "user", "content": text}]}


async def hangs_up(port, fields):
    """A client that reads the first line of an answer at most."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(raw_request(fields))
    if fields["stream"]:
        assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
    writer.transport.abort()


def raw_request(fields):
    body = json.dumps(fields).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}"
    return f"{head}\r\nContent-Type: application/json\r\n\r\n".encode() + body


@pytest.fixture(scope="module")
def served_in_pages():
    """With room for one conversation of full length."""
    sizes = {"max_len": 80, "attended_buckets": (80,), "page_size": 4, "num_pages": 20}
    with opened(**sizes) as found, running(found) as server:
        yield server


@pytest.mark.parametrize("server", ["served", "served_in_pages"])
def test_two_hundred_at_once_of_whom_some_hang_up(server, request):
    """Nothing is lost, and nothing stays."""
    served = request.getfixturevalue(server)
    texts = [f"{number} {'x' * (number % 9)}" for number in range(200)]

    async def one(client, number):
        model = "tuned" if number % 5 == 1 else "tiny"
        fields = {"max_tokens": 3 + number % 4, "temperature": 1.0, "seed": number}
        if number % 3 == 0 or number % 7 == 0:
            more = {"stream": number % 3 == 0, "n": 2, "model": "tiny"}
            await hangs_up(served.port, said(texts[number]) | fields | more)
            return None
        return (await ask(client, texts[number], model, **fields)).choices[0].message.content

    async def everyone():
        async with served.client(openai.AsyncOpenAI) as client:
            return await asyncio.gather(*(one(client, number) for number in range(200)))

    replies = asyncio.run(everyone())
    served.settled()
    heard = {number: text for number, text in enumerate(replies) if text is not None}
    assert len(heard) == sum(number % 3 != 0 and number % 7 != 0 for number in range(200))
    with served.client() as client:  # alone they hear the same
        for number in [number for number in heard if number % 20 in (1, 2)]:
            fields = {"max_tokens": 3 + number % 4, "temperature": 1.0, "seed": number}
            again = ask(client, texts[number], "tuned" if number % 5 == 1 else "tiny", **fields)
            assert again.choices[0].message.content == heard[number]
    if server == "served_in_pages":
        assert served.models["tiny"].sampler.stats.evictions > 0
        for model in served.models.values():
            check_pools(model.sampler)
            assert model.sampler.stats.held_tokens == model.sampler.stats.held_bytes == 0


class Stuck:
    """A sampler that finishes nothing, or fails."""

    def __init__(self, error=None):
        self.conversations, self.error, self._number = set(), error, 0
        self.asked = threading.Semaphore(0)

    def open(self, ids):
        self._number += 1
        self.conversations.add(self._number)
        return self._number

    def fork(self, conversation):
        return self.open(())

    def generate(self, conversation, request):
        if request.top_p < 0.5:
            raise ValueError("such requests are refused")
        self.asked.release()

    def close(self, conversation):
        self.conversations.remove(conversation)

    def step(self):
        if self.error is not None:
            raise self.error
        return []

    @property
    def num_open(self):
        return len(self.conversations)

    @property
    def idle(self):
        return self.error is None or not self.conversations


@contextlib.contextmanager
def stuck(error=None, **settings):
    served = Served(sampler=Stuck(error), chat=CHAT, max_len=99, max_top_k=1, max_top_logprobs=1)
    with running({"tiny": served}, **{"max_replies": 2} | settings) as server:
        yield server, served.sampler


@contextlib.contextmanager
def connection(server, **changes):
    """A client that has sent a request and reads nothing yet."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as opened:
        opened.sendall(raw_request(GOOD | changes))
        yield opened


@pytest.mark.parametrize("changes", [{}, {"stream": True}, {"n": 2}])
def test_a_client_that_hangs_up_takes_its_conversation_along(changes):
    with stuck() as (server, sampler):
        with connection(server, **changes):
            assert sampler.asked.acquire(timeout=WAIT_S)
        server.settled()


def test_a_full_server_asks_to_come_back():
    with stuck(grace_s=0.0) as (server, sampler), connection(server), connection(server):
        assert sampler.asked.acquire(timeout=WAIT_S) and sampler.asked.acquire(timeout=WAIT_S)
        status, headers, body = server.send(GOOD)
        assert (status, headers["retry-after"]) == (429, "1")
        assert json.loads(body)["error"]["type"] == "rate_limit_error"
        with server.client() as client, pytest.raises(openai.RateLimitError):
            ask(client, "x")
        assert server.send(None, path="/health", method="GET")[0] == 200


def test_more_choices_than_there_is_room_for():
    with stuck(grace_s=0.0) as (server, sampler):
        assert server.send(GOOD | {"n": 3})[0] == 400
        with connection(server):
            assert sampler.asked.acquire(timeout=WAIT_S)
            assert server.send(GOOD | {"n": 2})[0] == 429


def test_what_the_sampler_refuses_costs_nobody_else_a_reply():
    with stuck(grace_s=0.0) as (server, sampler), connection(server):
        assert sampler.asked.acquire(timeout=WAIT_S)
        status, _, body = server.send(GOOD | {"top_p": 0.1})
        assert status == 400 and "such requests are refused" in body.decode()
        events = server.send(GOOD | {"top_p": 0.1, "stream": True})[2]
        assert events.endswith(b"}\n\n") and b"[DONE]" not in events
        assert (sampler.num_open, server.thread.error) == (1, None)


@pytest.mark.parametrize("stream", [False, True])
def test_replies_that_do_not_end_in_time_are_cut(stream):
    with stuck(grace_s=0.0) as (server, sampler), connection(server, stream=stream) as client:
        assert sampler.asked.acquire(timeout=WAIT_S)
        server.server.should_exit = True
        received = b""
        while more := client.recv(4096):
            received += more
        assert b"shutting down" in received
        assert received.startswith(b"HTTP/1.1 200" if stream else b"HTTP/1.1 503")
        server.runner.join(WAIT_S)
        assert not server.runner.is_alive()
    assert not sampler.num_open


def test_a_client_that_never_ends_to_ask_does_not_keep_the_server(monkeypatch, caplog):
    monkeypatch.setattr("experiments.serve._CLOSING_S", 0)
    with (
        stuck(grace_s=0.0) as (server, _),
        socket.create_connection(("127.0.0.1", server.port), timeout=WAIT_S) as client,
    ):
        client.sendall(raw_request(GOOD)[:-1])
        until_s = time.monotonic() + WAIT_S
        while not server.api.num_replies:
            assert time.monotonic() < until_s
            threading.Event().wait(0.01)
        server.server.should_exit = True
        server.runner.join(WAIT_S)
        assert not server.runner.is_alive()
    assert [record.getMessage() for record in caplog.records if record.name != "asyncio"] == []


def test_who_comes_after_the_cut_is_told_too():
    with stuck() as (server, sampler):
        server.thread.cut("it is late")
        status, _, body = server.send(GOOD)
        assert (status, b"it is late" in body, sampler.num_open) == (503, True, 0)


def test_a_sampler_that_fails_ends_the_server():
    with stuck(MemoryError("no room")) as (server, _):
        status, _, body = server.send(GOOD)
        assert (status, json.loads(body)["error"]["type"]) == (500, "server_error")
        assert "no room" not in body.decode()
        server.runner.join(WAIT_S)
        assert not server.runner.is_alive()
        assert isinstance(server.thread.error, MemoryError)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--adapter", "tuned"], ["--adapter takes pairs", "'tuned'"]),
        (["--adapter", "a=x", "a=y"], ["--adapter a=y", "name of another"]),
        (["--adapter", "actor=x"], ["--adapter actor=x", "name of another"]),
        (["--host", "203.0.113.7", "--port", "0"], ["--host 203.0.113.7", "cannot be listened at"]),
        (["--host", "x" * 70, "--port", "0"], ["--host xxx", "cannot be listened at"]),
    ],
)
def test_flags_that_cannot_act_are_refused(flags, words, capsys):
    model = str(ROOT / "experiments/pocket/checkpoints/fake/actor")
    refused(capsys, command.main, ["--model", model, *flags], *words)


def test_the_key_is_one_that_can_be_sent(capsys, monkeypatch):
    monkeypatch.setenv("ICTJAX_API_KEY", "my key")
    model = str(ROOT / "experiments/pocket/checkpoints/fake/actor")
    sentence = refused(capsys, command.main, ["--model", model], "ICTJAX_API_KEY")
    assert "my key" not in sentence


def test_adapters_of_one_base_answer_by_their_names(tmp_path):
    folder = FOLDER / "actor"
    shape, lora = read_config(folder), LoraConfig(rank=2, targets=("v", "o", "down"))
    base, chat = read_weights(folder, shape), ChatTokenizer(folder)
    sizes = dataclasses.replace(SIZES, max_len=64, attended_buckets=(64,), extend_steps=8)
    direct, limits = {}, ReplyLimits(max_tokens=8, temperature=0.0)
    for seed, name in enumerate(("one", "other")):
        rng = np.random.default_rng(seed)
        adapter = jax.tree.map(
            lambda leaf, rng=rng: rng.normal(0, 3, leaf.shape).astype(leaf.dtype),
            init_adapter(shape, lora, jax.random.key(0)),
        )
        save_adapter(tmp_path / name, shape, lora, adapter, base=str(folder))
        tuned, unused = with_adapter(lora, base, adapter), chat.unused(shape.vocab_size)
        with Sampler(shape, tuned, sizes, chat.pad_id, unused=unused) as sampler:
            (direct[name],) = said_by(ModelSpeaker(sampler, chat), "play", limits=limits)
    assert direct["one"].ids != direct["other"].ids
    adapters = [f"{name}={tmp_path / name}" for name in direct]
    args = command.ServeArgs(model=str(folder), name="actor", num_conversations=1, max_len=64)
    with (
        _open_models(
            args, command.read_adapters(adapters, args.name), Console(quiet=True)
        ) as models,
        running(models) as server,
        server.client() as client,
    ):
        for name, reply in direct.items():
            answer = ask(client, "play", name, max_tokens=8)
            assert answer.choices[0].message.content == reply.text
            assert answer.usage.completion_tokens == len(reply.ids)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_replies_end(tmp_path, number):
    """The program itself, from its first line to its exit code."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment[command.KEY_VARIABLE] = "s3cret"
    model = "experiments/pocket/checkpoints/fake/actor"
    shape, lora = read_config(ROOT / model), LoraConfig(rank=1)
    save_adapter(tmp_path, shape, lora, init_adapter(shape, lora, jax.random.key(0)), base=model)
    words = ["--model", model, "--port", "0", "--num-conversations", "1", "--max-len", "64"]
    words += ["--page-size", "16", "--grace-s", f"{WAIT_S:g}"]  # it compiles what replies need
    words += ["--adapter", f"tuned={tmp_path}"]
    words += ["--weights", "int8", "--cache", "int8", "--guessed-tokens", "2"]
    with subprocess.Popen(
        [sys.executable, "-m", "experiments", "serve", *words],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as program:
        line = program.stdout.readline()
        expected = "Serving actor, tuned at http://127.0.0.1:"
        assert line.startswith(expected), line + program.stderr.read()
        url = line.split()[-1]
        with (
            openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as stranger,
            pytest.raises(openai.AuthenticationError),
        ):
            stranger.models.list()
        with openai.OpenAI(base_url=url, api_key="s3cret", max_retries=0) as client:
            stream = ask(client, "play", "tuned", stream=True, logit_bias={"0": 100})
            chunks = [next(stream)]
            program.send_signal(number)
            chunks += list(stream)
        assert chunks[-1].choices[0].finish_reason == "length"
        assert program.wait(WAIT_S) == 128 + number
        assert program.stderr.read().strip().startswith(f"ictjax: stopped by {number.name}")
