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
# `outcomes.parquet`, never typed in, by the rule that is printed above them.
#
# Of many comparisons some come out by chance. With $k$ of them and $p_{(1)} \le \dots \le p_{(k)}$, Holm's
# method adjusts $\tilde p_{(i)} = \max_{j \le i} \min(1, (k - j + 1)\, p_{(j)})$: keeping only verdicts with
# $\tilde p < 0.05$, the chance that even one of a family is wrong is at most 5%. Only verdicts after this
# correction are shown; the table `verdicts` has the p-values before and after.

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

from allo_lib.evaluation import claims, measurements
from allo_lib.evaluation.verdicts import RULE
from allo_lib.report import report
from allo_lib.report.notebook import say, table
from allo_lib.report.row_comparisons import with_tags
from allo_lib.study import results
from allo_lib.study.study import Study

study = Study.open(profile, seed, results_dir, overrides)
measured = results.update(study, [seed] if seeds is None else seeds)
say(f"{len(measured)} measurements of seeds {', '.join(map(str, measurements.seeds_of(measured)))}.")

# %% [markdown]
# ## Tables, claims, figures
#
# Everything from here on is made from `outcomes.parquet` and `measurements.csv` (and `tables/efficiency.csv` for C10).
# First the study in one figure: what ALLO changes on every data set, relative to DPO.

# %%
written = report.rebuild(study.results_dir, models=study.profile.models)
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
say(RULE)
verdicts = claims.read(study.results_dir / "claims.csv")
table([{"id": c.id, "claim": c.claim, "effect": c.effect, "low": c.ci_low, "high": c.ci_high,
        "unit": c.unit, "verdict": with_tags(c.verdict, c.tags)} for c in verdicts],
      "Effects are turned so that a positive one supports the claim. Evidence is in claims.csv.")
for claim in verdicts:
    say(f"- **{claim.id}: {claim.verdict}.** {claim.evidence}")

# %% [markdown]
# ## Where the two protocols disagree

# %%
disagreements = claims.protocol_disagreements(verdicts)
for text in disagreements:
    say(f"- {text}")
if not disagreements:
    say("The paper's protocol (one rate for all masks) and the fair one (each mask at its own best "
        "rate) lead to the same verdicts here.")
