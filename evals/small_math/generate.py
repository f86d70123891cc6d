"""Makes the problems: python -m evals.small_math.generate --out DIR

    train.jsonl               templates of TRAIN
    test.jsonl                the same templates, no problem of which is in train.jsonl whatever its seed and size:
                              one half new combinations of numbers; in the other half, no number from 11 on is one
                              that a training problem gives
    test_new_templates.jsonl  templates of HELD_OUT
    info.json                 seed, sizes, and of each test problem the template and the kind

One {"question": ..., "answer": ...} a line, the fields of gsm8k.
"""

import argparse
import itertools
import json
import random
import re
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from evals.small_math import templates

# Draws in which a template must give a problem that has not come yet.
_TRIES = 100
FIRST_NEW = 11
_NUMBER = re.compile(r"\{([a-e]):(\d+)-(\d+)\}")
_WORD = re.compile(r"\{([a-z]+)\d?\}")
_STEP = re.compile(r"\[(\w+)([-+*/])(\w+)=([a-z])\]")

# Kinds of problems.
TRAIN, NEW_COMBINATION, NEW_NUMBERS, NEW_TEMPLATE = "train", "new combination", "new numbers", "new template"


@dataclass(frozen=True)
class Problem:
    """numbers: the given ones, by slot. template: index in its list. kind: one of the constants above."""

    question: str
    answer: str
    numbers: tuple[int, ...]
    template: int
    kind: str


def is_new_number(number: int) -> bool:
    """Whether no training problem gives this number: one in seven from FIRST_NEW on, as small ones are times tables."""
    return number >= FIRST_NEW and number % 7 == 3


def is_test_combination(template: int, numbers: tuple[int, ...]) -> bool:
    """Whether these numbers in this template are kept for tests: one combination in ten, by a hash."""
    return zlib.crc32(repr((template, numbers)).encode()) % 10 == 0


class Template:
    """One line of templates.py, parsed. Raises ValueError where it is not as that file says."""

    def __init__(self, index: int, parts: tuple[str, ...]):
        self.index = index
        self._question, *self._steps = parts
        found = _NUMBER.findall(self._question)
        self._slots = [(name, int(low), int(high)) for name, low, high in found]
        if not self._steps or not self._slots:
            raise ValueError(f"template {index}: takes a question with numbers, and steps; got {parts}")
        text = " ".join(parts)
        words = dict.fromkeys(_WORD.findall(text))
        self._words = [word for word in words if word in templates.WORDS]
        # How many different words of a list: {name3} makes three.
        self._counts = {word: max(n for n in (1, 2, 3) if n == 1 or f"{{{word}{n}}}" in text) for word in self._words}
        self._formulas = [_STEP.search(step) for step in self._steps]
        if not all(self._formulas):
            raise ValueError(f"template {index}: every step needs a [x+y=z]; got {parts}")

    @property
    def takes_new_numbers(self) -> bool:
        """Whether a slot reaches numbers that no training problem has."""
        return any(any(map(is_new_number, range(low, high + 1))) for _, low, high in self._slots)

    @property
    def num_steps(self) -> int:
        return len(self._steps)

    def make(self, rng: random.Random, kind: str) -> Problem:
        """One problem whose numbers are those of `kind`."""
        while True:
            given = {name: rng.choice(self._range(low, high, kind)) for name, low, high in self._slots}
            numbers = tuple(given.values())
            if kind == NEW_NUMBERS and not any(map(is_new_number, numbers)):
                continue
            if kind in (TRAIN, NEW_COMBINATION) and is_test_combination(self.index, numbers) != (
                kind == NEW_COMBINATION
            ):
                continue
            if (values := self._solve(given)) is not None:
                return self._write(rng, kind, given, values)

    @staticmethod
    def _range(low: int, high: int, kind: str) -> list[int]:
        new = kind == NEW_NUMBERS
        return [n for n in range(low, high + 1) if is_new_number(n) == new or (new and n < FIRST_NEW)]

    def _solve(self, given: dict[str, int]) -> dict[str, int] | None:
        """All variables, or None where a step has no whole result from 1 to LIMIT."""
        values = dict(given)
        for formula in self._formulas:
            assert formula is not None
            left, sign, right, name = formula.groups()
            result = _apply(sign, _value(left, values), _value(right, values))
            if result is None or not 1 <= result <= templates.LIMIT:
                return None
            values[name] = result
        return values

    def _write(self, rng: random.Random, kind: str, given: dict[str, int], values: dict[str, int]) -> Problem:
        fills: dict[str, object] = dict(values)
        for word in self._words:
            chosen = rng.sample(templates.WORDS[word], self._counts[word])
            fills.update({word + (str(i) if i > 1 else ""): text for i, text in enumerate(chosen, 1)})

        def step(match: re.Match[str]) -> str:
            left, sign, right, name = match.groups()
            x, y = _value(left, values), _value(right, values)
            return f"{x} {sign} {y} = <<{x}{sign}{y}={values[name]}>>{values[name]}"

        question = _NUMBER.sub(lambda match: f"{{{match.group(1)}}}", self._question).format(**fills)
        lines = [_STEP.sub(step, text).format(**fills) for text in self._steps]
        last = self._formulas[-1]
        assert last is not None
        answer = "\n".join([*lines, f"#### {values[last.group(4)]}"])
        return Problem(question, answer, tuple(given.values()), self.index, kind)


