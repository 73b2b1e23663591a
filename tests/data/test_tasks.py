"""Questions of a domain: no question in two splits, prompts, targets, verdicts and corrections."""

import json

import pytest
from refusals import refused

from allo_lib.data import answers, miniature, tasks
from allo_lib.data.benchmarks import BENCHMARKS, check_row, options
from allo_lib.profiles import config
from allo_lib.profiles.config import Supervised

FAMILIES = miniature.FAMILIES
SIZES = {"gsm8k": 6000, "math": 6000, "mawps": 1144, "tabmwp": 1000}
A = "The answer is:"


def domain(names=tuple(SIZES), kind="questions", sft=0, pairs=0, dev=0, explain=0, **phase):
    return config.Domain(
        kind=kind, datasets=names, sft=Supervised(examples=sft, **phase), explain=explain,
        pairs=config.Pairs(questions=pairs), dev=dev,
    )  # fmt: skip


def real(name, explain=0):
    return tasks.RealQuestions(domain((name,), explain=explain), 0)


def row(stem, answer, choices=None, solution=None):
    return {"id": "q-1", "question": "\n".join([stem, *options(choices)]), "solution": solution,
            "answer": answer, "choices": choices}  # fmt: skip


# --- one real question ---------------------------------------------------------------------------

TEACHER = row(
    "What helps someone be a good teacher?", "C",
    ["teaching to the test", "vacation", "interested students", "students to learn"],
    "If students are interested, one becomes a good teacher\n\nThey help a person to be one.",
)  # fmt: skip
# Two options that differ in a full stop, as a hundred questions of QASC have them.
ENERGY = row("What do cells need?", "D", ["Energy.", "speed", "sand", "energy", "fungi"])
FOG = row("There is most likely going to be fog around:", "A", ["a marsh", "a tundra", "plains"])
FUJI = row("Would the top of Mount Fuji stick out of the Sea of Japan?", "yes", None,
           "The Sea is 3,742 metres deep.\nMount Fuji is 3,776.24 metres tall.")  # fmt: skip
EGGS = row("How much in dollars does she make every day at the farmers' market?", "18", None,
           "Janet sells 16 - 3 - 4 = 9 duck eggs a day.\nShe makes 9 * 2 = $18.")  # fmt: skip
MIDPOINT = row("The midpoint between $(x,y)$ and $(-9,1)$ is $(3,-5)$. Find $(x,y)$.", "(15,-11)")
PRODUCT = row(r"Expand the product $(x+1)^2 \cdot x$.", "x^3 + 2x^2 + x")
ODD = row('Enter "odd", "even", or "neither".', r"\text{even}")
TREES = row("How many short trees will the park have ?", "98", None, "X = 41 + 57")
PIE = row("How much more cinnamon than nutmeg did Mandy use ?", "0.166667")
# TabMWP's licence forbids copies: questions of its forms.
PETS = row("Table:\ncat | $1,205.00\nparrot | $950.50\n\nQuestion: How much are both? (Unit: $)",
           "2,155.50", None, "Add the prices.\n\n$1,205.00 + $950.50 = $2,155.50")  # fmt: skip
MARKET = row("Table:\nPrice | Demanded | Supplied\n$10 | 80 | 30\n\nQuestion: Is there a shortage?",
             "A", ["shortage", "surplus"], "80 is more than 30.")  # fmt: skip

