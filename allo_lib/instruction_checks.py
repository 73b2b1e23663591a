"""What a profile may say of instructions and of their judge, checked before anything runs."""

from allo_lib.config import MODEL_DTYPES, Profile
from allo_lib.errors import AlloError
from allo_lib.profile_checks import short
from allo_lib.published import INSTRUCTIONS

KINDS = ("reward_model", "programs")  # as in `judges`


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
    judge, known = profile.judge, ", ".join(KINDS)
    given = [key for key in ("model", "revision", "dtype") if getattr(judge, key)]
    if not judge.kind and given:
        raise AlloError(f"judge.{given[0]} without judge.kind; name one of {known}")
    if judge.kind and judge.kind not in KINDS:
        raise AlloError(f"judge.kind: got {short(judge.kind)}, expected one of {known}")
    if judge.kind == "reward_model" and not judge.model.strip():
        raise AlloError("judge.model: reward_model needs one; give a hub id or a folder")
    if judge.kind == "programs" and given:
        raise AlloError(f"judge.{given[0]}: programs judge by models of their own; leave it out")
    if judge.dtype and judge.dtype not in MODEL_DTYPES:
        raise AlloError(
            f"judge.dtype: expected one of {', '.join(MODEL_DTYPES)}, got {short(judge.dtype)}"
        )
    if judge.kind and not any(d.instructions.datasets for d in profile.domains.values()):
        raise AlloError(
            f"judge.kind: {judge.kind} has nothing to judge; give a domain `instructions`, or "
            "leave the judge out"
        )
