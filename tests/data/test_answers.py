"""Reading final answers and comparing them: numbers, formulas, and any string at all."""

import threading
import time
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from refusals import refused

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
    "5 m^2": 5, "5m^{2}": 5, r"5 \text{ cm}^2": 5, "1,200 ft^3": 1200,
}  # fmt: skip


@pytest.mark.parametrize(("text", "value"), NUMBERS.items())
def test_numbers_are_read_exactly(text, value):
    assert number(text) == value
    read = answers.read("number", f"So it is. The answer is: {text}")
    assert read is not None and answers.is_same("number", read, str(Fraction(value)))
    assert not answers.is_same("number", read, str(Fraction(value) + 1))


@pytest.mark.parametrize(
    "text",
    ["", " ", "-", "$", "%", "1,23", "1,2345", "12,34,567", "1.2.3", "0x10", "3 4", "3 or 4",
     "3 and a half", "3 million", "2 dozen", "12 squared", "x", "3 + 4", "1/0", "0/0",
     "1/2/3", "--3", "-$-3", "3:00", "5th", "12 (twelve)", "18 is it", "٣", "½", "nan", "inf",
     "18 eggs left over today", "9" * 100, "1_000", "5 x^2", "3 y^2", "2**3", "**2** or **3**",
     "x = y", "x =", "1e", "e3", "1e999", "x = 1, 2"],
)  # fmt: skip
def test_what_is_no_number_is_none(text):
    assert number(text) is None


@settings(deadline=None)
@given(st.integers(-(10**15), 10**15), st.sampled_from(["{}", "{:,}", "{}.0", "${}", "{} eggs."]))
def test_integers_are_read_in_every_way_they_are_written(value, form):
    assert number(form.format(value)) == value
    assert answers.is_same("number", form.format(value), str(value))
    assert not answers.is_same("number", form.format(value + 1), str(value))


@settings(deadline=None)
@given(st.fractions(min_value=-1000, max_value=1000, max_denominator=999))
def test_fractions_are_the_same_as_themselves_and_as_long_decimals(value):
    assert number(str(value)) == value
    rounded = f"{float(value):.6f}"  # as MAWPS gives them
    assert answers.is_same("number", str(value), rounded)
    assert answers.is_same("number", repr(round(float(value), 12)), rounded) or "e" in repr(
        round(float(value), 12)
    )
    assert not answers.is_same("number", str(value + Fraction(1, 100)), rounded)


@pytest.mark.parametrize(
    ("given_", "gold", "same"),
    [
        # Money and other short decimals are exact ...
        ("18.50", "18.5", True), ("18.46", "18.5", False), ("18.49", "18.50", False),
        ("18.505", "18.50", False),
        ("0.87", "0.875", False), ("0.876", "0.875", False), ("7/8", "0.875", True),
        # ... long ones are rounded, or cut off.
        ("10/3", "3.33333", True), ("3.3333333", "3.33333", True), ("3.3333", "3.33333", False),
        ("3.33", "3.33333", False), ("0.666666", "0.666667", True), ("0.6666", "0.6667", True),
        ("54.5454", "54.545", True), ("-1/22", "-0.04545", True), ("1/22", "-0.04545", False),
        ("4,656", "4656", True), ("6/20", "3/10", True), ("0.3", "3/10", True),
        # Another name is another answer.
        ("x = 5", "5", True), ("5", "x = 5", True), ("x = 5", "x=5.0", True),
        ("x = 5", "y = 5", False),
    ],
)  # fmt: skip
def test_numbers_are_compared_to_the_gold_ones_digits(given_, gold, same):
    assert answers.is_same("number", given_, gold) == same


