"""What a model can do: greedy answers judged by the task, and the ranking of held-out pairs."""

from dataclasses import dataclass

from allo_lib.engine.generation import generate
from allo_lib.errors import AlloError


@dataclass(frozen=True)
class Answers:
    """Greedy responses to questions, in their order: texts, whether read, whether right."""

    texts: list[str]
    answered: list[bool]
    right: list[bool]

    @property
    def accuracy(self) -> float:
        """Share of right answers; a response without an answer is wrong."""
        return sum(self.right) / len(self.right)


def answer(
    model, tokenizer, task, questions, *, max_new_tokens: int, batch_size: int, drafts=None
) -> Answers:
    """Greedy decoding of every question, judged by the task; an unended response has no answer.

    drafts: guesses at the responses, see `generation`.

    Raises:
        AlloError: no questions, of which there is no accuracy.
    """
    if not questions:
        raise AlloError("no questions to answer; raise `dev` and `test` of the domain")
    responses = generate(
        model,
        tokenizer,
        [question.prompt for question in questions],
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        drafts=drafts,
    )
    texts = [group[0].text for group in responses]
    answered = [
        group[0].ended and task.answered(question, group[0].text)
        for question, group in zip(questions, responses, strict=True)
    ]
    right = [
        read and task.right(question, text)
        for question, text, read in zip(questions, texts, answered, strict=True)
    ]
    return Answers(texts, answered, right)


def implicit_margins(policy: list[dict], reference: list[dict], beta: float) -> list[float]:
    """DPO's implicit reward of chosen minus rejected, per pair: beta (Delta+ - Delta-)."""
    return [
        beta
        * (
            (sum(ours["chosen"]) - sum(theirs["chosen"]))
            - (sum(ours["rejected"]) - sum(theirs["rejected"]))
        )
        for ours, theirs in zip(policy, reference, strict=True)
    ]
