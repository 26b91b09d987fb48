"""The text of a reply as it grows, against the text of all its ids at once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.fake_pair import word_tokenizer
from ictjax.chat import ChatTokenizer
from ictjax.reply_text import ReplyText
from tests.tiny import byte_tokenizer

BYTES = ChatTokenizer(byte_tokenizer())
WORDS = ChatTokenizer(word_tokenizer("go to the north Observation:".split()))


def ids_of(chat, text):
    return list(chat._tokenizer(text)["input_ids"])


def pieces(ids, cuts):
    """The beginnings of the ids that end at the cuts, and all of them."""
    return [ids[:cut] for cut in sorted({cut % (len(ids) + 1) for cut in cuts} | {len(ids)})]


@settings(max_examples=200, deadline=None)
@given(
    chat=st.sampled_from([BYTES, WORDS]),
    text=st.text("abŽ東🙂 \n", max_size=30),
    words=st.lists(st.sampled_from(["go", "to", "the", "north", "Observation:"]), max_size=9),
    stop=st.lists(st.text("abŽ東🙂 \n", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 200), max_size=8),
)
def test_a_reply_reads_as_its_ids_at_once(chat, text, words, stop, cuts):
    stop = [*stop, "the north", "Obs"] if chat is WORDS else stop
    ids = ids_of(chat, text if chat is BYTES else " ".join(words))
    whole = chat.decode(ids)
    reply, before = ReplyText(chat.decode, stop), ""
    for piece in pieces(ids, cuts):
        kept = reply.read(piece)
        assert reply.shown.startswith(before)
        before = reply.shown
        now = chat.decode(piece)
        assert (kept is None) == (not any(end in now for end in stop)) == (not reply.stopped)
        if kept is not None:
            assert reply.shown == reply.text
            held = [chat.decode(ids[:number]) for number in range(len(ids) + 1)]
            fits = [number for number, part in enumerate(held) if reply.text.startswith(part)]
            assert kept == max(number for number in fits if number <= len(piece))
            break
        assert reply.text == now
    # whatever came at once: nothing of the first stop string to be complete was ever shown
    ends = [(whole.find(end) + len(end), whole.find(end)) for end in stop if end in whole]
    assert reply.text == whole[: min(ends)[1] if ends else None]


@pytest.mark.parametrize("cuts", [[4], [8], [1, 2, 3, 4, 5]])
def test_of_stop_strings_that_overlap_the_first_to_be_complete_ends_the_reply(cuts):
    """Also where one that begins before it comes in the same piece."""
    reply = ReplyText(BYTES.decode, ["k", "ok "])
    for piece in pieces(ids_of(BYTES, "look out"), cuts):
        if reply.read(piece) is not None:
            break
    assert (reply.text, reply.stopped) == ("loo", True)


def test_what_may_become_a_stop_string_is_held_back():
    reply = ReplyText(BYTES.decode, ["\nObservation:", "END"])
    shown = []
    ids = ids_of(BYTES, "look\nObserve EN\nObservation: a door")
    for number in range(1, len(ids) + 1):
        if reply.read(ids[:number]) is not None:
            break
        shown.append(reply.shown)
    assert set(shown) >= {"look", "look\nObserve", "look\nObserve "}
    assert not {"look\n", "look\nObserv", "look\nObserve E"} & set(shown)
    assert reply.text == "look\nObserve EN" and number == len("look\nObserve EN\nObservation:")


def test_half_a_character_waits_for_the_rest():
    reply = ReplyText(BYTES.decode)
    ids = ids_of(BYTES, "a🙂")
    for number, expected in ((1, "a"), (2, "a"), (4, "a"), (5, "a🙂")):
        assert reply.read(ids[:number]) is None
        assert reply.shown == expected