# Data set, question, answers that are right, that are wrong, and responses without an answer.
CASES = [
    ("ecqa", TEACHER,
     ["interested students", "Interested students.", " interested  students ", "**Interested "
      "students**", f"vacation. No, wait. {A} interested students"],
     ["vacation", "teaching to the test", f"interested students. No. {A} vacation."],
     ["", "interested students", "The answer is interested students", A, f"{A} C", f"{A} students",
      f"{A} (C) interested students", f"{A} interested students and vacation",
      f"{A} interested students. Good night."]),
    ("qasc", ENERGY, ["energy", "Energy", " ENERGY "], ["energy.", "speed", "fungi."],
     [f"{A} energies", f"{A} none", "the answer is: sand"]),
    ("openbookqa", FOG, ["a marsh", "A marsh.", " a marsh\n", "a  marsh ."], ["a tundra", "Plains"],
     ["a marsh", f"{A} marsh", f"{A} A", f"{A}a marsh, surely", "The answer: a marsh"]),
    ("strategyqa", FUJI, ["yes", "Yes.", "YES", "**Yes.**", f"no. Hm. {A} yes."], ["no", "NO."],
     ["yes", "The answer is yes", f"{A} yes, it would", f"{A} true", f"{A} y", f"{A} yes or no"]),
    ("gsm8k", EGGS, ["18", "$18", "18.00", "18 dollars", r"\$18", "$18$", r"\boxed{18}", "36/2"],
     ["9", "$32", "18.5", "-18", "17.99"],
     ["18", "She makes $18.", "The answer is 18", f"{A} eighteen", f"{A} 18 or 32",
      f"{A} 9 * 2 = 18", f"{A} 18. She is rich.", f"{A} $", f"{A} 18 thousand"]),
    ("math", MIDPOINT, ["(15,-11)", "$(15, -11)$", r"\left(15,-11\right)"], ["(-11,15)", "15"], []),
    ("math", PRODUCT, ["x^3+2x^2+x", "x(x+1)^2", "$x + 2x^2 + x^3$"], ["x^3", "(x+1)^3"], []),
    ("math", ODD, [r"\text{even}", "even", "Even."], ["odd", r"\text{neither}"],
     [r"\boxed{\text{even}}", A, f"{A} $$", f"{A} even. Since f is odd.", f"{A} x\n+ 1",
      f"{A} it is an even function of x"]),
    ("mawps", TREES, ["98", "98.0", "98 short trees.", "X = 98"], ["98.5", "142", "-98"],
     ["98", "X = 41 + 57", f"{A} 41 + 57", f"{A} many", f"{A} 98 99"]),
    ("tabmwp", PETS, ["2,155.50", "2155.5", "$2155.50."], ["2,155", "254.50", "$21,555"],
     [f"{A} 2155,50", f"{A} $1,205.00 + $950.50", f"{A} 2.155.50"]),
    ("tabmwp", MARKET, ["shortage", "Shortage."], ["surplus"], [f"{A} A", f"{A} a shortage"]),
]  # fmt: skip


def test_every_question_set_has_its_cases():
    assert {case[0] for case in CASES} == {n for n, one in BENCHMARKS.items() if one.answer}
    assert len(BENCHMARKS) == 11


@pytest.mark.parametrize(("name", "one", "right", "wrong", "unread"), CASES)
def test_responses_are_read_strictly_judged_and_corrected(name, one, right, wrong, unread):
    check_row(one)
    task = real(name)
    question = task.question(name, one)
    for verdict, responses in ((True, right), (False, wrong), (None, unread)):
        for text in responses:
            response = text if verdict is None else f" So it goes. {A} {text}"
            assert task.answered(question, response) == (verdict is not None), response
            assert task.right(question, response) == bool(verdict), response
            corrected = task.correction(question, response)
            assert task.right(question, corrected)
            assert (corrected == response) == bool(verdict)
            # What the model said before its answer stays.
            assert corrected.startswith(response.rpartition(answers.MARKER)[0].rstrip())


