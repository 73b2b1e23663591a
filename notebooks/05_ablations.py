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
# # 05 Ablations: which part of the method does the work
#
# **Question.** ALLO has a mask (01), a choice of tokens by a reward model (02), two stages (03, 04) and two
# learning rates. What happens when one of them is changed and the rest is kept?
#
# 1. How many neurons have to be trained?
# 2. Does forgetting before learning help? (claim C6)
# 3. Does it matter which tokens are forgotten and learned from? (C7)
# 4. Does a better reward model give a better ALLO? (C9)
# 5. How far can the learning rates be off?
#
# Rates of a changed method are found by ALLO's rule; with another reward model, share or detail of the official
# code they are, or start from, ALLO's own. It makes as many updates as ALLO, but where all wrong samples are
# forgotten, which are more than the pairs. With $a_i$ and $b_i$ saying (1 or 0) whether the changed method and
# ALLO are right on problem $i$ of $n$, the effect of the change is
# $$\hat\delta = \frac{1}{n}\sum_{i=1}^{n} (a_i - b_i).$$
# So a part that is *left of zero* when it is changed had helped. Intervals are 95%, over the problems of one
# trained model: they say nothing of other models. All models together are in 06_evaluation.

# %% tags=["parameters"]
profile = "tiny"  # name, or path of a YAML file
seed = 0
domain = ""  # one of the profile's domains; "" is its first
results_dir = ""  # "" is results/<profile>
overrides = {}  # profile keys to change, dotted: {"domains.miniature.epochs": 2}

# %%
import sys
from pathlib import Path

# The repository, wherever in it the notebook runs.
sys.path[:0] = [str(p) for p in (Path.cwd(), *Path.cwd().parents) if (p / "allo_lib").is_dir()][:1]

from allo_lib.evaluation import claims
from allo_lib.evaluation.published import method_label
from allo_lib.profiles.methods import share_name
from allo_lib.report import figures, method_figures
from allo_lib.report.notebook import draw, percent, say, table
from allo_lib.study import importance, runs, scoring
from allo_lib.study.study import Study

study = Study.open(profile, seed, results_dir, overrides)
domain = runs.chosen_domain(study, domain)
found = runs.run_methods(study, {domain: runs.methods_of(study, domain)})[domain]
unit, here = scoring.unit(found["allo"]), f"{domain}, seed {seed}"
scores = {method: scoring.score_of(one) for method, one in found.items()}  # (score, standard error)
dpo = "dpo_long" if "dpo_long" in found else "dpo"  # DPO with as many updates as ALLO
say(f"{len(found)} methods of {here}. **ALLO {percent(scores['allo'][0])}, {method_label(dpo)} {percent(scores[dpo][0])}** ({unit}).")


# %% [markdown]
# One function draws the answers to 2 and 3: of each changed method the paired difference to ALLO.

# %%
def against_allo(methods: list[str], caption: str) -> None:
    """Those of the methods that this profile trains, minus ALLO on the same problems."""
    effects = {method: scoring.difference(found[method], found["allo"]) for method in methods if method in found}
    if not effects:
        say(f"Profile {study.profile.name} trains none of these on {domain}: {', '.join(methods)}.")
        return
    draw(figures.ablation_bars(effects, unit, here), caption)
    worse = [method_label(method) for method, one in effects.items() if one.high < 0]
    better = [method_label(method) for method, one in effects.items() if one.low > 0]
    alike = [method_label(method) for method, one in effects.items() if not (one.high < 0 or one.low > 0)]
    say(f"**On these problems below ALLO: {', '.join(worse) or 'none'}; above it: {', '.join(better) or 'none'}; "
        f"not told apart from it: {', '.join(alike) or 'none'}.**")


# %% [markdown]
# ## 1. How many neurons have to be trained?
#
# Plain DPO on the top share of the neurons by the scores of 01, each share at the best of its own search. The
# dashed line is the SFT model.

# %%
shares = [share for share in sorted(study.profile.method.shares) if share_name(share) in found]
curve = [scores[share_name(share)] for share in shares]
start = scores.get("sft_base")
if len(shares) > 1:
    drawn = method_figures.share_sweep(dict(zip(shares, curve, strict=True)), start and ("SFT model", start[0]),
                                      title=here, ylabel=f"{unit} (%)")
    draw(drawn, "DPO by the share of neurons that it trains; bars are 95% intervals.")
    within = [share for share, (value, error) in zip(shares, curve, strict=True) if value + 2 * error >= max(curve)[0]]
    say(f"**From {percent(min(within), 0)} of the neurons on, the score is within two standard errors of the best, "
        f"{percent(max(curve)[0])}.**")
else:
    say(f"Profile {study.profile.name} trains one share only on {domain}.")

# %% [markdown]
# ## 2. Does forgetting before learning help? (C6)
#
# Each stage alone for as many updates as both, and the stages the other way round.

