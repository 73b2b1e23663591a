"""The data sets of the paper: where the hub has each, at which revision, and how it is answered.

A revision is the git commit of the hub's copy that other public projects pin too (named beside it),
so that rows cannot change unseen. Where no such commit is known it is None, a line says so when the
rows are read, and the hash of the rows in manifest.json is what tells a change.

Splits of the hub's copies differ from those of a data folder where there is no official one
(MAWPS), or the official test labels are not public (QASC, StrategyQA).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Benchmark:
    """One data set.

    answer: kind of its answers, see `answers.KINDS`, or "" where a judge is needed. Questions with
        options are choices whatever stands here (a quarter of TabMWP).
    hub, config, folder, file, revision: what `datasets.load_dataset` is given, as the hub id, its
        name, data_dir, one JSON file of the repository, and the git commit.
    train, test: the hub's names of our two splits; None where it has none.
    worked: whether the solution is a derivation, to be learned whole. Otherwise it is a list of
        statements, one a line, of which a profile's `explain` says how many to learn.
    """

    answer: str
    hub: str
    config: str | None = None
    folder: str | None = None
    file: str | None = None
    revision: str | None = None
    train: str | None = "train"
    test: str | None = "test"
    worked: bool = False


BENCHMARKS = {
    # ECQA (Aggarwal et al. 2021) on CommonsenseQA's questions.
    "ecqa": Benchmark("choice", "yangdong/ecqa"),
    # QASC (arXiv 1910.11473); several projects' pin, among them training mixtures.
    "qasc": Benchmark(
        "choice",
        "allenai/qasc",
        revision="a34ba204eb9a33b919c10cc08f4f1c8dae5ec070",
        test="validation",
    ),
    # OpenBookQA (arXiv 1809.02789); pinned by lighteval's task lists.
    "openbookqa": Benchmark(
        "choice",
        "allenai/openbookqa",
        config="main",
        revision="388097ea7776314e93a529163e0fea805b8a6454",
    ),
    # StrategyQA (arXiv 2101.02235), a split of its labelled questions; the hub shows this commit.
    "strategyqa": Benchmark(
        "yes_no", "ChilleD/StrategyQA", revision="705562638fe1d8ca6bb98c66fc8f94d45fda8c83"
    ),
    # GSM8k (arXiv 2110.14168); pinned by inspect_evals.
    "gsm8k": Benchmark(
        "number",
        "openai/gsm8k",
        config="main",
        revision="cc7b047b6e5bb11b4f1af84efc572db110a51b3c",
        worked=True,
    ),
    # MATH (arXiv 2103.03874); pinned by inspect_evals.
    "math": Benchmark(
        "latex",
        "DigitalLearningGmbH/MATH-lighteval",
        config="default",
        revision="0530c78699ea5e8eb5530600900e1f328b48acad",
        worked=True,
    ),
    # MAWPS (Koncel-Kedziorski et al. 2016), without training problems close to test ones.
    "mawps": Benchmark(
        "number",
        "MU-NLPC/Calc-mawps",
        config="default",
        revision="38c10053efeafd20ab6ff4e08c3ec17de26c19b7",
        worked=True,
    ),
    # TabMWP (arXiv 2209.14610); this copy holds test problems only.
    "tabmwp": Benchmark("number", "Arietem/tabmwp", train=None, test="train", worked=True),
    # AlpacaEval 2.0 (arXiv 2404.04475) with the outputs of its reference model.
    "alpaca_eval": Benchmark(
        "",
        "tatsu-lab/alpaca_eval",
        file="alpaca_eval_gpt4_baseline.json",
        revision="2edc6fad8be6b14ea7230aabfd08188da6b8b814",
        train=None,
        test="train",
    ),
    # Arena-Hard 0.1 (arXiv 2406.11939), without outputs.
    "arena_hard": Benchmark(
        "",
        "lmarena-ai/arena-hard-auto-v0.1",
        revision="2a69efe86cff85c593cfd4c2b4491c128e52c6f1",
        train=None,
        test="train",
    ),
    # The helpful part of HH-RLHF (arXiv 2204.05862).
    "hh_helpful": Benchmark(
        "",
        "Anthropic/hh-rlhf",
        folder="helpful-base",
        revision="09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa",
    ),
}
