import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ictjax.chat import ChatTokenizer
from ictjax.records import Message
from tests.tiny import QWEN_TEMPLATE, byte_tokenizer, save_tiny_model, word_tokenizer

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="<|>"), min_size=1, max_size=12)
BYTES = byte_tokenizer()


def whole(tokenizer, messages):
    plain = [{"role": m.role, "content": m.content} for m in messages]
    text = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


@settings(max_examples=40, deadline=None)
@given(system=TEXT, turns=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4), last=TEXT)
def test_start_and_turns_equal_the_template_of_the_whole_conversation(system, turns, last):
    chat = ChatTokenizer(BYTES)
    stop = BYTES.convert_tokens_to_ids("<|im_end|>")
    messages = [Message(role="system", content=system), Message(role="user", content=turns[0][0])]
    grown = chat.encode_start(messages)
    questions = [question for question, _ in turns[1:]] + [last]
    for (_, reply), question in zip(turns, questions, strict=True):
        sampled = (*BYTES(reply)["input_ids"], stop)
        following = Message(role="user", content=question)
        grown += sampled + chat.encode_turn(following, stopped=True)
        messages += [Message(role="assistant", content=reply), following]
    assert grown == whole(BYTES, messages)


def test_a_reply_that_was_cut_off_is_closed_by_the_next_turn():
    chat = ChatTokenizer(BYTES)
    stop = BYTES.convert_tokens_to_ids("<|im_end|>")
    message = Message(role="user", content="and now?")
    assert chat.encode_turn(message, stopped=False) == (stop, *chat.encode_turn(message, stopped=True))
    assert BYTES.decode(chat.encode_turn(message, stopped=True)) == "\n<|im_start|>user\nand now?<|im_end|>\n<|im_start|>assistant\n"


def test_sampled_ids_are_kept_even_where_tokenising_their_text_gives_others():
    """ "ab" has a token of its own, but a model may sample "a" then "b": nothing re-tokenises what it sampled."""
    tokenizer = word_tokenizer(["a", "b", "question"])
    chat = ChatTokenizer(tokenizer)
    ids = tokenizer.convert_tokens_to_ids(["a", "b"])
    assert chat.decode([*ids, tokenizer.eos_token_id]) == "a b"


def test_stop_ids_come_from_the_generation_config_the_tokenizer_and_the_template(tmp_path):
    BYTES.save_pretrained(tmp_path)
    end_of_text, end = BYTES.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert ChatTokenizer(tmp_path).stop_ids == (end,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, end_of_text]}))
    chat = ChatTokenizer(tmp_path)
    assert chat.stop_ids == tuple(sorted((end, end_of_text)))
    assert chat.pad_id == end_of_text
    assert chat.vocab_size == len(BYTES)


def test_the_pocket_style_template_of_one_token_per_role_is_extended_exactly():
    template = (
        "{% for m in messages %}<|im_start|> {{ m.role }} {{ m.content }} <|im_end|> {% endfor %}"
        "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
    )
    tokenizer = word_tokenizer(["system", "user", "assistant", "x", "y", "z"], template)
    chat = ChatTokenizer(tokenizer)
    messages = [Message(role="system", content="x"), Message(role="user", content="y")]
    reply = [*tokenizer.convert_tokens_to_ids(["z", "z"]), tokenizer.eos_token_id]
    question = Message(role="user", content="x y")
    grown = (*chat.encode_start(messages), *reply, *chat.encode_turn(question, stopped=True))
    assert grown == whole(tokenizer, [*messages, Message(role="assistant", content="z z"), question])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages %}{% if m.role != 'assistant' %}<|im_start|>{{ m.content }}<|im_end|>{% endif %}{% endfor %}",
            "cannot be extended",
        ),
        ("{% for m in messages %}<|im_start|>{{ m.content }} {{ messages|length }}<|im_end|>{% endfor %}", "cannot be extended"),
        (QWEN_TEMPLATE.replace("+ '<|im_end|>' +", "+"), "no stop token"),
        ("{{ raise_exception('no system messages here') }}", "no system messages here"),
        (None, "no chat template"),
    ],
)
def test_unusable_templates_are_refused(template, message):
    with pytest.raises(ValueError, match=message):
        ChatTokenizer(byte_tokenizer(template))


def test_the_tokenizer_file_is_obeyed_beside_a_qwen_config(tmp_path):
    save_tiny_model(tmp_path)
    chat = ChatTokenizer(tmp_path)
    start = chat.encode_start([Message(role="system", content="play"), Message(role="user", content="walk look open")])
    assert " walk look open " in f" {chat.decode(start)} "


def test_a_folder_without_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match="tokenizer_config.json is missing"):
        ChatTokenizer(tmp_path)
