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
# # 05 Ablations: which part of the method does the work
#
# **Question.** ALLO has several parts: a mask, two stages, two choices of tokens, a reward model. Each
# row here changes one of them and keeps the rest, with the same search and the same number of
# updates (C6, C7, C9). With $a_i$ and $b_i$ saying (1 or 0) whether the changed method and ALLO are
# right on problem $i$ of $n$, the effect of the change is
# $$\hat\delta = \frac{1}{n}\sum_{i=1}^{n} (a_i - b_i).$$
# Intervals are 95%, by the paired bootstrap over this seed's problems. All seeds together are in
# 06_evaluation.

# %% tags=["parameters"]
profile = "tiny"  # name, or path of a YAML file
seed = 0
results_dir = ""  # "" is results/<profile>
overrides = {}  # profile keys to change, dotted: {"domains.miniature.epochs": 2}

# %%
from allo_lib import analysis, arms, figures, parallel, results
from allo_lib.methods import ROWS, share_name
from allo_lib.notebook import percent, say, show, table
from allo_lib.study import Study

study = Study.open(profile, seed, results_dir, overrides)
asked = {name: results.methods_of(study, name) for name in study.profile.domains}
found = parallel.run_methods(study, asked)

# %% [markdown]
# ## Everything against ALLO

# %%
for name in study.profile.domains:
    rows = [m for m in found[name] if m.startswith("allo_")] + ["dpo", "dpo_long"]
    effects = {m: results.difference(found[name][m], found[name]["allo"]) for m in rows}
    bars = {m: (e.effect, e.low, e.high) for m, e in effects.items()}
    figure = figures.ablation_bars(bars, title=f"{name}, seed {seed}", unit=results.unit(found[name]["allo"]))
    show(figure, study, f"05_ablations_{name}", "Difference to ALLO with 95% intervals (paired bootstrap "
         "over problems): left of zero, the part that was changed had helped.")
    table([{"method": m, "score": analysis.score_of(found[name][m])[0], "minus ALLO": e.effect,
            "low": e.low, "high": e.high} for m, e in effects.items()], f"The numbers behind it, {name}.")

# %%
for name in study.profile.domains:
    reference = found[name]["allo"]
    rows = [m for m in found[name] if m.startswith("allo_")]
    worse = [m for m in rows if results.difference(found[name][m], reference).high < 0]
    better = [m for m in rows if results.difference(found[name][m], reference).low > 0]
    say(f"**{name}**, this seed: clearly below ALLO: {', '.join(worse) or 'none'}; clearly above: "
        f"{', '.join(better) or 'none'}; every other row cannot be told from it.")

# %% [markdown]
# ## How many neurons?
#
# DPO on the top share of neurons, each share at the best of its own search.

# %%
for name in study.profile.domains:
    shares = [s for s in sorted(study.profile.method.shares) if share_name(s) in found[name]]
    scores = [analysis.score_of(found[name][share_name(s)]) for s in shares]
    start = ("SFT model", analysis.score_of(arms.result(study, name, "sft_base"))[0])
    figure = figures.share_sweep(shares, [v for v, _ in scores], [e for _, e in scores], start, title=name)
    show(figure, study, f"05_shares_{name}",
         "Accuracy after DPO on the top share of neurons; bars are standard errors over problems.")
    say(f"**{name}**: " + ", ".join(f"{percent(s, 1)} of the neurons {percent(v)}"
                                    for s, (v, _) in zip(shares, scores, strict=True)) + ".")

# %% [markdown]
# ## Scalar entries, or whole rows?
#
# Of a linear layer $y = x W^\top$ the weight's gradient is $dW = dy^\top x$. When whole rows are kept, only
# $dW_{\text{rows}} = dy_{:,\text{rows}}^\top x$ is computed, a share of one third of a step's arithmetic;
# scattered entries need all of it. What do rows lose in quality for what they save?

# %%
for name in study.profile.domains:
    series = analysis.quality_and_cost(study, name, found[name])
    if not series:
        continue
    level = ("all neurons", analysis.score_of(found[name]["dpo"])[0])
    figure = figures.quality_against_cost(series, level, title=name)
    show(figure, study, f"05_rows_{name}", "Score after DPO on the top share of neurons against the "
         "counted operations of a training step, scalar entries and whole rows; bars are 95% intervals.")
    for label, points in series.items():
        say(f"**{name}, {label}**: " + "; ".join(
            f"{percent(share, 1)} of the neurons: {percent(score)} at {percent(cost)} of the operations"
            for cost, score, _, share in points) + ".")

# %%
for name in study.profile.domains:
    for share in analysis.shares_run(study, found[name], rows=True):
        scalar, rows = (found[name].get(share_name(share) + suffix) for suffix in ("", ROWS))
        if scalar is not None:
            e = results.difference(rows, scalar)
            say(f"**{name}, {percent(share)}**: rows minus scalars {100 * e.effect:+.1f} points "
                f"[{100 * e.low:+.1f}, {100 * e.high:+.1f}], paired bootstrap over problems.")

# %% [markdown]
# ## Does the quality of the reward model matter? (C9)
#
# The same ALLO with reward models of other quality; the oracle is the generator itself.

# %%
for name in study.profile.domains:
    qualities = {"allo_rm_untrained": "untrained", "allo_rm_shuffled": "shuffled targets",
                 "allo_rm_early": "stopped early", "allo": "trained", "allo_rm_oracle": "oracle"}
    rows = [{"reward model": text, "score": analysis.score_of(found[name][m])[0],
             "standard error": analysis.score_of(found[name][m])[1]}
            for m, text in qualities.items() if m in found[name]]
    table(rows, f"{name}: final score by the reward model that chose the tokens of forgetting.")
