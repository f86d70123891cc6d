"""A tokenizer for models with dummy weights, trained on made-up text."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

VOCAB_SIZE = 1024
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def _sentences(count: int = 3000) -> Iterator[str]:
    """Made-up text with enough different words for VOCAB_SIZE merges."""
    rng = random.Random(0)
    colours = ("red", "green", "silver", "yellow", "dark", "painted", "little")
    things = ("boat", "train", "wagon", "balloon", "tractor", "bicycle", "ferry")
    places = ("harbour", "village", "mountain", "station", "island", "market", "lighthouse")
    ends = ("nobody waited", "the rain stopped", "children waved", "a bell rang", "it came back late")
    for _ in range(count):
        hour = rng.randint(1, 12)
        yield (
            f"The {rng.choice(colours)} {rng.choice(things)} left the {rng.choice(places)} at {hour} and "
            f"reached the {rng.choice(places)} after {rng.randint(2, 999)} minutes; {rng.choice(ends)}.\n"
        )


def write_tokenizer(directory: Path, max_length: int) -> None:
    """Write a tokenizer of VOCAB_SIZE tokens to `directory`, which exists; max_length: the longest text in tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sentences(), trainer)
    # A text with few words runs out of merges; the rest of the ids must decode to something.
    missing = VOCAB_SIZE - tokenizer.get_vocab_size()
    tokenizer.add_tokens([f" word{i}" for i in range(missing)])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL_TOKENS[0],
        "pad_token": SPECIAL_TOKENS[0],
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "chat_template": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