EQUAL = [
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
    (r"\sqrt{2}\sqrt{3}", r"\sqrt{6}"),
]  # fmt: skip
DIFFERENT = [
    ("(1,2)", "(2,1)"), ("[1,2]", "(1,2)"), ("0.5", r"50\%"), (r"\pi", "3.14"), ("x", "y"),
    ("x+1", "x-1"), ("", "1"), ("$$", "1"), (r"\frac", "2"), ("43_6", "43_5"),
    (r"\text{odd}", r"\text{even}"), ("2^{100}", "2^{101}"), ("(-\\infty,3)", "(-\\infty,3]"),
    (r"\begin{pmatrix}1\\3\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    # Small ones are not the same for being small.
    (r"\frac{1}{2^{98}}", "2^{99}"), (r"\frac{1}{2^{98}}", r"\frac{1}{2^{99}}"),
    ("10^{-20}", "10^{-30}"), ("10^{-30}", "10^{-20}"),
    (r"\frac{x}{2^{98}}", r"\frac{x}{2^{99}}"),
    (r"\frac{1}{3^{80}}", r"-\frac{1}{3^{80}}"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("given_", "gold", "same"),
    [(*pair, True) for pair in EQUAL] + [(*pair, False) for pair in DIFFERENT],
)
def test_formulas_are_compared_by_what_they_mean(given_, gold, same):
    assert answers.is_same("latex", given_, gold) == same


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
    for gold in ("3", r"\frac{x}{2}", text + "1"):
        assert answers.is_same("latex", text, gold) in (True, False)
    assert not answers.is_same("latex", text, "3")
    assert time.monotonic() - begun < 8


def test_formulas_are_compared_in_threads_too_but_for_what_only_a_clock_stops():
    pairs = [("y(y+2)", "y^2 + 2y"), (r"\sin z^2 + \cos z^2 + 1", "2"), (r"\sin z", r"\sin z")]
    found = []
    thread = threading.Thread(
        target=lambda: found.extend(answers.is_same("latex", *pair) for pair in pairs)
    )
    thread.start()
    thread.join()
    assert found == [True, False, True]


# --- any string ----------------------------------------------------------------------------------

near_numbers = st.text("0123456789.,-+$%/\\ frac{}^x", max_size=30)
near_formulas = st.lists(
    st.sampled_from([*"0123456789xy+-=,()[]{}^_|<>!$ ", r"\frac", r"\sqrt", r"\text", r"\pi",
                     r"\infty", r"\left(", r"\right)", r"\cup", r"\begin{pmatrix}",
                     r"\end{pmatrix}", r"\\", "&", r"\boxed"]),
    max_size=14,
).map("".join)  # fmt: skip
anything = st.text(max_size=40) | near_numbers | near_formulas
CHOICES = ["a marsh", "a tundra", "A marsh.", "the plains"]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(answers.KINDS), anything)
@example("latex", "\x00")
@example("number", "1" * 10_000)
def test_any_response_is_read_or_has_no_answer(kind, text):
    for response in (text, f"So. {answers.MARKER}: {text}"):
        found = answers.read(kind, response, CHOICES)
        assert found is None or isinstance(found, str) and found
        if found is not None:
            assert answers.final_text(response) is not None
            # Reading it again from a response of its own changes nothing.
            said = CHOICES["ABCD".index(found)] if kind == "choice" else found
            again = answers.read(kind, f"{answers.MARKER}: {said}", CHOICES)
            assert again == found


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(answers.KINDS), anything, anything)
def test_any_two_strings_are_the_same_or_not(kind, one, other):
    assert answers.is_same(kind, one, other) in (True, False)
    if answers.read(kind, f"{answers.MARKER}: {one}", CHOICES) is not None:
        assert answers.is_same(kind, one, one)


@settings(deadline=None)
@given(st.text(max_size=30), st.text(max_size=30))
def test_only_what_follows_the_last_marker_counts(before, after):
    if answers.MARKER in after:
        return
    response = f"{before} {answers.MARKER}: no {answers.MARKER}: {after}"
    assert answers.final_text(response) == after.strip()
    assert answers.final_text(f"{before.replace(answers.MARKER, '')} {after}") is None


def test_unknown_kinds_are_told():
    for call in (lambda: answers.read("essay", ""), lambda: answers.is_same("essay", "", "")):
        with refused("kind of answer 'essay': expected one of choice, yes_no, number, latex"):
            call()
    with refused("a choice without options"):
        answers.read("choice", f"{answers.MARKER}: x")


@pytest.mark.parametrize(
    ("kind", "text", "found"),
    [("yes_no", "**Yes.**", "yes"), ("choice", "**tea**", "B"), ("latex", "**\\pi**", "\\pi")],
)
def test_markdown_around_an_answer_of_any_kind_is_none_of_it(kind, text, found):
    for whole in (f"The answer is: {text}", f"**The answer is:** {text.strip('*')}"):
        assert answers.read(kind, whole, ["milk", "tea"]) == found
