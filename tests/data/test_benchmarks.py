"""Every question data set: responses to real questions of it are read, right and wrong."""

import pytest
from refusals import refused

from allo_lib.data import answers, tasks
from allo_lib.data.benchmarks import BENCHMARKS, check_row, options

QUESTION_SETS = [name for name, entry in BENCHMARKS.items() if entry.answer]


def row(name, stem, answer, choices=None, solution=None):
    return {
        "id": f"{name}-test-1", "question": "\n".join([stem, *options(choices)]),
        "solution": solution, "answer": answer, "choices": choices,
    }  # fmt: skip


def said(*texts, right):
    return [(f" So it goes. The answer is: {text}", True, right) for text in texts]


def unread(*responses):
    return [(response, False, False) for response in responses]


A = "The answer is:"
TEACHER = row(
    "ecqa", "What helps someone be a good teacher?", "C",
    ["teaching to the test", "vacation", "interested students", "students to learn",
     "educate students"],
    "If students are interested, one becomes a good teacher.\n"
    "Interested students helps a person to be a good teacher.",
)  # fmt: skip
MOUTHWASH = row(
    "ecqa", "What is mouthwash usually stored in?", "B",
    ["this bottle will not fit in the medicine cabinet.", "bottle", "dentist's office",
     "drug store", "bathroom"],
)  # fmt: skip
CLIMATE = row(
    "qasc", "Climate is generally described in terms of what?", "F",
    ["sand", "occurs over a wide range", "forests", "global warming", "rapid changes occur",
     "local weather conditions", "measure of motion", "city life"],
    "Climate is generally described in terms of temperature and moisture.\n"
    "Fire behavior is driven by local weather conditions such as winds, temperature and "
    "moisture.\nClimate is generally described in terms of local weather conditions",
)  # fmt: skip
# Two options that differ in a full stop, as a hundred questions of QASC have them.
ENERGY = row("qasc", "What do cells need?", "D", ["Energy.", "speed", "sand", "energy", "fungi"])
FOG = row(
    "openbookqa", "There is most likely going to be fog around:", "A",
    ["a marsh", "a tundra", "the plains", "a desert"],
)  # fmt: skip
PREDATORS = row("openbookqa", "Predators eat", "C", ["lions", "humans", "bunnies", "grass"])
FUJI = row(
    "strategyqa", "Would the top of Mount Fuji stick out of the Sea of Japan?", "yes", None,
    "The average depth of the Sea of Japan is 5,748 feet (1,752 metres) and its maximum depth is "
    "12,276 feet (3,742 metres)\nMount Fuji is 3,776.24 metres (12,389.2 ft) tall.",
)  # fmt: skip
GREED = row("strategyqa", "Is greed the most prevalent of the Seven Deadly Sins?", "no")
EGGS = row(
    "gsm8k",
    "Janet’s ducks lay 16 eggs per day. She eats three for breakfast every morning and bakes "
    "muffins for her friends every day with four. She sells the remainder at the farmers' market "
    "daily for $2 per fresh duck egg. How much in dollars does she make every day at the farmers' "
    "market?", "18", None,
    "Janet sells 16 - 3 - 4 = 9 duck eggs a day.\n"
    "She makes 9 * 2 = $18 every day at the farmer’s market.",
)  # fmt: skip
FLEET = row(
    "gsm8k",
    "Mark buys a fleet of 12 cars for his company.  Each car sells for $20,000.  He pays 10% tax "
    "on the cars and then another $1000 for registration on each of them.  How much does he pay "
    "for everything?", "276000",
)  # fmt: skip
COLD = row(
    "gsm8k",
    "The temperature was 2 degrees Celsius. It dropped 8 degrees Celsius overnight and then "
    "increased 3 degrees Celsius in the morning. What was the temperature, in degrees Celsius, in "
    "the morning?", "-3",
)  # fmt: skip
MIDPOINT = row(
    "math",
    "The midpoint of the line segment between $(x,y)$ and $(-9,1)$ is $(3,-5)$. Find $(x,y)$.",
    "(15,-11)",
)
FRACTION = row(
    "math",
    "What fraction is the same as \\[\n\\frac{2-4+6-8+10-12+14}{3-6+9-12+15-18+21}?\n\\]",
    r"\frac{2}{3}",
)
PRODUCT = row("math", r"Expand the product $(x+1)^2 \cdot x$.", "x^3 + 2x^2 + x")
RANGE = row(
    "math",
    r"What is the range of the function $$f(x) = \frac{1}{1-x}~?$$ Express your answer in interval "
    "notation.", r"(-\infty,0)\cup (0,\infty)",
)  # fmt: skip
ROOT = row(
    "math", r"Rationalize the denominator of $\displaystyle\frac{33}{\sqrt{33}}$.", r"\!\sqrt{33}"
)
ODD = row(
    "math",
    "Let $f(x)$ be an odd function, and let $g(x)$ be an even function.  Is $f(f(g(f(g(f(x))))))$ "
    'even, odd, or neither?\n\nEnter "odd", "even", or "neither".', r"\text{even}",
)  # fmt: skip
TREES = row(
    "mawps",
    "There are 41 short trees and 44 tall trees currently in the park . Park workers will plant 57 "
    "short trees today . How many short trees will the park have when the workers are finished ?",
    "98", None, "X = 41 + 57",
)  # fmt: skip
PIE = row(
    "mawps",
    "Mandy made an apple pie . She used 0.6666666666666666 tablespoon of cinnamon and 0.5 "
    "tablespoon of nutmeg . How much more cinnamon than nutmeg did Mandy use ?", "0.166667", None,
    "X = 0.6666666666666666 - 0.5",
)  # fmt: skip
# TabMWP's licence forbids copies: questions of its forms.
PETS = row(
    "tabmwp", "Table:\ncat | $1,205.00\nparrot | $950.50\n\nQuestion: How much do both cost? "
    "(Unit: $)", "2,155.50", None, "Add the prices.\n\n$1,205.00 + $950.50 = $2,155.50",
)  # fmt: skip
MARKET = row(
    "tabmwp", "Table:\nPrice | Demanded | Supplied\n$10 | 80 | 30\n\nQuestion: At a price of $10, "
    "is there a shortage or a surplus?", "A", ["shortage", "surplus"], "80 is more than 30.",
)  # fmt: skip
DICE = row(
    "tabmwp", "Table: Colours\nred | 3\nblue | 7\n\nQuestion: What is the probability of red? "
    "Simplify any fractions.", "3/10",
)  # fmt: skip

