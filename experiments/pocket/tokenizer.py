"""The pocket tokenizer: words of a closed vocabulary, in Hugging Face format, with a chat template
of one token per role.
"""

from collections import Counter
from collections.abc import Iterable

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, UNKNOWN, END = "<pad>", "<unk>", "<end>"
ROLES = ("<system>", "<user>", "<assistant>")
# Headings are single tokens, kept as they are written; everything else is lower-cased.
HEADINGS = ("Thought:", "Action:", "ANALYSIS:", "IMPROVED PROMPT:")

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}> {{ message.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def build_tokenizer(
    texts: Iterable[str], extra_words: Iterable[str] = (), *, min_count: int = 1
) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the words of `texts` that occur at least `min_count` times, and
    `extra_words`.

    Words are sorted by count and then by spelling, so the same texts give the same ids whatever
    their order.
    """
    splitter = _splitter()
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(word for word, _ in splitter.pre_tokenize_str(text.lower()))
    heads = [PAD, UNKNOWN, END, *ROLES, *HEADINGS]
    words = [
        word
        for word, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        if count >= min_count
    ]
    words += sorted(set(extra_words) - set(words))
    vocabulary = {word: index for index, word in enumerate([*heads, *words])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = splitter
    backend.add_special_tokens(
        [
            tokenizers.AddedToken(t, special=True, normalized=False)
            for t in (PAD, UNKNOWN, END, *ROLES)
        ]
    )
    backend.add_tokens(
        [tokenizers.AddedToken(heading, normalized=False, special=False) for heading in HEADINGS]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, unk_token=UNKNOWN, eos_token=END
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _splitter():
    return pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