# %%
against_allo(["allo_no_forgetting", "allo_no_learning", "allo_reversed"],
             "One stage alone, or the two in another order, minus ALLO.")

# %% [markdown]
# ## 3. Does it matter which tokens? (C7)
#
# Forgetting weighs a rejected token by $w_t = 1[p_t < 0.5]$; here also by $1 - p_t$, by $p_t$ as the released code
# does, or all alike. Learning takes the share $\varepsilon$ of tokens with the lowest log-ratio; here also all of
# them. Random tokens are as many as ALLO's, oracle tokens are the generator's.

# %%
against_allo(["allo_all_tokens_forgetting", "allo_all_tokens_learning", "allo_random_tokens", "allo_oracle_tokens",
              "allo_rm_inverted", "allo_soft", "allo_released"], "ALLO with other tokens, minus ALLO.")

# %% [markdown]
# ## 4. Does a better reward model give a better ALLO? (C9)
#
# The same ALLO whose tokens were chosen by worse rewriters (untrained, trained on a quarter of the corrections, trained on
# corrections of other questions) and by the oracle, the generator itself. How good a rewriter is, is measured on
# held-out pairs: the chance that a wrong decision gets a lower $p_t$ than another token (the area under the ROC
# curve; 0.5 is guessing). If the choice of tokens carried the method, the points would rise to the right.

# %%
points = importance.reward_points(study, domain, found)  # none where nobody knows the wrong tokens
if len(points) > 1:
    controls = {"allo_all_tokens_forgetting": "forgetting all tokens", "allo_no_forgetting": "learning alone"}
    levels = {text: scores[method][0] for method, text in controls.items() if method in found}
    drawn = method_figures.reward_quality(points, levels, here, ylabel=f"{unit} (%)")
    draw(drawn, "ALLO by how well its reward model finds wrong tokens; bars are 95% intervals.")
    slope, low, high = method_figures.slope_of(points)
    say(f"**A reward model better by 0.1 of the area changes ALLO by {slope / 10:+.1f} points [{low / 10:+.1f}, {high / 10:+.1f}]** "
        "(line through the points, as if their errors were independent).")
else:
    others = [method for method in claims.REWARD_MODELS if method != "allo"]
    against_allo(others, "ALLO with other reward models, minus ALLO.")

# %% [markdown]
# ## 5. How far can the learning rates be off?
#
# All models that were trained to find the rates of ALLO and DPO, scored on development questions; where a profile takes
# rates that were tuned before, the means over the models that they were tuned on. A method whose curve is flat forgives a wrong rate.
# ALLO's axis is the rate of forgetting; that of learning moves with it.

# %%
tried, problems = runs.tried(study, domain, {m: found[m] for m in (dpo, "allo")})
draw(method_figures.sweep_panels(tried, None, problems), f"Every model that was trained to find the rates; {here}.")
spread = {m: sorted(one["dev"] for one in records) for m, records in tried.items()}
say("**Development score from the worst to the best rate tried: " + "; ".join(
    f"{method_label(m)} {percent(values[0])} to {percent(values[-1])} ({len(values)} tried)" for m, values in spread.items()) + ".**")

# %% [markdown]
# ## What it means
#
# Read a part of ALLO that moves the score by less than its interval as *not shown to matter here*, not as useless:
# one trained model on one set of pairs cannot show more. Whether forgetting before learning helps, and whether the
# choice of tokens does, has to come from many models. Better tokens can be no help for a plain reason, too: a preference between whole responses already tells the
# model most of what single tokens would.
#
# Next: [06_evaluation](06_evaluation.ipynb) has all methods, all models, and the verdicts.
#
# ## Appendix: every change
#
# The table has all changed methods. Below it stand figures that only some studies need: each is drawn where the
# profile trains its methods (`-p ablations`; `allo_lib/profiles/methods.py` lists them).

# %%
changes = {m: scoring.difference(found[m], found["allo"]) for m in found if m.startswith("allo_") or m == dpo}
table([{"method": method, "": method_label(method), f"{unit} (%)": 100 * scores[method][0], "minus ALLO, points": 100 * one.effect,
        "low": 100 * one.low, "high": 100 * one.high} for method, one in changes.items()])

# %% [markdown]
# **Other neurons.** Random ones, the last ones, all of them, whole rows, and the top share of each tensor by itself.

# %%
masks = ["allo_random_neurons", "allo_last_neurons", "allo_all_neurons", "allo_rows", "allo_per_tensor"]
if set(masks) & set(found):
    against_allo(masks, "ALLO on other neurons than the top ones of all tensors together, minus ALLO.")

# %% [markdown]
# **Other scores of the neurons** than the warm-up's: the sum of |gradient|, and the size of the weights. 01 has how far
# their masks overlap.

# %%
if other := [method for method in found if method.startswith("allo_scores_")]:
    against_allo(other, "ALLO on the top neurons of other scores, minus ALLO.")
