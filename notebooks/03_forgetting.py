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
# # 03 Forgetting: unlearning the wrong tokens
#
# **Question.** Can the model be made to forget what is wrong before it learns what is right? ALLO's
# first stage is token-level NPO (Negative Preference Optimization,
# [arXiv 2404.05868](https://arxiv.org/abs/2404.05868)) on rejected responses only, with the weights
# $w_t$ of 02_token_rewards, and moves only the key neurons of 01_importance:
# $$\mathcal L_\text{NPO} = -\frac{2}{\beta}\,\frac{\sum_t w_t\,\log\sigma\!\big(-\beta\,
# [\log\pi_\theta(y^-_t) - \log\pi_\text{ref}(y^-_t)]\big)}{\#\{t: w_t \ne 0\}}.$$
# $\pi_\text{ref}$ is the SFT model. At the start $\theta = \theta_\text{ref}$ and every term is
# $\log\tfrac12$.

# %% tags=["parameters"]
profile = "tiny"  # name, or path of a YAML file
seed = 0
results_dir = ""  # "" is results/<profile>
overrides = {}  # profile keys to change, dotted: {"domains.miniature.epochs": 2}

# %%
import math

import torch

from allo_lib import analysis, figures, parallel, results, warning_signs
from allo_lib.losses import npo_loss
from allo_lib.notebook import methods_table, say, show, warn
from allo_lib.study import Study

study = Study.open(profile, seed, results_dir, overrides)

# %% [markdown]
# The first loss is known beforehand: $(2/\beta)\ln 2$, whatever the model.

# %%
logps, weights = torch.randn(2, 5), torch.tensor([[0.0, 1, 1, 0, 1], [0, 0, 1, 1, 1]])
print(float(npo_loss(logps, logps, weights, beta=0.1)), 2 / 0.1 * math.log(2))

# %% [markdown]
# ## Forgetting alone, and as the first of two stages
#
# The rates of both stages are searched together (04_learning); forgetting alone gets a search and as
# many updates of its own. The control whose forgetting weighs all tokens alike tells whether choosing
# them matters.

# %%
here = ("allo", "allo_all_tokens_forgetting", "allo_no_learning")
beside = ("allo_no_forgetting", "allo_all_tokens_learning")  # of 04_learning: no core stays idle
found = parallel.run_methods(study, {
    name: ["sft_base", *(m for m in (*here, *beside) if m in results.methods_of(study, name))]
    for name in study.profile.domains})
for name in study.profile.domains:
    found[name] = {m: found[name][m] for m in ("sft_base", *here) if m in found[name]}
    losses = {f"first stage of {m}": [one["loss"][0]] for m, one in found[name].items() if one["loss"]}
    figure = figures.loss_curves(losses, title=f"forgetting, {name}", ylabel="NPO loss")
    show(figure, study, f"03_forgetting_{name}",
         f"Loss of the forgetting stage of {name}; it starts at 2/beta ln 2 = "
         f"{2 / study.profile.method.beta * math.log(2):.2f}.")

# %% [markdown]
# ## What it does to the model
#
# If forgetting alone fell far below the SFT model, the stage would be doing harm. Where it was not
# run by itself, only both stages together can be shown.

# %%
for name in study.profile.domains:
    methods_table(found[name], f"{name}: the SFT model, ALLO (both stages), ALLO whose forgetting "
                  "takes all tokens, and forgetting alone, where they were run.")

# %%
for name in study.profile.domains:
    last = "allo_no_learning" if "allo_no_learning" in found[name] else "allo"
    (start, error), (alone, error_alone) = (
        analysis.score_of(found[name][m]) for m in ("sft_base", last))
    change, noise = alone - start, math.hypot(error, error_alone)
    word = "above" if change > 2 * noise else "below" if change < -2 * noise else "no different from"
    say(f"**{name}**: {last} ends {word} the SFT model ({100 * change:+.1f} points, standard "
        f"error of the difference at most {100 * noise:.1f}).")
    warn(warning_signs.far_below(f"{name}, {last}", alone, start, noise))

# %% [markdown]
# ## Which tokens it pushed down
#
# The mean change of the log-probability of rejected training tokens, selected ($w_t \ne 0$) against
# the others, under forgetting alone (or both stages, where that was not run).

# %%
from allo_lib.methods import stages_of

for name in study.profile.domains:
    last = "allo_no_learning" if "allo_no_learning" in found[name] else "allo"
    ratios = analysis.log_ratios(study, name, last)
    stage = stages_of(last, study.profile)[0]
    chosen = study.forgetting_weights(name, stage)
    groups = {True: [], False: []}
    for row, weights in zip(ratios, chosen, strict=True):
        for value, weight in zip(row, weights, strict=True):
            groups[weight != 0].append(value)
    means = {key: sum(values) / max(1, len(values)) for key, values in groups.items()}
    say(f"**{name}**, {last}: selected tokens changed by {means[True]:+.3f} on average "
        f"({len(groups[True])} tokens), the others by {means[False]:+.3f} ({len(groups[False])}).")