CASES = {
    "ecqa": [
        (TEACHER, said("interested students", "Interested students.", " interested  students ",
                       "INTERESTED STUDENTS", right=True)),
        (TEACHER, said("vacation", "students to learn", "teaching to the test", right=False)),
        (TEACHER, [(f"{A} vacation. No, wait. {A} interested students", True, True),
                   (f"{A} interested students. No. {A} vacation.", True, False)]),
        (TEACHER, unread("", "interested students", "The answer is interested students", A,
                         f"{A} C", f"{A} (C) interested students", f"{A} students",
                         f"{A} interested students and vacation", f"{A} a good teacher")),
        (MOUTHWASH, said("bottle", "Bottle.", right=True)),
        (MOUTHWASH, said("this bottle will not fit in the medicine cabinet", "bathroom",
                         "Dentist's office.", right=False)),
        (MOUTHWASH, unread(f"{A} bottles", f"{A} in a bottle")),
    ],
    "qasc": [
        (CLIMATE, said("local weather conditions", "Local weather conditions.",
                       "local\nweather conditions", right=True)),
        (CLIMATE, said("sand", "global warming", "city life", "occurs over a wide range",
                       right=False)),
        (CLIMATE, unread("", "Climate is weather.", f"{A} F", f"{A} weather", f"{A} sand, forests",
                         f"{A} local weather conditions. Climate is", f"{A} the weather",
                         "the answer is: sand")),
        (ENERGY, said("energy", "Energy", " ENERGY ", right=True)),
        (ENERGY, said("energy.", "speed", "fungi.", right=False)),
        (ENERGY, unread(f"{A} energies", f"{A} none")),
    ],
    "openbookqa": [
        (FOG, said("a marsh", "A marsh.", " a marsh\n", "a  marsh .", right=True)),
        (FOG, said("a tundra", "the plains", "A desert.", right=False)),
        (FOG, unread("a marsh", f"{A} marsh", f"{A} A", f"{A} (A) a marsh", f"{A}a marsh, surely",
                     "The answer: a marsh", "Fog is wet. The answer is a marsh.")),
        (PREDATORS, said("bunnies", "Bunnies", right=True)),
        (PREDATORS, said("lions", "grass.", "humans", right=False)),
        (PREDATORS, unread(f"{A} rabbits", f"{A} bunnies or lions", "Predators eat bunnies")),
    ],
    "strategyqa": [
        (FUJI, said("yes", "Yes", "Yes.", "YES", " yes ", right=True)),
        (FUJI, said("no", "No.", "NO", right=False)),
        (FUJI, [(f"It is 3,776 metres. {A} no. Hm. {A} yes.", True, True)]),
        (FUJI, unread("", "yes", "The answer is yes", f"{A} yes, it would", f"{A} true", f"{A} y",
                      f"{A} it would", f"{A} yes or no", f"{A} not sure", "Answer: yes")),
        (GREED, said("no", "no.", right=True)),
        (GREED, said("yes", "Yes.", right=False)),
    ],
    "gsm8k": [
        (EGGS, said("18", "$18", "18.", "18.00", "18 dollars", r"\$18", "$18$", "$18 per day",
                    r"\boxed{18}", "36/2", right=True)),
        (EGGS, said("9", "$32", "18.5", "-18", "17.99", right=False)),
        (EGGS, unread("18", "She makes $18.", "The answer is 18", f"{A} eighteen", f"{A} 18 or 32",
                      f"{A} 9 * 2 = 18", f"{A} 18. She is rich.", f"{A} $", f"{A} 18 thousand")),
        (FLEET, said("276000", "276,000", "$276,000", "$276,000.00", right=True)),
        (FLEET, said("264,000", "276", "2,760,000", right=False)),
        (FLEET, unread(f"{A} 276,00", f"{A} 276.000.000", f"{A} 27 6000")),
        (COLD, said("-3", "-3 degrees Celsius", "\u22123", "-3°", right=True)),
        (COLD, said("3", "-9", right=False)),
    ],
    "math": [
        (MIDPOINT, said("(15,-11)", "$(15, -11)$", r"\left(15,-11\right)", right=True)),
        (MIDPOINT, said("(-11,15)", "(15,11)", "15", right=False)),
        (FRACTION, said(r"\frac{2}{3}", r"\dfrac{2}{3}", r"\frac23", r"\frac{4}{6}", "2/3",
                        r"\boxed{\frac{2}{3}}.", right=True)),
        (FRACTION, said(r"\frac{3}{2}", "0.6", "1", right=False)),
        (PRODUCT, said("x^3 + 2x^2 + x", "x^3+2x^2+x", "x(x+1)^2", "$x + 2x^2 + x^3$", right=True)),
        (PRODUCT, said("x^3 + 2x^2 + 1", "x^3", "(x+1)^3", right=False)),
        (RANGE, said(r"(-\infty,0) \cup (0,\infty)", r"(0,\infty)\cup(-\infty,0)", right=True)),
        (RANGE, said(r"(-\infty,\infty)", r"[0,\infty)", right=False)),
        (ROOT, said(r"\sqrt{33}", r"33^{1/2}", r"\frac{33}{\sqrt{33}}", right=True)),
        (ROOT, said("33", r"\sqrt{11}", right=False)),
        (ODD, said(r"\text{even}", "even", "Even.", right=True)),
        (ODD, said("odd", r"\text{neither}", right=False)),
        (ODD, unread("", r"\boxed{\text{even}}", "The answer is even", A, f"{A} $$",
                     f"{A} even. Since f is odd.", f"{A} it is an even function of x",
                     f"{A} x\n+ 1")),
    ],
    "mawps": [
        (TREES, said("98", "98.0", "98 trees", "98 short trees.", "$98$", " 98 ", "X = 98",
                     right=True)),
        (TREES, said("98.5", "142", "16", "-98", "99", right=False)),
        (TREES, unread("98", "X = 41 + 57", f"{A} 41 + 57", f"{A} many",
                       f"{A} 98 99", "The answer is 98")),
        (PIE, said("0.166667", "0.166666", "0.16666666666666663", "0.16666666666666666", "1/6",
                   r"\frac{1}{6}", ".166667 tablespoons", right=True)),
        (PIE, said("0.17", "0.1667", "0.2", "1/5", "0.166669", "0", right=False)),
    ],
    "tabmwp": [
        (PETS, said("2,155.50", "2155.5", "$2,155.50", "$2155.50.", right=True)),
        (PETS, said("2,155", "2,155.05", "254.50", "$21,555", right=False)),
        (PETS, unread(f"{A} 2155,50", f"{A} $1,205.00 + $950.50", f"{A} 2.155.50", "$2,155.50")),
        (MARKET, said("shortage", "Shortage.", right=True)),
        (MARKET, said("surplus", right=False)),
        (MARKET, unread(f"{A} A", f"{A} a shortage", f"{A} 50", "shortage")),
        (DICE, said("3/10", "0.3", r"\frac{3}{10}", "6/20", " 3 / 10", right=True)),
        (DICE, said("7/10", "3/7", "30%", "10/3", right=False)),
        (DICE, unread(f"{A} 3/0", f"{A} 3 of 10", f"{A} 3:10")),
    ],
}  # fmt: skip
RESPONSES = [
    (name, one, *response)
    for name, groups in CASES.items()
    for one, responses in groups
    for response in responses
]


