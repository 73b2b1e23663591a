# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 07 Efficiency: what a step costs
#
# **Question.** If most neurons are redundant, is training the rest cheaper? (C10) The released code
# keeps dense moments and multiplies the update by a dense mask: it saves nothing. Here the optimizer
# holds state for kept entries only. With $k$ the kept share of all float32 weights, bytes per weight are
# $$\underbrace{4 + 4 + 4}_{\text{gradient, two moments}} = 12 \;\text{ (dense)},\qquad
# k\,(\underbrace{4}_{\text{index}} + \underbrace{4}_{\text{master}} + \underbrace{12}_{\text{gradient,
# moments}}) = 20\,k\;\text{ (masked)}.$$
#
# Each variant trains DPO on the same pairs, every block of steps in a process of its own, the variants
# in turn; medians over the blocks are shown with their range. Times and memory are measurements of this
# machine at this moment: they are in `tables/efficiency.csv`, not in `measurements.csv`, so that the
# latter stays the same to the byte from run to run.

# %% tags=["parameters"]
profile = "tiny"  # name, or path of a YAML file
seed = 0
results_dir = ""  # "" is results/<profile>
overrides = {}  # profile keys to change, dotted: {"domains.miniature.epochs": 2}
seeds = None  # not read here; run_all.sh gives it to the last two notebooks alike

# %%
from allo_lib import claims, efficiency, figures, report
from allo_lib.notebook import say, show, table
from allo_lib.study import Study

study = Study.open(profile, seed, results_dir, overrides)
name = next(iter(study.profile.domains))
rows = efficiency.measure(study, name)
efficiency.write(rows, study.results_dir / "tables" / "efficiency.csv")
table(rows, f"Cost of a DPO step on {name}: `dense` AdamW, the released code's dense mask, this "
      "project's masked AdamW on scalar neurons and on whole rows, both at the profile's share.")

# %%
show(figures.efficiency_bars(rows, title=f"cost of a DPO step, {name}"), study, "07_efficiency",
     "Time per pair (median), peak memory above the process with the model loaded, and bytes of "
     "optimizer state per model parameter.", every_seed=True)

# %%
for variant in ("allo_scalar", "allo_row"):
    ratios = {column: efficiency.ratio(rows, variant, "dense_masked", column)
              for column in ("seconds_per_pair", "peak_bytes_above_model", "state_bytes_per_parameter")}
    say(f"**{variant}** against the dense mask: time {ratios['seconds_per_pair']:.2f}, peak memory "
        f"{ratios['peak_bytes_above_model']:.2f}, optimizer state "
        f"{ratios['state_bytes_per_parameter']:.2f} times as much.")

# %% [markdown]
# ## C10 and the report
#
# The claims, the tables and `report.html` are made again, now with these numbers.

# %%
if (study.results_dir / "measurements.csv").is_file():
    report.rebuild(study.results_dir)
    for claim in claims.read(study.results_dir / "claims.csv"):
        if claim.id.startswith("C10"):
            say(f"**{claim.id}: {claim.verdict}.** {claim.evidence}")
else:
    say("No `measurements.csv` yet: run 06_evaluation to make the claims.")
