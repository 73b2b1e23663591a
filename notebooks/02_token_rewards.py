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
# # 02 Token rewards: which tokens of a rejected response are wrong
#
# **Question.** A rejected response is not wrong everywhere. Which of its tokens should be unlearned?
# ALLO uses a *rewriting* reward model (RLMEC, [arXiv 2401.06081](https://arxiv.org/abs/2401.06081)):
# a model trained to turn question $x$, correct solution $s$ and wrong prediction $\hat y$ into the
# minimally corrected prediction. The probability it gives to the tokens of $\hat y$ itself,
# $$p_t = P_\text{RM}(\hat y_t \mid x, s, \hat y, \hat y_{<t}),$$
# is low where it would write something else. Weights for forgetting, $w_t$:
# `threshold` $\mathbb 1[p_t < 0.5]$ (default, the paper's figure), `soft` $1 - p_t$, `released` $p_t$
# (what the released code feeds to its loss: it would forget the *good* tokens most).

# %% tags=["parameters"]
profile = "tiny"  # name, or path of a YAML file
seed = 0
results_dir = ""  # "" is results/<profile>
overrides = {}  # profile keys to change, dotted: {"domains.miniature.epochs": 2}

# %%
import torch

from allo_lib import analysis, figures, methods, parallel, stats, token_pictures, warning_signs
from allo_lib.notebook import html, percent, say, show, table, warn
from allo_lib.study import Study
from allo_lib.token_rewards import key_tokens, unaligned_weights

study = Study.open(profile, seed, results_dir, overrides)

# %% [markdown]
# The three rules on one small tensor of probabilities:

# %%
probs, inside = torch.tensor([[0.99, 0.60, 0.10, 0.95]]), torch.ones(1, 4, dtype=torch.bool)
for rule in ("threshold", "soft", "released"):
    print(rule, unaligned_weights(probs, inside, rule))

# %% [markdown]
# ## Training the rewriter
#
# It starts from the SFT model and learns from the pairs of the split `mask`, which no compared
# method is trained on. The corrections are minimal edits: the generator of the miniature makes them
# exactly; for multiple choice the final answer is replaced by the gold one. Human preference pairs
# have no gold answer: there the chosen reply takes the place of both solution and correction.

# %%
for name in study.profile.domains:
    record = study.reward_model(name).json()
    figure = figures.loss_curves({"rewriter": [record["loss"]]}, title=f"reward model, {name}")
    show(figure, study, f"02_rewriter_{name}",
         f"Training loss of the rewriting reward model on {record['examples']} corrections ({name}).")

# %% [markdown]
# ## What it says of real responses

# %%
for name in study.profile.domains:
    values = study.keep_probabilities(name, "heldout")
    rows = analysis.picture_rows(study, name, values, "heldout", 3)
    html(token_pictures.token_rewards_html(rows, label="p_t", reverse=True))
    show(token_pictures.token_rewards_picture(rows, label="p_t", reverse=True), study, f"02_tokens_{name}",
         f"Held-out rejected responses of {name}, tokens coloured by the rewriter's probability.")
    chosen = analysis.selected_share(study, name, "trained")
    say(f"**{name}**: the threshold rule selects {percent(chosen)} of the rejected tokens of the "
        "training pairs.")
    allo = methods.stages_of("allo", study.profile)[0]
    warn(warning_signs.no_choice_of_tokens(study.forgetting_weights(name, allo)))

# %% [markdown]
# ## Does it find the wrong decisions?
#
# The generator of the miniature knows which words are wrong decisions in themselves. So the reward
# model can be graded, and so can worse ones: untrained, stopped early, trained on shuffled targets.

# %%
for name in study.profile.domains:
    if study.domain(name).kind == "miniature":
        grades = [analysis.separation(study, name, quality)
                  for quality in ("trained", "early", "shuffled", "untrained")]
        table(grades, "auc: chance that a wrong decision gets a lower probability than another token "
              "(0.5 is guessing); selected: share of tokens below the threshold; found: share of the "
              "wrong decisions among them. Held-out pairs.")

# %% [markdown]
# ## DPO's own token rewards
#
# Learning (04) chooses tokens by another reward: DPO's, $\beta\,\Delta_t$ with
# $\Delta_t = \log\pi_\theta(y_t) - \log\pi_\text{ref}(y_t)$. The *key tokens* are the share
# $\epsilon$ of a rejected response with the lowest $\Delta_t$. On a small tensor:

# %%
ratio = torch.tensor([[0.1, -2.0, 0.3, -0.5, 0.0]])
print(key_tokens(ratio, torch.ones(1, 5, dtype=torch.bool), share=0.4))

# %% [markdown]
# How few tokens carry DPO's message? The curve shows which share of the negative log-ratio sits in
# the lowest tokens. If it all sat in one token, choosing tokens could not matter.

# %%
parallel.run_methods(study, {name: ["dpo_long"] for name in study.profile.domains})
for name in study.profile.domains:
    ratios = analysis.log_ratios(study, name, "dpo_long", "heldout")
    held = analysis.concentration_of(ratios)
    curve = stats.concentration([value for row in ratios for value in row])
    show(figures.concentration_curve({name: curve}, mark=analysis.LOWEST), study,
         f"02_concentration_{name}", "Share of the negative log-ratio of held-out rejected "
         "responses that the lowest tokens hold, after DPO as long as both stages of ALLO.")
    say(f"**{name}**: the lowest {percent(analysis.LOWEST, 0)} of all rejected tokens hold "
        f"{percent(held['pooled'])}; counted within each response {percent(held['per_response'])}.")

# %%
for name in study.profile.domains:
    ratios = analysis.log_ratios(study, name, "dpo_long", "heldout")
    rows = analysis.picture_rows(study, name, ratios, "heldout", 3)
    figure = token_pictures.token_rewards_picture(rows, label="log-ratio", reverse=True, limits=(-1.0, 0.0))
    show(figure, study, f"02_dpo_tokens_{name}",
         f"The same responses coloured by DPO's log-ratio: what plain DPO made less likely ({name}).")
