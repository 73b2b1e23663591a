"""What is measured of a trained model: its score for the search, test answers, held-out margins,
and replies to instructions."""

from allo_lib.engine.forward import implicit_margins
from allo_lib.engine.generation import Answers, answer
from allo_lib.study import instructions
from allo_lib.study.study import Study


def dev_score(study: Study, name: str, model) -> float:
    """Accuracy on the development problems, or reward accuracy on the development pairs."""
    if study.task(name) is None:
        return _share(_margins(study, name, model, "dev"))
    return answers(study, name, model, "dev").accuracy


def dev_count(study: Study, name: str) -> int:
    """Development problems, or pairs, behind `dev_score`."""
    if study.task(name) is None:
        return len(study.pairs(name).rows["dev"])
    return study.domain(name).dev


def answers(study: Study, name: str, model, split: str) -> Answers:
    """Greedy answers to the problems of a split."""
    domain = study.domain(name)
    return answer(
        model,
        study.tokenizer,
        study.task(name),
        study.task(name).questions(split, getattr(domain, split)),
        max_new_tokens=domain.max_new_tokens,
        batch_size=study.profile.compute.generation_batch,
        drafts=study.drafts(name, split),
    )


def _share(margins: list[float]) -> float:
    return sum(margin > 0 for margin in margins) / len(margins)


def _margins(study: Study, name: str, model, split: str) -> list[float]:
    rows = study.encoded(name, split)
    reference = [
        {side: row[f"{side}_reference"] for side in ("chosen", "rejected")} for row in rows
    ]
    return implicit_margins(study.logps(model, rows), reference, study.profile.method.beta)


def measure(study: Study, name: str, model) -> dict:
    """What is reported of a method: margins on the held-out pairs, test answers, and replies."""
    measured = {"margins": _margins(study, name, model, "heldout")}
    measured |= instructions.of_method(study, name, model)
    if study.task(name) is None:
        return measured
    given = answers(study, name, model, "test")
    questions = study.task(name).questions("test", study.domain(name).test)
    rows = zip(questions, given.answered, given.right, strict=True)
    return measured | {
        "answers": [[q.id, q.dataset, int(answered), int(right)] for q, answered, right in rows]
    }


def of_a_ruin(study: Study, name: str) -> dict:
    """The same of a model whose training reached NaN: it answers nothing and ranks no pair."""
    measured = {"margins": [0.0] * len(study.encoded(name, "heldout"))}
    measured |= instructions.of_silence(study, name)
    if study.task(name) is None:
        return measured
    questions = study.task(name).questions("test", study.domain(name).test)
    return measured | {"answers": [[q.id, q.dataset, 0, 0] for q in questions]}