def test_prompts_and_targets():
    first = " If students are interested, one becomes a good teacher."
    both = f"{first} They help a person to be one."
    for explain, before in ((0, ""), (1, first), (9, both)):
        question = real("ecqa", explain).question("ecqa", TEACHER)
        assert question.solution == f"{before} The answer is: interested students"
    assert question.prompt == (
        "What helps someone be a good teacher?\nOptions: teaching to the test, vacation, "
        "interested students, students to learn\nAnswer:"
    )
    for name, one, prompt, target in [
        ("strategyqa", FUJI, f"{FUJI['question']}\nOptions: yes, no\nAnswer:", f" {A} yes"),
        ("mawps", TREES, f"{TREES['question']}\nAnswer:", f" X = 41 + 57. {A} 98"),
        ("gsm8k", EGGS, f"{EGGS['question']}\nAnswer:", f" {EGGS['solution']} {A} 18"),
        ("gsm8k", EGGS | {"solution": " "}, f"{EGGS['question']}\nAnswer:", f" {A} 18"),
        ("tabmwp", MARKET, MARKET["question"].split("\n(")[0] + "\nOptions: shortage, surplus\n"
         "Answer:", f" 80 is more than 30. {A} shortage"),
    ]:  # fmt: skip
        question = real(name).question(name, one)
        assert (question.prompt, question.solution) == (prompt, target)


def test_kinds_of_data_sets_that_are_not_in_the_table_come_from_the_row():
    for one, kind in [(TEACHER, "choice"), (FUJI, "yes_no"), (PIE, "number"), (MIDPOINT, "latex")]:
        assert tasks.kind("my_own", one) == kind
        assert real("my_own").question("my_own", one)


@pytest.mark.parametrize(
    ("name", "one", "told"),
    [
        ("strategyqa", FUJI | {"answer": "maybe"}, "answer is 'maybe', expected one that reads as"),
        ("gsm8k", EGGS | {"answer": "about 18"}, "reads as number"),
        ("math", ODD | {"answer": "x\ny"}, "reads as latex"),
        ("openbookqa", FOG | {"choices": None}, "reads as choice"),
        ("arena_hard", {"id": "a", "question": "Hi", "outputs": {}}, "no gold answers (a judge"),
    ],
)
def test_a_gold_answer_that_nobody_can_give_is_told(name, one, told):
    with refused(told):
        real(name).question(name, one)


# --- generated questions -------------------------------------------------------------------------


@pytest.mark.parametrize("split", miniature.SPLITS)
def test_generated_questions_are_equally_many_of_each_family(split):
    mini = tasks.Miniature(domain(FAMILIES, "miniature"), 0)
    questions = mini.questions(split, 30)
    assert [q.dataset for q in questions[:6]] == [*FAMILIES, *FAMILIES]
    assert len({q.prompt for q in questions}) == 30
    assert questions == tasks.Miniature(domain(FAMILIES, "miniature"), 0).questions(split, 30)
    assert questions != tasks.Miniature(domain(FAMILIES, "miniature"), 1).questions(split, 30)
    mixed = [q.dataset for q in mini.questions(split, 40, (0.5, 0.25, 0.25))]
    assert [mixed[:20].count(family) for family in FAMILIES] == [10, 5, 5]


def test_demonstrations_are_those_of_a_phase():
    task, plain = tasks.Miniature(domain(FAMILIES, "miniature"), 0), Supervised(plain_wording=True)
    for question in task.questions("sft", 30):
        habit = task.demonstration(question, Supervised(error_scale=1.0))
        for text in (question.solution, task.demonstration(question, plain),
                     task.correction(question, habit)):  # fmt: skip
            assert task.answered(question, text) and task.right(question, text)
            assert not any(task.wrong_tokens(question, text))
        assert task.right(question, habit) or any(task.wrong_tokens(question, habit))


# --- how many rows -------------------------------------------------------------------------------


def test_splits_are_dealt_out_in_turn():
    found = tasks.plan({"dev": 500, "pairs": 2500, "sft": 4000}, SIZES, "train")
    assert found["dev"] == dict.fromkeys(SIZES, 125)
    assert found["pairs"] == dict.fromkeys(SIZES, 625)
    assert found["sft"] == {"gsm8k": 1678, "math": 1678, "mawps": 394, "tabmwp": 250}
    assert tasks.plan({"test": 10}, {"a": 2, "b": 20}, "test")["test"] == {"a": 2, "b": 8}
    room = {"a": 5, "b": 10, "c": 7}
    for count in range(23):
        found = tasks.plan({"test": count}, room, "test")["test"]
        assert sum(found.values()) == count and all(found[name] <= room[name] for name in room)
        # Water finds its level: who has rows to spare gives the most, but for rounding.
        spare = [found[name] for name in room if found[name] < room[name]]
        assert not spare or max(found.values()) <= min(spare) + 1


