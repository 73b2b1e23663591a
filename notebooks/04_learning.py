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
# # 04 Learning: DPO on key tokens, and ALLO is the result
#
# **Question.** After forgetting, what is there to learn? ALLO's second stage is DPO from the
# forgetting checkpoint (which is also its reference). The chosen response counts with all its tokens,
# the rejected one with its *key tokens* $K$ only, the share $\epsilon$ with the lowest log-ratio:
# $$\mathcal L = -\log\sigma\Big(\beta\Big[\sum_t \Delta^+_t - \sum_{t\in K}\Delta^-_t\Big]\Big),\qquad
# \Delta_t = \log\pi_\theta(y_t) - \log\pi_\text{ref}(y_t).$$
# Only the key neurons move. With $K$ the whole response this is DPO.

# %% tags=["parameters"]
profile = "tiny"  # name, or path of a YAML file
seed = 0
results_dir = ""  # "" is results/<profile>
overrides = {}  # profile keys to change, dotted: {"domains.miniature.epochs": 2}

# %%
import math

import torch

from allo_lib import analysis, figures, parallel, results, token_pictures, warning_signs
from allo_lib.losses import dpo_loss, token_dpo_loss
from allo_lib.notebook import html, methods_table, percent, say, show, table, warn
from allo_lib.study import Study

study = Study.open(profile, seed, results_dir, overrides)

# %% [markdown]
# With both masks whole the loss equals DPO's; at the reference it is $\ln 2$.

# %%
torch.manual_seed(0)
ratios, whole = torch.randn(2, 3, 6), torch.ones(3, 6, dtype=torch.bool)
sums, zero = ratios.sum(dim=2), torch.zeros(3)
print(token_dpo_loss(*ratios, whole, whole), dpo_loss(*sums, zero, zero))
print(float(dpo_loss(zero, zero, zero, zero)[0]), math.log(2))

# %% [markdown]
# ## Both stages, searched together
#
# ALLO gets as many trained models as every other method; the table lists the rates of both stages
# that were tried. Its controls are DPO at one epoch (`dpo`) and at as many updates as
# both stages together (`dpo_long`), learning alone with as many updates (`allo_no_forgetting`), and
# ALLO whose learning uses all tokens of the rejected response (`allo_all_tokens_learning`).

# %%
others = ("allo_no_forgetting", "allo_all_tokens_learning")
controls = {name: ["sft_base", "dpo", "dpo_long", "allo",
                   *(m for m in others if m in results.methods_of(study, name))]
            for name in study.profile.domains}
found = parallel.run_methods(study, controls)
for name in study.profile.domains:
    tried = found[name]["allo"]["tried"]
    table([{"forgetting rate": one["rates"][0], "learning rate": one["rates"][1], "dev": one["dev"],
            "displacement": one["displacement"], "margin": one["train_margin"]} for one in tried],
          f"{name}: all models of ALLO's search, scored on the development split.")

# %%
for name in study.profile.domains:
    losses = {m: [found[name][m]["loss"][-1]] for m in controls[name][2:]}
    show(figures.loss_curves(losses, title=f"learning stage, {name}"), study, f"04_learning_{name}",
         "Training loss by step of the learning stage and of its controls. "
         "The losses sum over different tokens: their levels compare only roughly.")

# %%
for name in study.profile.domains:
    methods_table(found[name], f"{name}: ALLO and its controls, test split, seed {seed}.")
    allo, dpo = (analysis.score_of(found[name][m])[0] for m in ("allo", "dpo_long"))
    say(f"**{name}**: ALLO {percent(allo)}, DPO with as many updates {percent(dpo)}: "
        f"{100 * (allo - dpo):+.1f} points on this seed. 06_evaluation has the interval.")
    (both, error), (start, error_start) = (
        analysis.score_of(found[name][m]) for m in ("allo", "sft_base"))
    warn(warning_signs.far_below(f"{name}, both stages of ALLO", both, start,
                                 math.hypot(error, error_start)))

# %% [markdown]
# ## What ALLO made less likely
#
# Held-out rejected responses, each token coloured by its log-ratio against the SFT model: white is
# as likely as before or more, full colour is a log-ratio of -1 or less.

# %%
for name in study.profile.domains:
    ratios = analysis.log_ratios(study, name, "allo", "heldout")
    rows = analysis.picture_rows(study, name, ratios, "heldout", 3)
    html(token_pictures.token_rewards_html(rows, label="log-ratio", reverse=True, limits=(-1.0, 0.0)))
    figure = token_pictures.token_rewards_picture(rows, label="log-ratio", reverse=True, limits=(-1.0, 0.0))
    show(figure, study, f"04_tokens_{name}", f"Log-ratio of ALLO against the SFT model ({name}).")
