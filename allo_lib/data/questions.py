"""Questions with a gold answer: their prompts, their gold responses, and judging others' responses.

`name` is the data set's name in `benchmarks`; for one that is not there the kind of answer is told
from the row itself. Style "text" is for small models, which tell texts apart but not letters: the
stem, the options' texts on one line, and `Answer:`. Style "letter" is the paper's form: an
instruction with lettered options that ends in "Let's think step by step.".
"""

from allo_lib.data import answers
from allo_lib.data.answers import LETTERS, MARKER, STYLES
from allo_lib.data.benchmarks import BENCHMARKS
from allo_lib.errors import AlloError


def kind(name: str, row: dict) -> str:
    """Kind of a row's answer: "choice" where there are options, else that of its data set."""
    if row.get("choices"):
        return "choice"
    if name in BENCHMARKS:
        return BENCHMARKS[name].answer
    gold = row["answer"]
    if answers.plain(gold) in ("yes", "no"):
        return "yes_no"
    return "number" if answers.number(gold) is not None else "latex"


def check(name: str, row: dict) -> None:
    """Raise AlloError unless the row is a question whose own gold answer is read and right."""
    what = kind(name, row) if "answer" in row else ""
    if what not in answers.KINDS:
        raise AlloError(
            f"question {row.get('id')!r} of {name} has no gold answer; a judge is needed"
        )
    if what == "choice" and not row.get("choices"):
        raise AlloError(f"question {row['id']!r} has no options; expected multiple choice")
    if not is_right(name, row, f"{MARKER}: {_gold(row)}"):
        raise AlloError(
            f"question {row['id']!r}: answer is {row['answer'][:40]!r}, expected one that reads "
            f"as {what}"
        )


def prompt(name: str, row: dict, style: str = "text") -> str:
    """What the model is asked, ending where its response begins (with a space)."""
    _check_style(style)
    if style == "letter":
        return (
            "Below is an instruction that describes a task. Write a response that appropriately "
            f"completes the request.\n\n### Instruction:\n{row['question']}\n\n"
            "### Response: Let's think step by step."
        )
    lines = [_stem(row)]
    options = ["yes", "no"] if kind(name, row) == "yes_no" else row["choices"]
    if options:
        lines.append(f"Options: {', '.join(options)}")
    return "\n".join([*lines, "Answer:"])


def target(name: str, row: dict, style: str = "text", explain: int = 0) -> str:
    """The gold response, starting with a space, without the end token.

    Before `The answer is: X` comes the whole derivation where the data set has such (for MAWPS the
    equation), and else `explain` statements of the human explanation (at most what there is).
    """
    before = []
    if row["solution"]:
        if name in BENCHMARKS and BENCHMARKS[name].worked:
            before = [_ended(row["solution"].strip())]
        else:
            lines = [" ".join(line.split()) for line in row["solution"].split("\n")]
            before = [_ended(line) for line in lines if line][: int(explain)]
    return " " + " ".join([*before, _final(row, style)])


def read(name: str, row: dict, response: str, style: str = "text") -> str | None:
    """The response's final answer, read strictly (`answers.read`); None without one."""
    _check_style(style)
    return answers.read(kind(name, row), response, row["choices"], style)


def is_right(name: str, row: dict, response: str, style: str = "text") -> bool:
    """Whether the response's final answer is the gold one."""
    given = read(name, row, response, style)
    return given is not None and answers.is_same(kind(name, row), given, row["answer"])


def correction(name: str, row: dict, response: str, style: str = "text") -> str:
    """The response with as little changed as makes its final answer right.

    What follows the last `The answer is` is replaced by the gold answer; a response without one
    gets it appended. Made from the gold answer alone, so what stands before it stays as it was.
    """
    if is_right(name, row, response, style):
        return response
    before, marker, _ = response.rpartition(MARKER)
    if not marker:
        before = response.rstrip() + " "
    return before + _final(row, style)


def _final(row, style) -> str:
    _check_style(style)
    return f"{MARKER}: {_gold(row, style)}"


def _gold(row, style="text") -> str:
    if not row["choices"]:
        return row["answer"]
    return answers.option(row["choices"], LETTERS.index(row["answer"]), style)


def _stem(row) -> str:
    # The options stand in the question too, one a line; they are always its last lines.
    count = len(row["choices"] or ())
    return "\n".join(row["question"].split("\n")[:-count]) if count else row["question"]


def _ended(text) -> str:
    return text if text[-1] in ".!?" else text + "."


def _check_style(style) -> None:
    if style not in STYLES:
        raise AlloError(f"style {style!r}: expected 'text' or 'letter'")
