"""Replies to instructions as rows of `measurements.csv`: their lengths, and, where a judge is
named, the win rates of the methods against the SFT model.

Each method's replies to one data set are judged once and the verdicts kept, apart from training: a
judge that is named later judges the replies that there are.
"""

import statistics
from collections.abc import Sequence
from functools import lru_cache

from allo_lib import instructions, judge_names, judges, local_judges, measurements, models
from allo_lib.config import fingerprint
from allo_lib.instructions import REFERENCE
from allo_lib.judge_programs import ALPACA_ANNOTATOR, BENCH
from allo_lib.judges import Comparison, Judgement
from allo_lib.measurements import Measurement
from allo_lib.store import write_json

VERSION = 1
LENGTH, CUT = "response_characters", "response_cut"
_OF_PROGRAMS = {"alpaca_eval": {"name": ALPACA_ANNOTATOR}, "arena_hard": {"name": BENCH}}


def rows(study, name: str, results: dict[str, dict]) -> list[Measurement]:
    """All rows that the replies of a domain's methods give; none where it asks for none.

    Of every method and of the SFT model, on each data set: `response_characters` (their mean) and
    `response_cut` (the share that had not ended). With a judge also `win_rate` against the SFT
    model (whose own is .5) and who judged (`judge_names`).

    Args:
        results: method -> result, as `arms.result` gives it.

    Raises:
        AlloError: the judge cannot be loaded or asked; what was judged before is kept.
    """
    if not study.domain(name).instructions.datasets:
        return []
    found = []
    for dataset, by_method in instructions.replies(study, name, results).items():
        for method, replies in by_method.items():
            found += _sizes(study.seed, method, dataset, replies)
    if study.profile.judge.kind:
        try:
            found += _judged(study, name, results)
        finally:
            _load.cache_clear()  # a judge may be larger than all the rest
    return found


def _sizes(seed: int, method: str, dataset: str, replies: list[list]) -> list[Measurement]:
    lengths = [len(text.strip()) for _, _, text, _ in replies]
    cut = [not ended for *_, ended in replies]
    return [
        _mean(seed, method, dataset, LENGTH, lengths),
        measurements.proportion(seed, method, dataset, CUT, cut),
    ]


def _judged(study, name: str, results: dict[str, dict]) -> list[Measurement]:
    found, chosen = [], instructions.chosen(study, name)
    for dataset, by_method in instructions.texts(study, name, results).items():
        judged, notes = {}, {}
        for method, ours in by_method.items():
            names = (method, REFERENCE)
            comparison = Comparison(chosen[dataset], ours, by_method[REFERENCE], names)
            judged[method], told = judgement(study, dataset, comparison)
            notes |= told
        for method, one in judged.items():
            found.append(judges.measurement(one, study.seed, method, dataset))
        found.append(_who(study, dataset, judged, len(chosen[dataset]), notes))
    return found


def _who(study, dataset: str, judged: dict, count: int, note: dict) -> Measurement:
    """The row that names the judge: the share of comparisons that it gave a verdict on."""
    settings = study.profile.judge
    metric = judge_names.metric_of(settings.kind, {"name": settings.model} | note)
    asked = [one for method, one in judged.items() if method != REFERENCE]
    total = count * len(asked)
    share = sum(one.n for one in asked) / total if total else 1.0
    return Measurement(study.seed, REFERENCE, dataset, metric, share, 0.0, total)


def judgement(study, dataset: str, comparison: Comparison) -> tuple[Judgement, dict]:
    """The profile's judge on a comparison, and a note of which model it was; kept in the store.

    It is known by the judge's settings and by what it reads, whoever wrote that and however it was
    trained. The judge runs on the study's device.
    """
    settings = study.profile.to_dict()["judge"]
    read = [list(comparison.rows), list(comparison.ours), list(comparison.theirs)]
    inputs = {key: settings[key] for key in ("kind", "model", "revision", "checkout")}
    inputs |= {"version": VERSION, "dtype": _dtype(study), "device": study.device}
    inputs |= {"read": fingerprint(read)}

    def make(folder) -> None:
        found, note = _ask(study, dataset, comparison)
        write_json(folder / "record.json", {"note": note, "judgement": vars(found)})

    record = study.store.get("judgement", inputs, make).json()
    found = record["judgement"]
    for key in ("ids", "outcomes", "weights"):
        found[key] = tuple(found[key])
    return Judgement(**found), record["note"]


def _dtype(study) -> str:
    return models.dtype_on(study.device, study.profile.judge.dtype or study.profile.model.dtype)


def _ask(study, dataset: str, comparison: Comparison) -> tuple[Judgement, dict]:
    settings = study.profile.judge
    if settings.kind not in local_judges.LOCAL:
        # Programs leave logs, and what an interrupted run goes on from; none of it is a result.
        folder = study.store.folder / "judging" / f"seed{study.seed}" / dataset
        checkout = settings.checkout or None
        found = judges.judge(settings.kind, comparison, folder=folder, checkout=checkout)
        return found, _OF_PROGRAMS[settings.kind]
    if not comparison.differing:  # all ties, which no model need be loaded for
        return judges.judge(settings.kind, comparison), {}
    loading = (settings.kind, settings.model, _dtype(study), study.device, settings.revision)
    model = _load(*loading)
    size = settings.batch_size
    found = judges.judge(settings.kind, comparison, model=model, batch_size=size)
    return found, {key: model.note[key] for key in ("name", "revision", "sha256", "dtype")}


@lru_cache(maxsize=1)
def _load(kind: str, model: str, dtype: str, device: str, revision: str):
    return judges.load_judge(kind, model, dtype=dtype, device=device, revision=revision or None)


def _mean(seed: int, method: str, dataset: str, metric: str, values: Sequence) -> Measurement:
    """The mean with the standard error sd / sqrt(n); for values of 0 and 1 that of a share."""
    error = statistics.pstdev(values) / len(values) ** 0.5
    return Measurement(
        seed, method, dataset, metric, float(statistics.fmean(values)), error, len(values)
    )
