"""The word problems of evals/small_math: the answers are right, the sets are what they say."""

import json
import re
from collections import Counter

import pytest

from evals.small_math import generate, templates
from evals.small_math.generate import NEW_COMBINATION, NEW_NUMBERS, NEW_TEMPLATE, TRAIN

KINDS = (TRAIN, NEW_COMBINATION, NEW_NUMBERS, NEW_TEMPLATE)


def numbers_in(text: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", text)]


def check_answer(problem: generate.Problem) -> None:
    """Evaluates the annotated steps from the text alone."""
    *steps, last = problem.answer.split("\n")
    known = Counter(numbers_in(problem.question))
    results = []
    for step in steps:
        (annotation,) = re.findall(r"<<(.*?)>>", step)
        expression, stated = annotation.split("=")
        x, sign, y = re.fullmatch(r"(\d+)([-+*/])(\d+)", expression).groups()
        value = {"+": int(x) + int(y), "-": int(x) - int(y), "*": int(x) * int(y)}.get(sign)
        if sign == "/":
            assert int(x) % int(y) == 0, problem
            value = int(x) // int(y)
        assert value == int(stated) and 1 <= value <= templates.LIMIT, problem
        assert f"{x} {sign} {y} = <<{annotation}>>{stated}" in step, problem
        for operand in (int(x), int(y)):  # "twice" and "half" bring a 2 that the question does not give
            assert operand in known or operand in results or operand == 2, problem
        results.append(value)
    assert last == f"#### {results[-1]}", problem
    assert 1 <= len(steps) <= 4


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_is_right(kind):
    made = generate.take(3, kind, 1500)
    for problem in made:
        check_answer(problem)
        assert not re.search(r"[{}\[\]|]", problem.question + problem.answer), problem
        assert problem.question.endswith("?")
        assert "  " not in problem.question + problem.answer
    pool = templates.HELD_OUT if kind == NEW_TEMPLATE else templates.TRAIN
    used = {problem.template for problem in made}
    if kind != NEW_NUMBERS:  # a few templates take small numbers only
        assert used == set(range(len(pool)))
    else:
        assert len(used) >= 50


def test_enough_templates_of_every_length():
    assert len(templates.TRAIN) >= 60
    assert len(set(templates.TRAIN + templates.HELD_OUT)) == len(templates.TRAIN) + len(templates.HELD_OUT)
    for pool in (generate.TRAIN_TEMPLATES, generate.HELD_OUT_TEMPLATES):
        assert {template.num_steps for template in pool} == {1, 2, 3, 4}


def test_no_word_twice_and_every_given_number_is_needed():
    for parts in templates.TRAIN + templates.HELD_OUT:
        slots = set(re.findall(r"\{([a-e]):", parts[0]))
        steps = " ".join(parts[1:])
        operands = set(re.findall(r"[\[+*/-]([a-e])(?=[-+*/=])", steps))
        assert slots == operands, parts
    for problem in generate.take(0, TRAIN, 500):
        names = [word for word in re.findall(r"\w+", problem.question) if word in templates.WORDS["name"]]
        assert len(set(names)) <= 3


def test_same_seed_same_problems():
    for kind in KINDS:
        first = generate.take(5, kind, 300)
        assert first == generate.take(5, kind, 300)
        assert first[:100] == generate.take(5, kind, 100)
        assert first != generate.take(6, kind, 300)


def test_sets_are_disjoint():
    train = generate.take(0, TRAIN, 6000)
    test = generate.test_set(0, 1000)
    others = generate.take(0, NEW_TEMPLATE, 600)
    for group in (train, test, others):
        assert len({problem.question for problem in group}) == len(group)
    given = {(problem.template, problem.numbers) for problem in train}
    assert not given & {(problem.template, problem.numbers) for problem in test}
    # whatever the seed of the training set
    assert not {(problem.template, problem.numbers) for problem in generate.take(9, TRAIN, 6000)} & {
        (problem.template, problem.numbers) for problem in test
    }
    kinds = Counter(problem.kind for problem in test)
    assert kinds == {NEW_COMBINATION: 500, NEW_NUMBERS: 500}
    trained = {number for problem in train for number in numbers_in(problem.question)}
    for problem in test:
        if problem.kind == NEW_NUMBERS:
            large = {number for number in problem.numbers if number > 10}
            assert large and not large & trained, problem
    # the words of a held-out question, numbers and fillings aside, are in no training question
    assert not set(templates.TRAIN) & set(templates.HELD_OUT)


def test_files(tmp_path):
    arguments = ["--out", str(tmp_path / "a"), "--train", "700", "--test", "101", "--new-templates", "50"]
    assert generate.main(arguments) == 0
    assert generate.main([*arguments[:1], str(tmp_path / "b"), *arguments[2:]]) == 0
    sizes = {"train": 700, "test": 101, "test_new_templates": 50}
    for name, size in sizes.items():
        text = (tmp_path / "a" / f"{name}.jsonl").read_text()
        assert text == (tmp_path / "b" / f"{name}.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        assert len(rows) == size
        assert all(row.keys() == {"question", "answer"} for row in rows)
    info = json.loads((tmp_path / "a" / "info.json").read_text())
    assert info["sizes"] == sizes
    assert [len(info["test"]), len(info["test_new_templates"])] == [101, 50]
    assert Counter(entry["kind"] for entry in info["test"]) == {NEW_COMBINATION: 51, NEW_NUMBERS: 50}


def test_bad_arguments(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for arguments, expected in (
        (["--out", str(tmp_path), "--test", "0"], "take whole numbers from 1 on"),
        (["--out", str(tmp_path / "file")], "cannot be written"),
    ):
        with pytest.raises(SystemExit) as stopped:
            generate.main(arguments)
        assert stopped.value.code == 2
        assert expected in capsys.readouterr().err


def test_a_kind_that_runs_out_says_so(monkeypatch):
    small = generate.Template(0, ("There are {a:3-4} birds and {b:3-4} cats. How many animals?", "It is [a+b=t]."))
    monkeypatch.setattr(generate, "HELD_OUT_TEMPLATES", (small,))
    assert len(generate.take(0, NEW_TEMPLATE, 4)) == 4
    with pytest.raises(ValueError, match="only about 4 different problems of the kind 'new template', not 5"):
        generate.take(0, NEW_TEMPLATE, 5)


@pytest.mark.parametrize(
    "parts", [("No numbers?", "It is [2*2=t]."), ("{a:1-2} birds?",), ("{a:1-2} birds?", "It is {a}.")]
)
def test_a_bad_template_is_refused(parts):
    with pytest.raises(ValueError, match="template 7"):
        generate.Template(7, parts)