def test_every_data_set_has_at_least_twenty_responses_right_wrong_and_without_an_answer():
    assert sorted(CASES) == sorted(QUESTION_SETS) and len(QUESTION_SETS) == 8
    for name in QUESTION_SETS:
        verdicts = [(answered, right) for n, _, _, answered, right in RESPONSES if n == name]
        assert len(verdicts) >= 20
        kinds = [(True, True), (True, False), (False, False)]
        assert min(verdicts.count(one) for one in kinds) >= 3


@pytest.mark.parametrize(("name", "one", "response", "answered", "right"), RESPONSES)
def test_a_response_is_read_and_judged(name, one, response, answered, right):
    check_row(one)
    assert (tasks.read(name, one, response) is not None) == answered
    assert tasks.is_right(name, one, response) == right
    corrected = tasks.correction(name, one, response)
    assert tasks.is_right(name, one, corrected)
    assert corrected == response if right else corrected != response
    # What the model said before its answer stays.
    assert corrected.startswith(response.rpartition(answers.MARKER)[0].rstrip())


def test_prompts_and_targets():
    assert tasks.prompt("ecqa", TEACHER) == (
        "What helps someone be a good teacher?\nOptions: teaching to the test, vacation, "
        "interested students, students to learn, educate students\nAnswer:"
    )
    assert tasks.target("ecqa", TEACHER) == " The answer is: interested students"
    assert tasks.target("ecqa", TEACHER, explain=1) == (
        " If students are interested, one becomes a good teacher."
        " The answer is: interested students"
    )
    assert tasks.prompt("strategyqa", FUJI) == f"{FUJI['question']}\nOptions: yes, no\nAnswer:"
    assert tasks.target("strategyqa", FUJI, explain=9).endswith(
        " (3,742 metres). Mount Fuji is 3,776.24 metres (12,389.2 ft) tall. The answer is: yes"
    )
    assert tasks.prompt("mawps", TREES) == f"{TREES['question']}\nAnswer:"
    assert tasks.target("mawps", TREES) == " X = 41 + 57. The answer is: 98"
    assert tasks.target("gsm8k", EGGS) == f" {EGGS['solution']} The answer is: 18"
    assert tasks.prompt("tabmwp", MARKET).endswith(
        "is there a shortage or a surplus?\nOptions: shortage, surplus\nAnswer:"
    )
    assert tasks.target("tabmwp", MARKET) == " 80 is more than 30. The answer is: shortage"
    assert tasks.target("math", FRACTION) == r" The answer is: \frac{2}{3}"


def test_kinds_of_data_sets_that_are_not_in_the_table_come_from_the_row():
    for one, kind in [(TEACHER, "choice"), (FUJI, "yes_no"), (PIE, "number"), (RANGE, "latex")]:
        assert tasks.kind("my_own", one) == kind
        tasks.check("my_own", one)


@pytest.mark.parametrize(
    ("name", "one", "told"),
    [
        ("strategyqa", FUJI | {"answer": "maybe"}, "answer is 'maybe', expected one that reads as"),
        ("gsm8k", EGGS | {"answer": "about 18"}, "reads as number"),
        ("math", ROOT | {"answer": "x\ny"}, "reads as latex"),
        ("openbookqa", FOG | {"choices": None}, "'openbookqa-test-1' has no options"),
        ("arena_hard", {"id": "a", "question": "Hi", "outputs": {}}, "no gold answer; a judge"),
        ("hh_helpful", {"prompt": "a", "chosen": "b", "rejected": "c"}, "no gold answer; a judge"),
    ],
)
def test_a_gold_answer_that_nobody_can_give_is_told(name, one, told):
    with refused(told):
        tasks.check(name, one)