def _value(operand: str, values: dict[str, int]) -> int:
    return int(operand) if operand.isdecimal() else values[operand]


def _apply(sign: str, x: int, y: int) -> int | None:
    if sign == "/":
        return x // y if y and x % y == 0 else None
    return x + y if sign == "+" else x - y if sign == "-" else x * y


TRAIN_TEMPLATES = tuple(Template(i, parts) for i, parts in enumerate(templates.TRAIN))
HELD_OUT_TEMPLATES = tuple(Template(i, parts) for i, parts in enumerate(templates.HELD_OUT))


def problems(seed: int, kind: str) -> Iterator[Problem]:
    """Problems of a kind, all different, over its templates in turn. The same seed gives the same ones.

    A template drops out when it has hardly a problem left that has not come yet; the last one ends it.
    """
    left = list(HELD_OUT_TEMPLATES if kind == NEW_TEMPLATE else TRAIN_TEMPLATES)
    if kind == NEW_NUMBERS:
        left = [template for template in left if template.takes_new_numbers]
    rng = random.Random(f"{seed} {kind}")
    seen: set[str] = set()
    while left:
        for template in rng.sample(left, len(left)):
            made = (template.make(rng, kind) for _ in range(_TRIES))
            problem = next((problem for problem in made if problem.question not in seen), None)
            if problem is None:
                left.remove(template)
                continue
            seen.add(problem.question)
            yield problem


def take(seed: int, kind: str, count: int) -> list[Problem]:
    """The first `count` of problems(seed, kind). Raises ValueError where there are fewer."""
    taken = list(itertools.islice(problems(seed, kind), count))
    if len(taken) < count:
        raise ValueError(f"there are only about {len(taken)} different problems of the kind {kind!r}, not {count}")
    return taken


def test_set(seed: int, count: int) -> list[Problem]:
    """Templates of TRAIN: half new combinations (the larger half), half new numbers, shuffled."""
    mixed = take(seed, NEW_COMBINATION, count - count // 2) + take(seed, NEW_NUMBERS, count // 2)
    random.Random(f"{seed} order").shuffle(mixed)
    return mixed


def write(folder: Path, seed: int, train: int, test: int, new_templates: int) -> None:
    """Write the four files, with so many problems each. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    sets = {
        "train": take(seed, TRAIN, train),
        "test": test_set(seed, test),
        "test_new_templates": take(seed, NEW_TEMPLATE, new_templates),
    }
    for name, content in sets.items():
        lines = (json.dumps({"question": problem.question, "answer": problem.answer}) + "\n" for problem in content)
        (folder / f"{name}.jsonl").write_text("".join(lines))
    info = {
        "seed": seed,
        "sizes": {name: len(content) for name, content in sets.items()},
        "templates": {"train": len(TRAIN_TEMPLATES), "held out": len(HELD_OUT_TEMPLATES)},
        **{
            name: [{"template": problem.template, "kind": problem.kind} for problem in sets[name]]
            for name in ("test", "test_new_templates")
        },
    }
    (folder / "info.json").write_text(json.dumps(info) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m evals.small_math.generate", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder, made where it is missing")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--train", type=int, default=20000, help="training problems; default: %(default)s")
    parser.add_argument("--test", type=int, default=1000, help="test problems of trained templates; %(default)s")
    parser.add_argument("--new-templates", type=int, default=1000, help="test problems of others; %(default)s")
    options = parser.parse_args(arguments)
    if min(options.train, options.test, options.new_templates) < 1:
        parser.error("--train, --test and --new-templates take whole numbers from 1 on")
    try:
        write(options.out, options.seed, options.train, options.test, options.new_templates)
    except ValueError as error:
        parser.error(f"{error}: ask for fewer")
    except OSError as error:
        parser.error(f"{options.out} cannot be written: {error.strerror}")
    print(f"{options.train} training and {options.test} + {options.new_templates} test problems in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
