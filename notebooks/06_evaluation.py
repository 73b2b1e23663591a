# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 06 Evaluation: all methods, all claims
#
# **Question.** Which of the paper's claims hold here, by how much, and how sure is that?
#
# Accuracy is that of greedy decoding. Two methods are compared on the same problems and in the same replicates: with
# $g$ the share of problems that only the first gets right and $l$ those that only the second does, the effect is the
# mean of $g - l$. Each SFT model (one a seed) gives one effect $e_i$; these are independent, its problems are not.
# With $m$ models of mean effect $\bar e$ and standard deviation $s$ the interval is Student's
# $$\bar e \pm t_{m-1}\, s / \sqrt{m},$$
# or the normal one that the problems alone would give, where that is wider, as for models that happen to
# agree. One model decides nothing; how many do is fixed in the profile (`models`). Verdicts are computed from
# `outcomes.parquet`, never typed in, by the rule that is printed below them.

# %% tags=["parameters"]
profile = "tiny"  # name, or path of a YAML file
seed = 0
results_dir = ""  # "" is results/<profile>
overrides = {}  # profile keys to change, dotted: {"domains.miniature.epochs": 2}
seeds = None  # seeds to write to measurements.csv; None is `seed` alone, [] leaves it as it is

# %%
import sys
from pathlib import Path

# The repository, wherever in it the notebook runs.
sys.path[:0] = [str(p) for p in (Path.cwd(), *Path.cwd().parents) if (p / "allo_lib").is_dir()][:1]

from IPython.display import Image, Markdown, display

from allo_lib.evaluation import claims
from allo_lib.evaluation.verdicts import RULE
from allo_lib.report import report
from allo_lib.report.notebook import say, table
from allo_lib.study import results
from allo_lib.study.study import Study

study = Study.open(profile, seed, results_dir, overrides)
measured = results.update(study, [seed] if seeds is None else seeds)  # trains and measures what is missing
written = report.rebuild(study.results_dir, study.profile.to_dict())  # claims, tables, figures from files
verdicts = [claim for claim in claims.read(study.results_dir / "claims.csv") if claim.family != "costs"]
seen = sorted({row.seed for row in measured})
say(f"{len(measured)} measurements; seeds (each an SFT model of its own): {', '.join(map(str, seen))}. "
    + ("One model decides nothing." if len(seen) < 2 else f"Verdicts rest on {study.profile.models} models."))


def pictures(*beginnings):
    """Show the figures whose names begin so, each with its caption."""
    for path in written:
        if path.suffix == ".png" and path.stem.startswith(beginnings):
            display(Image(filename=str(path), width=760))
            say(f"*{report.caption_of(path)}*")


# %% [markdown]
# ## The answers
#
# One row a claim of the paper; effects are turned so that a positive one supports the claim. Claims that end in `p` are
# of the paper's protocol (one learning rate for all masks), those that end in `s` compare with as many updates as ALLO.
# C1 is about the loss on *held-out* pairs. The paper reads it off the training loss, whose last steps are mostly noise, and
# of pairs that were trained on. What a step costs (C10) is measured in 07.

# %%
whole = [claim for claim in verdicts if claim.id == claim.whole]  # parts stand in the appendix
answers = [(claim, *claims.effect_text(claim)) for claim in whole]
table([{"id": claim.id, "claim": claim.claim, "effect": effect, "95% interval": interval,
        "verdict": claim.in_words} for claim, effect, interval in answers])
counts = report.by_verdict(whole)
say("**" + "; ".join(f"{verdict}: {', '.join(ids) or 'none'}" for verdict, ids in counts.items()) + ".**")
say(RULE)

# %% [markdown]
# A run on your machine can be held against the committed study, even of one model, which decides nothing: an effect
# outside the last interval, where the means of 95% of as many more models lie, hints at something that differs.

# %%
committed = Path(claims.__file__).parents[2] / "results" / "tiny-full"
itself = study.results_dir.resolve() == committed
if study.profile.name in ("tiny", "tiny-full") and not itself and (committed / "claims.csv").is_file():
    rows = report.beside(verdicts, committed, len(report.fixed_seeds(study.results_dir, study.profile.to_dict())))
    table(rows)
    say(f"**{sum(row['inside'] == 'yes' for row in rows)} of {len(rows)} effects lie where those of as many more models would.**")
elif itself:
    say("This is the committed study itself.")
else:
    say(f"{study.profile.name} is not held against `results/tiny-full`, which is of the miniature or is not there.")

# %% [markdown]
# Of many comparisons some come out by chance. With $k$ of them and $p_{(1)} \le \dots \le p_{(k)}$, Holm's method
# adjusts $\tilde p_{(i)} = \max_{j \le i} \min(1, (k - j + 1)\, p_{(j)})$: keeping only verdicts with
# $\tilde p < 0.05$, the chance that even one of a family is wrong is at most 5%.

# %%
pictures("claims")
disagreements = claims.protocol_disagreements(verdicts)
for text in disagreements:
    say(f"- {text}")
if not disagreements and any(counts[verdict] for verdict in ("supported", "contradicted", "no difference")):
    say("The paper's protocol and the fair one (each mask tuned by itself) lead to the same verdicts here.")

# %% [markdown]
# ## All methods
#
# The figure sorts the methods; the table has the paper's numbers, on its own models and data, beside ours. Bold: best
# of a column; underlined: second best, as the paper marks them; an empty cell has its reason below the table.

# %%
pictures("main_", "relative_change")
for path in sorted(study.results_dir.glob("tables/main_*.md")):
    display(Markdown(path.read_text(encoding="utf-8")))

# %% [markdown]
# ## Parts of the neurons, parts of the method
#
# The empirical study of 01 and the ablations of 05, now over all SFT models.

# %%
pictures("empirical_", "ablations_")

# %% [markdown]
# ## What it means
#
# An undecided claim is not a refuted one: its interval says how large an effect may still be there. Where the interval
# is narrower than what would matter to you, that is an answer; where it is wide, more SFT models are needed and not more
# test problems, as results change more from one trained model to the next than from problem to problem.
#
# Next: [07_efficiency](07_efficiency.ipynb) asks what a step costs.
#
# ## Appendix: the evidence
#
# Every claim and its parts; the tables behind the figures. All comparisons of two methods are in
# `tables/comparisons*.csv`, the p-values in `tables/verdicts.csv`.

# %%
for claim in verdicts:
    say(f"- **{claim.id}: {claim.verdict}.** {claim.evidence}")

# %%
for pattern in ("empirical_*.md", "ablations_*.md"):
    for path in sorted(study.results_dir.glob(f"tables/{pattern}")):
        display(Markdown(path.read_text(encoding="utf-8")))
