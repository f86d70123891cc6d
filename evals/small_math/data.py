"""Rows of training text, and of test prompts, as token ids."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evals.small_math import generate, tokenizer
from evals.small_math.generate import Problem

# Worked examples before a question, as lm-eval's gsm8k gives.
SHOTS = 5
# One training problem in so many has one of its words spelt, as words that are not in the vocabulary are.
_SPELT = 10
_SEPARATOR = "\n\n"


@dataclass(frozen=True)
class Rows:
    """inputs, targets [rows, length], int16. answers: where the target belongs to an answer. used: where there is one.

    The target after an answer is EOS, whatever follows, so that the model ends there.
    """

    inputs: np.ndarray
    targets: np.ndarray
    answers: np.ndarray
    used: np.ndarray


class _Row:
    """Problems one after the other. Lists of the same length: id, target, whether the target belongs to an answer."""

    def __init__(self, encoder: tokenizer.Encoder):
        self._encode = encoder
        self.ids: list[int] = []
        self.targets: list[int] = []
        self.answers: list[bool] = []

    def add(self, problem: Problem, spelt: Sequence[str] = ()) -> None:
        question = self._encode(tokenizer.prompt(problem.question), spelt)
        answer = self._encode(f" {problem.answer}", spelt)
        separator = self._encode(_SEPARATOR)
        if self.ids:
            self.targets[-1] = question[0]
        self.ids += [*question, *answer, *separator]
        self.targets += [*question[1:], *answer, tokenizer.EOS_ID, *separator[1:], tokenizer.EOS_ID]
        self.answers += [False] * (len(question) - 1) + [True] * (len(answer) + 1) + [False] * len(separator)


def _pack(rows: Sequence[_Row], length: int) -> Rows:
    shape = (len(rows), length)
    inputs, targets = np.zeros(shape, np.int16), np.zeros(shape, np.int16)
    answers, used = np.zeros(shape, bool), np.zeros(shape, bool)
    for index, row in enumerate(rows):
        count = min(length, len(row.ids))
        inputs[index, :count] = row.ids[:count]
        targets[index, :count] = row.targets[:count]
        answers[index, :count] = row.answers[:count]
        used[index, :count] = True
    return Rows(inputs, targets, answers, used)


def training_rows(seed: int, step: int, rows: int, length: int) -> Rows:
    """The batch of a step: each row starts with a problem and is full. The same arguments give the same batch."""
    encoder, rng = tokenizer.Encoder(), random.Random(f"{seed} {step}")
    made = []
    for _ in range(rows):
        row = _Row(encoder)
        while len(row.ids) < length:
            problem = rng.choice(generate.TRAIN_TEMPLATES).make(rng, generate.TRAIN)
            spelt = rng.choice(encoder.words_of(problem.question)) if rng.randrange(_SPELT) == 0 else None
            row.add(problem, [spelt] if spelt else [])
        made.append(row)
    return _pack(made, length)


def prompt_rows(problems: Sequence[Problem], length: int, shots: int = SHOTS, seed: int = 0) -> Rows:
    """A row for each: `shots` training problems and this one, of which alone `answers` tells. Raises ValueError."""
    encoder, rng = tokenizer.Encoder(), random.Random(f"{seed} shots")
    made = []
    for problem in problems:
        row = _Row(encoder)
        for _ in range(shots):
            row.add(rng.choice(generate.TRAIN_TEMPLATES).make(rng, generate.TRAIN))
        row.answers = [False] * len(row.ids)
        row.add(problem)
        if len(row.ids) > length:
            raise ValueError(f"length: a prompt has {len(row.ids)} tokens; got {length}")
        made.append(row)
    return _pack(made, length)
