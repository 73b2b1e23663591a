"""What a profile may say of instructions and of their judge, checked before anything runs."""

from allo_lib.config import MODEL_DTYPES, Judge, Profile
from allo_lib.errors import AlloError
from allo_lib.profile_checks import short
from allo_lib.published import INSTRUCTIONS

# As in `judges`, which would import torch.
LOCAL = ("reward_model", "judge_model")
PROGRAMS = ("alpaca_eval", "arena_hard")


def check_instructions(profile: Profile) -> None:
    """Raise AlloError for instructions that no method could reply to, or that two domains have."""
    place_of: dict[str, str] = {}
    known = ", ".join(INSTRUCTIONS)
    for name, domain in profile.domains.items():
        asked, where = domain.instructions, f"domains.{name}.instructions"
        for dataset in asked.datasets:
            if dataset not in INSTRUCTIONS:
                raise AlloError(f"{where}.datasets: got {short(dataset)}, expected some of {known}")
            if dataset in place_of:
                raise AlloError(
                    f"{where}.datasets: {dataset} is also named by {place_of[dataset]}; "
                    "measurements have one row a data set, so name it in one domain"
                )
            place_of[dataset] = where
        if asked.count < len(asked.datasets):
            raise AlloError(
                f"{where}.count: got {asked.count}, expected at least one for each of the "
                f"{len(asked.datasets)} data sets"
            )
        if asked.count and not asked.datasets:
            raise AlloError(f"{where}.datasets: empty, with a count; name some of {known}")
        if asked.datasets and domain.kind == "miniature":
            raise AlloError(f"{where}: the miniature has no words for them; leave them out")


def check_judge(profile: Profile) -> None:
    """Raise AlloError for a judge that cannot be one, or has nothing to judge."""
    judge = profile.judge
    if not judge.kind:
        given = [key for key in ("model", "revision", "dtype", "checkout") if getattr(judge, key)]
        if given:
            raise AlloError(
                f"judge.{given[0]} without judge.kind; name one of {', '.join(LOCAL + PROGRAMS)}"
            )
        return
    if judge.kind not in LOCAL + PROGRAMS:
        raise AlloError(
            f"judge.kind: got {short(judge.kind)}, expected one of {', '.join(LOCAL + PROGRAMS)}"
        )
    _check_judge_fits(judge)
    if not any(domain.instructions.datasets for domain in profile.domains.values()):
        raise AlloError(
            f"judge.kind: {judge.kind} has nothing to judge; give a domain `instructions`, or "
            "leave the judge out"
        )


def _check_judge_fits(judge: Judge) -> None:
    local = judge.kind in LOCAL
    if local and not judge.model.strip():
        raise AlloError(f"judge.model: {judge.kind} needs one; give a hub id or a folder")
    for key in ("model", "revision", "dtype"):
        if not local and getattr(judge, key):
            raise AlloError(f"judge.{key}: {judge.kind} judges by models of its own; leave it out")
    if judge.dtype and judge.dtype not in MODEL_DTYPES:
        raise AlloError(
            f"judge.dtype: expected one of {', '.join(MODEL_DTYPES)}, got {short(judge.dtype)}"
        )
    if judge.checkout and judge.kind != "arena_hard":
        raise AlloError(f"judge.checkout: {judge.kind} needs none; leave it out")
