"""The tokenizer: words of the training templates are tokens, digits are single ones, anything else is spelt in bytes.

A line break, "<<", ">>" and "####" are tokens too, and a word takes the space before it along, so that a prompt that
ends in "Answer:" is cut as the training text is.
"""

import functools
import json
import re
from collections.abc import Collection
from pathlib import Path

from evals.small_math import generate

EOS = "<|endoftext|>"
EOS_ID = 0
# Bytes follow EOS in the vocabulary, then words.
_FIRST_BYTE = 1
# Every text falls into these pieces, none left over. Read by Python's re and by the tokenizers library alike.
PIECES = r"[0-9]|\n\n|\n| ?<<|>>|####| ?[A-Za-z]+| ?[^A-Za-z0-9 \n]| "
# Training problems that are read to collect the words: each word comes some thirty times.
_SAMPLE = 6000

# Chat is what the model knows: a question, and then its answer.
_CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}\n\n"
    "{% else %}Question: {{ m.content }}\nAnswer:{% endif %}{% endfor %}"
)


def prompt(question: str) -> str:
    """As lm-eval's gsm8k writes it; the answer follows after a space, and a blank line before the next question."""
    return f"Question: {question}\nAnswer:"


@functools.cache
def words() -> tuple[str, ...]:
    """Pieces of the training text that are longer than a byte, sorted."""
    found: set[str] = {"\n\n"}
    for problem in generate.take(0, generate.TRAIN, _SAMPLE):
        found.update(re.findall(PIECES, f"{prompt(problem.question)} {problem.answer}"))
    return tuple(sorted(piece for piece in found if len(piece.encode()) > 1))


def vocabulary_size() -> int:
    return _FIRST_BYTE + 256 + len(words())


class Encoder:
    """Token ids as the tokenizer of write() gives them, without its library."""

    def __init__(self) -> None:
        self._pieces = re.compile(PIECES)
        self._words = {word: _FIRST_BYTE + 256 + index for index, word in enumerate(words())}

    def __call__(self, text: str, spelt: Collection[str] = ()) -> list[int]:
        """spelt: pieces that are to be treated as unknown words are."""
        ids: list[int] = []
        for piece in self._pieces.findall(text):
            known = self._words.get(piece)
            if known is not None and piece not in spelt:
                ids.append(known)
            else:
                ids.extend(_FIRST_BYTE + byte for byte in piece.encode())
        return ids

    def words_of(self, text: str) -> list[str]:
        """The pieces of `text` that are words of letters and have a token."""
        return [piece for piece in self._pieces.findall(text) if piece in self._words and piece[-1].isalpha()]


def _letters() -> list[str]:
    """Byte -> the character that stands for it in tokenizer.json, as in GPT-2."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def write(directory: Path, max_length: int) -> None:
    """tokenizer.json and tokenizer_config.json in `directory`, which exists; max_length: the longest text in tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    letters = _letters()
    vocabulary = {EOS: EOS_ID}
    for entry in (*(bytes([byte]) for byte in range(256)), *(word.encode() for word in words())):
        vocabulary["".join(letters[byte] for byte in entry)] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(EOS, special=True, normalized=False)])
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "pad_token": EOS,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "chat_template": _CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