FEW = {"strategyqa": (8, "yes", None), "gsm8k": (40, "3", None),
       "openbookqa": (40, "B", ["this", "that"])}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    for name, (count, answer, choices) in FEW.items():
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            # The data sets use the same ids for different questions.
            rows = [row(f"Is it {split}{i} of {name}?", answer, choices) | {"id": f"{split}-{i}"}
                    for i in range(count)]  # fmt: skip
            lines = "\n".join(map(json.dumps, rows))
            (tmp_path / name / f"{split}.jsonl").write_text(lines)
    return tmp_path


@pytest.mark.parametrize("sft, pairs, dev", [(30, 12, 6), (31, 29, 28), (5, 7, 70), (35, 50, 3)])
def test_kinds_of_questions_are_mixed_and_no_question_is_in_two_splits(folder, sft, pairs, dev):
    settings = domain(tuple(FEW), sft=sft, pairs=pairs, dev=dev)
    task = tasks.RealQuestions(settings, 0, folder)
    counts = {"sft": sft, "pairs": pairs, "dev": dev, "test": 30}
    found = {split: task.questions(split, count) for split, count in counts.items()}
    for what in ("id", "prompt"):
        seen = [getattr(one, what) for part in found.values() for one in part]
        assert len(seen) == len(set(seen)) == sum(counts.values())
    assert {one.dataset for one in found["dev"]} == set(FEW)
    assert all(task.right(one, task.demonstration(one, settings.sft)) for one in found["sft"])
    other_seed = tasks.RealQuestions(settings, 1, folder)
    assert other_seed.questions("test", 30) == found["test"]
    assert other_seed.questions("pairs", pairs) != found["pairs"]


def test_a_question_that_was_asked_before_or_is_tested_is_not_trained_on(folder):
    """In other spaces, case or order of its options, also where another data set has it."""

    def put(name, file, *rows):
        lines = [json.dumps(one | {"id": f"{name}-{n}"}) for n, one in enumerate(rows)]
        (folder / name / f"{file}.jsonl").write_text("\n".join(lines))

    tested, twice = "Is  1.5 it?", "What is it ?"
    put("openbookqa", "test", row(tested, "A", ["this", "that"]))
    again = row("is 1.5 it", "B", ["That.", "this"]), row("What is it", "A", ["y", "x"])
    other = row(twice, "A", ["x", "y"]), row("Is 15 it?", "A", ["this", "that"])
    put("openbookqa", "train", again[0], *other, again[1])
    put("gsm8k", "train", row("How many?", "3"), row(twice, "2"))
    task = tasks.RealQuestions(domain(("openbookqa", "gsm8k"), sft=4), 0, folder)
    found = sorted(one.prompt.split("\n")[0] for one in task.questions("sft", 4))
    assert found == ["How many?", "Is 15 it?", twice, twice]
    with refused("openbookqa/train has 2 rows, gsm8k/train has 2 rows"):
        tasks.RealQuestions(domain(("openbookqa", "gsm8k"), sft=5), 0, folder).questions("sft", 5)


def test_what_real_data_sets_cannot_give_is_told(folder):
    task = tasks.RealQuestions(domain(tuple(FEW), sft=30, pairs=12, dev=6), 0, folder)
    with refused("strategyqa/pairs has 4 rows, gsm8k/pairs has 4 rows", "requests 99 of pairs"):
        task.questions("pairs", 99)
    with refused("strategyqa/train has 8 rows", "the profile requests 6 of dev, 300 of sft: lower"):
        tasks.RealQuestions(domain(tuple(FEW), sft=300, dev=6), 0, folder).questions("sft", 3)
    with refused("mix is of the miniature's families"):
        tasks.RealQuestions(domain(tuple(FEW), sft=30, mix=(0.5, 0.25, 0.25)), 0, folder)
