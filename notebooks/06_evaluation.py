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
# Accuracy is that of greedy decoding with standard error $\sqrt{p(1-p)/n}$. Two methods are compared
# on the same problems: with $g$ the share of problems that only the first gets right and $l$ those that
# only the second does, the effect is $g - l$, and the paired bootstrap resamples problems (and, with
# several seeds, seeds first). A claim is `reproduced` only when its 95% interval excludes zero on the
# right side. Verdicts are computed from `measurements.csv`, never typed in.
#
# Of many comparisons some come out by chance. With $m$ of them and $p_{(1)} \le \dots \le p_{(m)}$, Holm's
# method adjusts $\tilde p_{(k)} = \max_{j \le k} \min(1, (m - j + 1)\, p_{(j)})$: keeping only verdicts with
# $\tilde p < 0.05$, the chance that even one of them is wrong is at most 5%. It is applied to three
# families: the claims; ALLO against every other row of the main tables on the averages; and the same on
# single data sets. Both verdicts are shown, before and after.

# %% tags=["parameters"]
profile = "tiny"  # name, or path of a YAML file
seed = 0
results_dir = ""  # "" is results/<profile>
overrides = {}  # profile keys to change, dotted: {"domains.miniature.epochs": 2}
seeds = None  # seeds to write to measurements.csv; None is `seed` alone, [] leaves it as it is

# %%
from IPython.display import Image, Markdown, display

from allo_lib import claims, report, results
from allo_lib.notebook import say, table
from allo_lib.study import Study

study = Study.open(profile, seed, results_dir, overrides)
measured = results.update(study, [seed] if seeds is None else seeds)
say(f"{len(measured)} measurements of seeds {', '.join(map(str, results.seeds_of(measured)))}.")

# %% [markdown]
# ## Tables, claims, figures
#
# Everything from here on is made from `measurements.csv` (and `tables/efficiency.csv` for C10).
# First the study in one figure: what ALLO changes on every data set, relative to DPO.

# %%
written = report.rebuild(study.results_dir)
pictures = [path for path in written if path.suffix == ".png"]
for path in [path for path in pictures if path.stem == "relative_change"]:
    display(Image(filename=str(path), width=860))
    say(f"*{report.caption_of(path)}*")

# %% [markdown]
# The paper's tables, its number beside ours (bold: best of a column, underlined: second best, as the
# paper marks them; an empty cell has its reason below the table), and all comparisons.

# %%
for path in sorted(study.results_dir.glob("tables/*.md")):
    display(Markdown(path.read_text(encoding="utf-8")))

# %% [markdown]
# ## Figures over all seeds

# %%
for path in [path for path in pictures if path.stem != "relative_change"]:
    display(Image(filename=str(path), width=760))
    say(f"*{report.caption_of(path)}*")

# %% [markdown]
# ## The claims

# %%
verdicts = claims.read(study.results_dir / "claims.csv")
table([{"id": c.id, "claim": c.claim, "effect": c.effect, "low": c.ci_low, "high": c.ci_high,
        "unit": c.unit, "verdict": c.verdict} for c in verdicts], "Effects are turned so that a "
      "positive one supports the claim. Evidence is in claims.csv.")
for claim in verdicts:
    say(f"- **{claim.id}: {claim.verdict}.** {claim.evidence}")

# %% [markdown]
# ## What the correction leaves

# %%
left = report.read_holm(study.results_dir / "tables" / "claims_holm.csv")
decided = [claim for claim in verdicts if claim.verdict != claims.INCONCLUSIVE]
for claim in decided:
    words = "keeps its verdict" if left[claim.id] == claim.verdict else "is inconclusive then"
    say(f"- {claim.id} ({claim.verdict}) {words}.")
if not decided:
    say("No claim was decided, so there is nothing to correct.")

# %% [markdown]
# ## Where the two protocols disagree

# %%
disagreements = claims.protocol_disagreements(verdicts)
for text in disagreements:
    say(f"- {text}")
if not disagreements:
    say("The paper's protocol (one rate for all masks) and the fair one (each mask at its own best "
        "rate) lead to the same verdicts here.")
