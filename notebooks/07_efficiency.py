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
# # 07 Efficiency: what a step costs
#
# **Question.** If most neurons are redundant, is training the rest cheaper? (C10) The released code
# keeps dense moments and multiplies the update by a dense mask: it saves nothing. Here
#
# - the optimizer holds state for kept entries only. With $k$ the kept share of all float32 weights, bytes
#   per weight are
#   $$\underbrace{4 + 4 + 4}_{\text{gradient, two moments}} = 12 \;\text{ (dense)},\qquad
#   k\,(\underbrace{4}_{\text{index}} + \underbrace{4}_{\text{master}} + \underbrace{12}_{\text{gradient,
#   moments}}) = 20\,k\;\text{ (masked)};$$
# - a dense gradient lives only until its kept entries are gathered, one parameter's at a time, and of whole
#   rows no other gradient is made;
# - the prompt is read once for both responses, and what begins alike is read once;
# - the language-model head runs on response positions only, in chunks, its log-sum-exp kept and its logits
#   made again in backward;
# - the reference model's log-probs are computed once and kept.
#
# Each variant trains DPO on the same pairs, all of them in every step, every block of steps in a process of
# its own, the variants in turn; medians over the blocks are shown with their range, and C10 is decided by
# Student's t over the blocks, each beside the other variant's of the same turn. Times and memory are
# measurements of this machine at this moment: they are in `tables/efficiency.csv`, not in
# `measurements.csv`, so that the latter stays the same to the byte from run to run.
#
# Where they are installed and the profile asks for them, other ways are measured, all by TRL's DPOTrainer:
# `trl_default`; `trl_best` (reference computed before, no checkpointing); and as that, with PEFT's adapters of as
# many trained values as `allo_scalar` has, `peft` (LoRA) and `peft_supertuning` (the largest entries of each
# linear layer, in a dense copy of it). Where weights are bfloat16, TRL keeps no float32 masters, and its moments
# are bfloat16, too.
#
# The **floor** is what a step would take if all its matrix products ran at the rate of a large one: the
# operations counted in one step over the rate measured in the same process. What is above it is memory
# traffic, small products, and everything that is no product.

# %% tags=["parameters"]
profile = "tiny"  # name, or path of a YAML file
seed = 0
results_dir = ""  # "" is results/<profile>
overrides = {}  # profile keys to change, dotted: {"domains.miniature.epochs": 2}
seeds = None  # not read here; run_all.sh gives it to the last two notebooks alike

# %%
import sys
from pathlib import Path

# The repository, wherever in it the notebook runs.
sys.path[:0] = [str(p) for p in (Path.cwd(), *Path.cwd().parents) if (p / "allo_lib").is_dir()][:1]

import math

from allo_lib.evaluation import claims
from allo_lib.evaluation.verdicts import RULE
from allo_lib.report import ablation_figures, figures, report
from allo_lib.report.notebook import percent, say, show, table
from allo_lib.study import analysis, efficiency, footprint, runs
from allo_lib.study.efficiency import domain_of, workload
from allo_lib.study.study import Study

study = Study.open(profile, seed, results_dir, overrides)
name = domain_of(study)
pairs = workload(study)
print(f"{len(pairs.rows)} pairs of {name} a step, {pairs.tokens / len(pairs.rows):.0f} tokens each, "
      "prompts counted once")
rows = efficiency.measure(study)
efficiency.write(rows, study.results_dir / "tables" / "efficiency.csv")
table(rows, f"Cost of a DPO step on {name}. `dense`: AdamW on all neurons; `dense_masked`: the released "
      "code's dense mask; `allo_scalar`, `allo_row`: this project's masked AdamW on scalar neurons and on "
      "whole rows, at the profile's share, all four with this project's forward pass. The others are TRL's.")

# %%
show(figures.efficiency_bars(rows, title=f"cost of a DPO step, {name}"), study, "07_efficiency",
     "Time per pair (median, the floor of the counted operations as a line), peak memory above the process "
     "with the model loaded, and bytes of optimizer state per model parameter.", every_seed=True)

# %%
compared = [("allo_scalar", "dense_masked"), ("allo_row", "dense_masked"), ("allo_row", "allo_scalar"),
            ("allo_scalar", "trl_best"), ("allo_scalar", "trl_default"), ("allo_scalar", "peft"),
            ("allo_scalar", "peft_supertuning")]
for first, second in compared:
    ratios = [efficiency.ratio(rows, first, second, column)
              for column in ("seconds_per_pair", "peak_bytes_above_model", "state_bytes_per_parameter")]
    if not all(map(math.isnan, ratios)):
        say(f"**{first}** against {second}: time {ratios[0]:.2f}, peak memory {ratios[1]:.2f}, optimizer "
            f"state {ratios[2]:.2f} times as much.")
for row in rows:
    share = float(row["floor_seconds_per_pair"]) / float(row["seconds_per_pair"])
    say(f"{row['variant']}: {percent(share, 0)} of its time is the floor.")

# %% [markdown]
# ## What do whole rows cost in quality?
#
# Rows save arithmetic, but a row is kept or left as a whole. The curve of 05_ablations, of what this
# seed has trained: score after DPO against the counted operations of a step.

# %%
measured = study.results_dir / "measurements.csv"
for name in study.profile.domains if measured.is_file() else ():
    series = analysis.quality_and_cost(study, name, runs.trained_before(study, name))
    if len(series) < 2:
        say(f"{name}: no curve, as rows and scalars were not both trained.")
        continue
    show(ablation_figures.quality_against_cost(series, title=name), study, f"07_quality_{name}",
         f"Score after DPO on the top share of neurons of {name}, scalar entries and whole rows, against the "
         f"counted operations of a step; bars are 95% intervals over problems, seed {study.seed}.")

# %% [markdown]
# ## How large a model fits?
#
# Counted: weights and state from the shape of the model, activations by adding up what autograd keeps of a
# forward pass on tensors without memory. The most is in use either where backward begins, with all activations,
# or where it ends, with all gradients of kept entries. Where the study runs on a GPU that has the memory, the
# peak of a few steps on random weights is measured beside it. One pair of 512 tokens at a time (a prompt of
# 128, two responses of 192), bf16 weights, no activation checkpointing; more pairs come by accumulation.
# Finding the neurons first needs their scores: the accumulated $|\nabla|$ takes 4 bytes a weight, which lie on the
# host, while the delta of a dense DPO run needs all of the dense state. `align` takes the first way, and
# trains its reward model on kept neurons too, with `{"estimator": "gradient", "rewriter_neurons": "kept"}`.

# %%
fits = footprint.of_known_models([0.05, 0.1, 1.0], prompt=128, response=192, device=study.device)
efficiency.write(fits, study.results_dir / "tables" / "footprint.csv", footprint.COLUMNS)
table(footprint.in_gigabytes(fits), "GB of a step of a masked stage at its peak, by what they are for, and the "
      "measured peak with its ratio to all of them. The last share is all neurons.")

# %% [markdown]
# ## C10 and the report
#
# The claims, the tables and `report.html` are made again, now with these numbers.

# %%
if measured.is_file():
    report.rebuild(study.results_dir, models=study.profile.models)
    say(RULE)
    for claim in claims.read(study.results_dir / "claims.csv"):
        if claim.id.startswith("C10"):
            say(f"**{claim.id}: {claim.verdict}.** {claim.evidence}")
else:
    say("No `measurements.csv` yet: run 06_evaluation to make the claims.")
