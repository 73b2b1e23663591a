"""Reading final answers and comparing them: numbers, formulas, and any string at all."""

import threading
import time
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from allo_lib.data import answers
from allo_lib.data.answers import number

NUMBERS = {
    "18": 18, "-3": -3, "+3": 3, "1,234": 1234, "12,345,678": 12345678, "1234.0": 1234,
    "1,234.50": Fraction(2469, 2), ".5": Fraction(1, 2), "5.": 5, "$18": 18, "-$18": -18,
    "$-18": -18, "$ 5": 5, r"\$5": 5, "$18$": 18, r"\(18\)": 18, r"\boxed{18}": 18, "18.": 18,
    "3/10": Fraction(3, 10), "-3/4": Fraction(-3, 4), "1 1/2": Fraction(3, 2),
    "-1 1/2": Fraction(-3, 2), r"\frac{3}{4}": Fraction(3, 4), r"1\frac{1}{2}": Fraction(3, 2),
    r"\dfrac34": Fraction(3, 4), "50%": 50, "50 %": 50, r"50\%": 50, "18 dollars": 18,
    "$18 per day": 18, "18 m/s": 18, "90°": 90, r"30^\circ": 30, r"7\text{ hours}": 7,
    r"1,\!000": 1000, "\u22123": -3, "  7 ": 7,
    "**18**": 18, "**18.**": 18, "18**": 18, "** 18": 18, "**$18**.": 18,
    "x = 5": 5, "$x=-5$": -5, r"\boxed{x = 1/2}": Fraction(1, 2), "n = 3 apples": 3,
    "\u20ac5": 5, "-\u20ac5.50": Fraction(-11, 2), "5\u20ac": 5, "\u00a33": 3, "\u00a5100": 100,
    "1e3": 1000, "-2.5E-3": Fraction(-1, 400), "1e3 dollars": 1000,
    "7 m": 7, "3 g": 3, "20 C": 20, "15 points": 15, "12 quarters": 12,
    "5 m^2": 5, "5m^{2}": 5, r"5 \text{ cm}^2": 5, "1,200 ft^3": 1200,
}  # fmt: skip
NO_NUMBERS = [
    "", " ", "-", "$", "%", "1,23", "1,2345", "12,34,567", "1.2.3", "0x10", "3 4", "3 or 4",
    "3 and a half", "3 million", "2 dozen", "12 squared", "x", "3 + 4", "1/0", "0/0",
    "1/2/3", "--3", "-$-3", "3:00", "5th", "12 (twelve)", "18 is it", "٣", "½", "nan", "inf",
    "18 eggs left over today", "9" * 100, "1_000", "5 x^2", "3 y^2", "2**3", "**2** or **3**",
    "x = y", "x =", "1e", "e3", "1e999", "x = 1, 2", "8 divided by two", "8 doubled", "5 thousands",
    "5 hundredths", "4 point five", "3 dozens", "12. The other", "2 i", "5 y", "-2 i", "5 bn",
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), NUMBERS.items())
def test_numbers_are_read_exactly(text, value):
    assert number(text) == value
    read = answers.read("number", f"So it is. The answer is: {text}")
    assert read is not None and answers.is_same("number", read, str(Fraction(value)))
    assert not answers.is_same("number", read, str(Fraction(value) + 1))


def test_what_is_no_number_is_none():
    assert [text for text in NO_NUMBERS if number(text) is not None] == []


