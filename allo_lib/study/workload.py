"""The pairs of which 07_efficiency measures the cost: one batch, the same for every variant."""

from dataclasses import dataclass
from pathlib import Path

from allo_lib.data.benchmarks import load_rows
from allo_lib.data.pairs import preference_pairs
from allo_lib.engine import reference
from allo_lib.engine.encoding import encode_pairs
from allo_lib.engine.store import write_json

COLUMNS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True)
class Workload:
    """One batch of pairs.

    texts: TRL's columns prompt, chosen, rejected, for trainers that encode by themselves. rows: the
    same as token ids with the log-probs of the model they start from (`encoding`, `reference`).
    """

    texts: list[dict]
    rows: list[dict]

    @property
    def tokens(self) -> int:
        """Tokens of the prompts and of both responses, each once: the same for every variant,
        whatever it repeats or pads."""
        return sum(len(row[key]) for row in self.rows for key in COLUMNS)


def domain_of(study) -> str:
    """The domain whose pairs are measured."""
    return study.profile.timing.domain or next(iter(study.profile.domains))


def workload(study) -> Workload:
    """The batch that the profile's `timing` asks for; made at the first call, read afterwards."""
    name = domain_of(study)
    inputs = {
        "pairs": study.pairs(name).key,
        "timing": [study.profile.timing.prompt, study.profile.timing.responses, _count(study)],
    }
    artifact = study.store.get("timed_pairs", inputs, lambda folder: _make(study, name, folder))
    texts = artifact.json("pairs.json")
    rows = encode_pairs(study.tokenizer, texts, study.context)
    return Workload(texts, reference.attach(rows, artifact.file("logps.safetensors")))


def _count(study) -> int:
    return study.profile.timing.pairs or study.domain(domain_of(study)).batch_size


def _make(study, name: str, folder: Path) -> None:
    timing = study.profile.timing
    if timing.prompt or timing.responses:
        texts = _nearest(study, _candidates(study, name))
    else:
        texts = study.pairs(name).rows["train"][: _count(study)]
    texts = [{key: pair[key] for key in COLUMNS} for pair in texts]
    rows = encode_pairs(study.tokenizer, texts, study.context)
    write_json(folder / "pairs.json", texts)
    reference.write(study.logps(study.load_sft(name), rows), folder / "logps.safetensors")
    lengths = {key: sum(len(row[key]) for row in rows) / len(rows) for key in COLUMNS}
    write_json(folder / "record.json", {"pairs": len(rows), "mean_tokens": lengths})


def _candidates(study, name: str) -> list[dict]:
    """Human pairs of any length that the model can read; sampled ones are what they are."""
    domain = study.domain(name)
    if domain.kind != "preferences":
        return study.pairs(name).rows["train"]
    return [
        pair
        for dataset in domain.datasets
        for pair in preference_pairs(
            load_rows(dataset, "train", study.data_dir), study.tokenizer, study.context
        )
    ]


def _nearest(study, pairs: list[dict]) -> list[dict]:
    """Those whose prompt and responses come nearest to the asked numbers of tokens."""
    timing = study.profile.timing

    def distance(row: dict) -> int:
        responses = len(row["chosen"]) + len(row["rejected"])
        return abs(len(row["prompt"]) - timing.prompt) + abs(responses - timing.responses)

    distances = [distance(row) for row in encode_pairs(study.tokenizer, pairs, study.context)]
    order = sorted(range(len(pairs)), key=lambda i: (distances[i], i))
    return [pairs[i] for i in order[: _count(study)]]
