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
# **Question.** If most neurons are redundant, is training the rest cheaper? (claim C10)
#
# The released code keeps dense moments and multiplies the update by a dense mask: that saves nothing. Here
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
# So memory is where a mask saves. Arithmetic it hardly saves: the forward pass and the gradient with respect to the
# activations are needed whatever is trained, and the gradient of scattered entries is a matrix product as of all.

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

import contextlib

from allo_lib.evaluation import claims
from allo_lib.evaluation.verdicts import RULE
from allo_lib.report import figures, report
from allo_lib.report.notebook import draw, percent, say, table
from allo_lib.study import efficiency, footprint
from allo_lib.study.efficiency import domain_of, workload
from allo_lib.study.study import Study

study = Study.open(profile, seed, results_dir, overrides)
name, pairs = domain_of(study), workload(study)
say(f"One step reads {len(pairs.rows)} pairs of {name}, {pairs.tokens / len(pairs.rows):.0f} tokens each, prompts counted once.")

# %% [markdown]
# ## The state of the optimizer, by hand
#
# At the profile's share the formula above gives what the optimizer should hold per weight; the measurement below must
# agree for `allo_scalar`. Whole rows need one index a row and not one an entry.

# %%
share = study.profile.method.share
by_hand = {"dense": 4 + 4 + 4, "allo_scalar": share * (4 + 4 + 12)}  # bytes a weight, in float32
print(by_hand)

# %% [markdown]
# ## Measured
#
# Each variant trains DPO on the same pairs, all of them in every step, every block of steps in a process of its own,
# the variants in turn; the numbers are medians over the blocks.
#
# | variant | what is measured |
# | --- | --- |
# | `dense_masked` | **the baseline**: the released code's way, dense AdamW and a dense mask |
# | `dense` | AdamW on all neurons |
# | `allo_scalar`, `allo_row` | this project's masked AdamW, on scalar neurons and on whole rows |
# | `trl_best` | TRL's DPOTrainer, its reference computed before, no checkpointing |
# | `peft` | as `trl_best`, with as many trained values as `allo_scalar`, by LoRA |
#
# The first four share this project's forward pass; TRL's are measured where they are installed and the profile asks.
# The **floor** is what a step would take if all its matrix products ran at the rate of a large one; what is above it is
# memory traffic, small products, and everything that is no product.

# %%
with contextlib.redirect_stdout(sys.__stdout__):  # a line a block, for the terminal alone
    rows = efficiency.measure(study)
efficiency.write(rows, study.results_dir / "tables" / "efficiency.csv")  # times differ from run to run: not in measurements.csv
BASELINE = "dense_masked"
ratios = {row["variant"]: [efficiency.ratio(rows, row["variant"], BASELINE, column) for column in
                           ("seconds_per_pair", "peak_bytes_above_model", "state_bytes_per_parameter")] for row in rows}
table([{"variant": row["variant"], "milliseconds a pair": 1e3 * float(row["seconds_per_pair"]),
        **dict(zip(("time", "peak memory", "optimizer state"), ratios[row["variant"]], strict=True)),
        "of its time at the floor": percent(float(row["floor_seconds_per_pair"]) / float(row["seconds_per_pair"]), 0)}
       for row in rows], f"Time, memory above the loaded model, and state over those of `{BASELINE}`; {rows[0]['device']}.")
if str(study.dtype).endswith("float32"):
    state = {row["variant"]: float(row["state_bytes_per_parameter"]) for row in rows}
    assert all(abs(state[variant] - value) < 0.01 * value for variant, value in by_hand.items()), (state, by_hand)
time, memory, held = ratios["allo_scalar"]
say(f"**Against `{BASELINE}`, ALLO's masked step takes {time:.2f} times the time, {memory:.2f} times the peak memory "
    f"and {held:.2f} times the optimizer's state.**")

# %%
draw(figures.efficiency_bars(rows, title=f"cost of a DPO step, {name}"),
     "Time per pair (median, the floor of the counted operations as a line), peak memory above the process "
     "with the model loaded, and bytes of optimizer state per model parameter.")

# %% [markdown]
# ## How large a model fits?
#
# Counted: weights and state from the shape of the model, activations by adding up what autograd keeps of a
# forward pass on tensors without memory. The most is in use either where backward begins, with all activations,
# or where it ends, with all gradients of kept entries. Where the study runs on a GPU that has the memory, the
# peak of a few steps on random weights is measured beside it. One pair of 512 tokens at a time (a prompt of
# 128, two responses of 192), bf16 weights, no activation checkpointing; more pairs come by accumulation.

# %%
fits = footprint.of_known_models([0.05, 0.1, 1.0], prompt=128, response=192, device=study.device)
efficiency.write(fits, study.results_dir / "tables" / "footprint.csv", footprint.COLUMNS)
sizes = [{key: value for key, value in row.items() if value not in (None, "")} for row in footprint.in_gigabytes(fits)]
table(sizes, "GB of a step of a masked stage at its peak, by what they are for. Kept 1 is all neurons.")

# %% [markdown]
# Finding the neurons first needs their scores: the accumulated $|\nabla|$ takes 4 bytes a weight, which lie on the
# host, while the difference of a dense DPO run needs all of the dense state. `align` takes the first way, and trains its
# reward model on kept neurons too, with `{"estimator": "gradient", "rewriter_neurons": "kept"}`.
#
# ## C10
#
# Decided by Student's t over the blocks, each beside the baseline's of the same turn.

# %%
if (study.results_dir / "measurements.csv").is_file():
    report.rebuild(study.results_dir, study.profile.to_dict())  # claims, tables and report, now with these numbers
    for claim in claims.read(study.results_dir / "claims.csv"):
        if claim.id.startswith("C10"):
            say(f"**{claim.id}: {claim.verdict}.** {claim.evidence}")
    say(RULE)
else:
    say("No `measurements.csv` yet: run 06_evaluation to make the claims.")

# %% [markdown]
# ## What it means
#
# A mask makes the optimizer's state small: that decides whether a model fits, not how fast it trains. Where the floor
# is a small part of the time, as on the miniature, seconds say little of a large model. Whole rows save arithmetic; what
# they lose in quality is the row `dpo_top10_rows` of 06, where a profile trains it.
#
# This is the last notebook. To use the method on a model of your own, go on with
# [docs/align.md](../docs/align.md); what was found over all profiles is in [README](../README.md).