# Answer, gold answer: of a number's gold one the digits say how it was rounded.
SAME_NUMBERS = [
    ("18.50", "18.5"), ("7/8", "0.875"), ("10/3", "3.33333"), ("3.3333333", "3.33333"),
    ("0.666666", "0.666667"), ("0.6666", "0.6667"), ("54.5454", "54.545"), ("-1/22", "-0.04545"),
    ("4,656", "4656"), ("6/20", "3/10"), ("0.3", "3/10"), ("x = 5", "5"), ("5", "x = 5"),
    ("x = 5", "x=5.0"),
]  # fmt: skip
OTHER_NUMBERS = [
    ("18.46", "18.5"), ("18.49", "18.50"), ("18.505", "18.50"), ("0.87", "0.875"),
    ("0.876", "0.875"), ("0.8755", "0.875"), ("42.1876", "42.1875"), ("3.3333", "3.33333"),
    ("3.33", "3.33333"), ("1/22", "-0.04545"), ("x = 5", "y = 5"),
]  # fmt: skip
SAME_FORMULAS = [
    (r"\frac12", r"\frac{1}{2}"), (r"\dfrac{1}{2}", "0.5"), ("$x^2+2x+1$", "(x+1)^2"),
    (r"\frac{1}{\sqrt3}", r"\frac{\sqrt{3}}{3}"), (r"\{2, 1\}", r"\{1,2\}"),
    ("12,6,10", "12, 10, 6"),
    (r"11\sqrt2", r"11\sqrt{2}"), ("30", r"30^\circ"), ("32348", r"\$32,\!348"),
    (r"2\frac12", r"\frac{5}{2}"), (r"\text{Evelyn}", "Evelyn"), ("x \\le 3", r"x \leq 3"),
    ("5", "x=5"), ("2^{100} - 2", "-2 + 2^{100}"), ("164\\pi", r"164 \pi \mbox{ square feet}"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)"), (r"-\frac{5}{3}", r"-\frac{5}{3}."),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    ("43_{5}", "43_5"), ("43", "43_5"), (r"\frac{1}{2^{98}}", "2^{-98}"),
    (r"\frac{2}{2^{99}}", r"\frac{1}{2^{98}}"), (r"\frac{x}{2^{98}}", r"x \cdot 2^{-98}"),
    (r"\sqrt{2}\sqrt{3}", r"\sqrt{6}"), ("43_{10}", "43"), ("12pi", r"12\pi"),
    ("A,C", r"\text{A,C}"), (r"f(2) = 5\text{ cm}", r"5 \text{ cm}"),
    ("x=2,x=3", "2,3"), (r"\angle ABC = 40^\circ", "40"), (r"\frac{-3}{2}", r"-\frac{3}{2}"),
    ("LQSX", r"\text{LQSX}"), ("ba", "ab"), (".0000672", "0.0000672"),
]  # fmt: skip
OTHER_FORMULAS = [
    ("(1,2)", "(2,1)"), ("[1,2]", "(1,2)"), ("0.5", r"50\%"), (r"\pi", "3.14"), ("x", "y"),
    ("x+1", "x-1"), ("", "1"), ("$$", "1"), (r"\frac", "2"), ("43_6", "43_5"),
    (r"\text{odd}", r"\text{even}"), ("XSQL", "LQSX"), ("listen", "silent"), ("43_5", "43"),
    (".0000673", ".0000672"), ("2 i", "2"),
    ("2^{100}", "2^{101}"), ("(-\\infty,3)", "(-\\infty,3]"),
    (r"\begin{pmatrix}1\\3\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    # What comes to the number is not the number.
    (r"\binom{7}{3}", "35"), ("5!", "120"), ("2x-3=7", "7"), ("x^2=5", "5"), ("2=3", "3"),
    ("102^2-98^2", "800"), (r"\log_2 4 = 2", "2"), (r"3 \cdot 4", "12"), ("5(3)", "15"),
    # Small ones are not the same for being small.
    (r"\frac{1}{2^{98}}", "2^{99}"), (r"\frac{1}{2^{98}}", r"\frac{1}{2^{99}}"),
    ("10^{-20}", "10^{-30}"), ("10^{-30}", "10^{-20}"),
    (r"\frac{x}{2^{98}}", r"\frac{x}{2^{99}}"), (r"\frac{1}{3^{80}}", r"-\frac{1}{3^{80}}"),
]  # fmt: skip
COMPARED = [("number", True, SAME_NUMBERS), ("number", False, OTHER_NUMBERS),
            ("latex", True, SAME_FORMULAS), ("latex", False, OTHER_FORMULAS)]  # fmt: skip


def test_a_formula_of_the_question_is_no_answer_unless_the_gold_one_is_it_too():
    question = r"Write $58_9 - 18_9.$ in base $9$."
    assert not answers.is_same("latex", "$58_9-18_9$", "40_9", question)
    assert answers.is_same("latex", "40_9", "40_9", question)
    assert answers.is_same("latex", "9", "9", question)


@pytest.mark.parametrize(
    ("kind", "answer", "gold", "same"),
    [(kind, *pair, same) for kind, same, pairs in COMPARED for pair in pairs],
)
def test_answers_are_compared_by_what_they_mean(kind, answer, gold, same):
    assert answers.is_same(kind, answer, gold) == same


ENDLESS = [
    "9^{9^9}", "9^{9^{9}}", "9^9^9", "9**9**9", "(9^{999})^{999}", "10^{10^{10}}", "99999!",
    "9!!!!!", "2^{99999999}", "2^{100!}", r"\binom{99999999}{5000000}", r"{99999999 \choose 5}",
    r"\sum_{i=1}^{999999999} i!", r"\int_0^1 x^x dx", r"\prod_{i=1}^{99} i", "(" * 200, "{" * 200,
    "1" * 290, r"\frac" * 40, r"\sqrt{" * 40, "x^" * 90, "((((((((((((1))))))))))))", "-" * 250,
    "2^(99999999)", "2^{9} ^ {9} ^ {9} ^ {9} ^ {9}", r"\left" * 40, "x_{" * 60, "1," * 140,
    "|" * 99, r"\pi\cdot2\sin9(y-2)^{7}\pi!1", r"\pi!", "n!", "(9!)!",
]  # fmt: skip


@pytest.mark.parametrize("text", ENDLESS)
def test_no_answer_keeps_the_comparison_busy(text):
    begun = time.monotonic()
    assert not answers.is_same("latex", text, "3")
    assert answers.is_same("latex", text, text + "1") in (True, False)
    assert time.monotonic() - begun < 30


def test_formulas_are_compared_in_threads_too():
    found = []
    pairs = [("y(y+2)", "y^2 + 2y"), ("y(y+2)", "y^2 + y")]
    compare = lambda: found.extend(answers.is_same("latex", *pair) for pair in pairs)  # noqa: E731
    thread = threading.Thread(target=compare)
    thread.start()
    thread.join()
    assert found == [True, False]


near_numbers = st.text("0123456789.,-+$%/\\ frac{}^x", max_size=30)
near_formulas = st.lists(
    st.sampled_from([*"0123456789xy+-=,()[]{}^_|<>!$ ", r"\frac", r"\sqrt", r"\text", r"\pi",
                     r"\infty", r"\left(", r"\right)", r"\cup", r"\\", "&", r"\boxed"]),
    max_size=14,
).map("".join)  # fmt: skip
anything = st.text(max_size=40) | near_numbers | near_formulas
CHOICES = ["a marsh", "a tundra", "A marsh.", "the plains"]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(answers.KINDS), anything, anything)
@example("latex", "\x00", "")
@example("number", "1" * 10_000, "1")
def test_any_text_is_read_or_has_no_answer_and_is_the_same_or_not(kind, text, other):
    assert answers.is_same(kind, text, other) in (True, False)
    for response in (text, f"So. {answers.MARKER}: {text}"):
        found = answers.read(kind, response, CHOICES)
        if found is not None:
            # An answer of its own is read as the same one.
            said = CHOICES["ABCD".index(found)] if kind == "choice" else found
            assert answers.read(kind, f"{answers.MARKER}: {said}", CHOICES) == found
            assert answers.is_same(kind, found, found)
