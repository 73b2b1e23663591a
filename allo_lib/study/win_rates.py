"""Replies to instructions as rows of `measurements.csv`: their lengths, and, where a judge is
named, the win rates of the methods against the SFT model.

A judge that is named later judges the replies that there are. What a reward model said is kept,
apart from training; the verdicts of the benchmarks' programs are read beside the replies.
"""

import re
import statistics
from collections.abc import Sequence
from functools import lru_cache

from allo_lib.engine import models
from allo_lib.engine.store import write_json
from allo_lib.evaluation import outcomes
from allo_lib.evaluation.comparisons import JUDGED_BY
from allo_lib.evaluation.outcomes import Measurement
from allo_lib.profiles.config import fingerprint
from allo_lib.study import instructions, judges
from allo_lib.study.instructions import REFERENCE

VERSION = 1
LENGTH, CUT = "response_characters", "response_cut"


def rows(study, name: str, results: dict[str, dict]) -> list[Measurement]:
    """All rows that the replies of a domain's methods give; none where it asks for none.

    Of every method and of the SFT model, on each data set: `response_characters` (their mean) and
    `response_cut` (the share that had not ended). With a judge also `win_rate` against the SFT
    model (whose own is .5) and who judged.

    Args:
        results: method -> result, as `arms.result` gives it.

    Raises:
        AlloError: the judge cannot be loaded or its verdicts read; what was judged before is kept.
    """
    if not study.domain(name).instructions.datasets:
        return []
    found, seed = [], study.seed
    for dataset, by_method in instructions.replies(study, name, results).items():
        for method, replies in by_method.items():
            lengths = [len(text.strip()) for _, _, text, _ in replies]
            cut = [not ended for *_, ended in replies]
            found.append(_mean(seed, method, dataset, LENGTH, lengths))
            found.append(outcomes.proportion(seed, method, dataset, CUT, cut))
    if study.profile.judge.kind:
        try:
            for dataset, texts in instructions.texts(study, name, results).items():
                found += _judged(study, name, dataset, texts)
        finally:
            _load.cache_clear()  # a judge may be larger than all the rest
    return found


def _judged(study, name: str, dataset: str, texts: dict[str, list[str]]) -> list[Measurement]:
    asked, seed = instructions.chosen(study, name)[dataset], study.seed
    judged = {REFERENCE: judges.judgement(asked, texts[REFERENCE], texts[REFERENCE], {})}
    who, found = _judge_of(study, dataset, ""), []
    for method, ours in texts.items():
        if method != REFERENCE:
            verdicts, who = _verdicts(study, name, dataset, asked, texts, method)
            judged[method] = judges.judgement(asked, ours, texts[REFERENCE], verdicts)
    for method, one in judged.items():
        told = one.win_rate, one.stderr, len(one.ids)
        found.append(Measurement(seed, method, dataset, "win_rate", *told))
    # Who judged, and the share of comparisons that had a verdict.
    count = sum(len(one.ids) for method, one in judged.items() if method != REFERENCE)
    total = len(asked) * (len(judged) - 1)
    share = count / total if total else 1.0
    return [*found, Measurement(seed, REFERENCE, dataset, f"{JUDGED_BY}{who}", share, 0.0, total)]


def _judge_of(study, dataset: str, name: str, weights: str = "") -> str:
    """`<kind>:<model>[+<8 hex digits of its weights>]`; a folder is known by its last part."""
    settings = study.profile.judge
    kind = dataset if settings.kind == "programs" else settings.kind
    name = (name or settings.model).rstrip("/").rpartition("/")[2]
    name = re.sub(r"[^A-Za-z0-9_.\-]", "_", name) or "_"
    return f"{kind}:{name}{weights and '+' + weights[:8]}"


def _verdicts(study, name: str, dataset: str, asked, texts, method: str) -> tuple[dict, str]:
    """The judge's verdicts on a method's replies by row id, and the name of the judge."""
    settings = study.profile.judge
    if settings.kind == "programs":
        folder = instructions.folder(study, name) / dataset
        given = dataset, folder, asked, texts[method], method
        verdicts, judge = judges.read_verdicts(*given)
        return verdicts, _judge_of(study, dataset, judge)
    read = [asked, texts[method], texts[REFERENCE]]
    inputs = {"kind": settings.kind, "model": settings.model, "revision": settings.revision}
    dtype = models.dtype_on(study.device, settings.dtype or study.profile.model.dtype)
    inputs |= {"version": VERSION, "dtype": dtype, "device": study.device}

    def make(folder) -> None:
        judge = _load(settings.model, dtype, study.device, settings.revision or None)
        questions = [row["question"] for row in asked]
        ours, theirs = (judges.scores(judge, questions, x, settings.batch_size) for x in read[1:])
        sides = zip(asked, ours, theirs, strict=True)
        verdicts = {row["id"]: [0.5 if a == b else float(a > b)] for row, a, b in sides}
        write_json(folder / "record.json", {"verdicts": verdicts, "sha256": judge.note["sha256"]})

    record = study.store.get("judgement", inputs | {"read": fingerprint(read)}, make).json()
    return record["verdicts"], _judge_of(study, dataset, settings.model, record["sha256"])


@lru_cache(maxsize=1)
def _load(model: str, dtype: str, device: str, revision: str | None) -> judges.RewardModel:
    return judges.load_reward_model(model, dtype=dtype, device=device, revision=revision)


def _mean(seed: int, method: str, dataset: str, metric: str, values: Sequence) -> Measurement:
    """The mean with the standard error sd / sqrt(n); for values of 0 and 1 that of a share."""
    error = statistics.pstdev(values) / len(values) ** 0.5
    return Measurement(
        seed, method, dataset, metric, float(statistics.fmean(values)), error, len(values)
    )
