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
# **Question.** ALLO has several parts: a mask, two stages, two choices of tokens, a reward model. Each
# row here changes one of them and keeps the rest, with the same search and the same number of
# updates (C6, C7, C9). With $a_i$ and $b_i$ saying (1 or 0) whether the changed method and ALLO are
# right on problem $i$ of $n$, the effect of the change is
# $$\hat\delta = \frac{1}{n}\sum_{i=1}^{n} (a_i - b_i).$$
# Intervals are 95%, over this seed's problems: they say nothing of other models. All seeds together are in
# 06_evaluation. A figure is drawn where the profile asks for its rows (`allo_lib/evaluation/ablations.py`).

# %% tags=["parameters"]
profile = "tiny"  # name, or path of a YAML file
seed = 0
results_dir = ""  # "" is results/<profile>
overrides = {}  # profile keys to change, dotted: {"domains.miniature.epochs": 2}

# %%
import sys
from pathlib import Path

# The repository, wherever in it the notebook runs.
sys.path[:0] = [str(p) for p in (Path.cwd(), *Path.cwd().parents) if (p / "allo_lib").is_dir()][:1]

from allo_lib.evaluation import ablations
from allo_lib.evaluation.published import arm_label
from allo_lib.profiles.methods import ROWS, share_name
from allo_lib.report import ablation_figures, figures
from allo_lib.report.notebook import percent, say, show, table
from allo_lib.study import analysis, arms, key_neurons, results, runs
from allo_lib.study.study import Study

study = Study.open(profile, seed, results_dir, overrides)
asked = {name: runs.methods_of(study, name) for name in study.profile.domains}
found = runs.run_methods(study, asked)


# %%
def effects_figure(figure: str, caption: str) -> None:
    """The rows of a figure against ALLO, on every domain that has them."""
    for name, labels in ablations.wanted(figure, study.profile, asked):
        bars = ablation_figures.effects(found[name], labels, "allo")
        drawn = figures.ablation_bars(bars, "ALLO", f"{name}, seed {seed}", results.unit(found[name]["allo"]))
        show(drawn, study, f"05_{figure}_{name}", caption)
        say(f"**{name}**, points above ALLO: " + "; ".join(
            f"{label} {100 * effect:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
            for label, (effect, low, high) in bars.items()) + ".")


# %% [markdown]
# ## Everything against ALLO

# %%
for name in study.profile.domains:
    rows = ablations.single_changes(found[name]) + [m for m in ("dpo", "dpo_long") if m in found[name]]
    effects = {m: results.difference(found[name][m], found[name]["allo"]) for m in rows}
    bars = {m: (e.effect, e.low, e.high) for m, e in effects.items()}
    figure = figures.ablation_bars(bars, title=f"{name}, seed {seed}", unit=results.unit(found[name]["allo"]))
    show(figure, study, f"05_ablations_{name}", "Difference to ALLO with 95% intervals (over this "
         "model's problems): left of zero, the part that was changed had helped.")
    table([{"method": m, "score": analysis.score_of(found[name][m])[0], "minus ALLO": e.effect,
            "low": e.low, "high": e.high} for m, e in effects.items()], f"The numbers behind it, {name}.")

# %%
for name in study.profile.domains:
    reference = found[name]["allo"]
    rows = ablations.single_changes(found[name])
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
    if len(shares) < 2:
        continue
    scores = [analysis.score_of(found[name][share_name(s)]) for s in shares]
    start = ("SFT model", analysis.score_of(arms.result(study, name, "sft_base"))[0])
    figure = ablation_figures.share_sweep(shares, [v for v, _ in scores], [e for _, e in scores], start, title=name)
    show(figure, study, f"05_shares_{name}",
         "Accuracy after DPO on the top share of neurons; bars are standard errors over problems.")
    say(f"**{name}**: " + ", ".join(f"{percent(s, 1)} of the neurons {percent(v)}"
                                    for s, (v, _) in zip(shares, scores, strict=True)) + ".")

# %% [markdown]
# And ALLO, whose two stages may each train a share of their own, at the best rates of each row's own search.

# %%
for name, labels in ablations.wanted("neurons", study.profile, asked):
    cells = {place: analysis.score_of(found[name][row])
             for place, row in ablations.grid_cells(study.profile, labels).items()}
    unit = results.unit(found[name]["allo"])
    figure = ablation_figures.neuron_shares(cells, study.profile.method.share, f"{name}, seed {seed}", unit)
    show(figure, study, f"05_neurons_{name}", "ALLO by the share of neurons that each stage trains.")
    places = sorted(cells, key=lambda place: cells[place][0])
    worst, best = (f"{percent(v)} (forgetting {percent(a)}, learning {percent(b)})"
                   for a, b, v in ((*place, cells[place][0]) for place in (places[0], places[-1])))
    say(f"**{name}**: between {worst} and {best}. The best of {len(cells)} is high by luck too: with no "
        f"difference at all it would stand up to {100 * ablation_figures.luck_of_the_best(cells.values()):.1f} points above the mean.")

# %% [markdown]
# ## Which neurons?
#
# Top neurons against last and random ones, whole rows, and the same share of every tensor. Each has its own
# search of rates, which begins as much higher for random and last neurons as it does for DPO.

# %%
effects_figure("masks", "ALLO on other neurons than the top ones of all tensors together, minus ALLO.")

# %% [markdown]
# ## Do the scores point at the same neurons?
#
# Intersection over union of two masks $A$ and $B$ of $k$ out of $n$ neurons. Random ones share $k^2 / n$ of them:
# $$\frac{|A \cap B|}{|A \cup B|} \approx \frac{k/n}{2 - k/n}.$$
# Masks can agree on tensors without agreeing on neurons; the second chance takes each tensor's share as given.

# %%
for name, _ in ablations.wanted("scores", study.profile, asked):
    rows = key_neurons.compare(study, name)
    title = f"{name}, seed {seed}: top {percent(study.profile.method.share, 0)} of the neurons"
    show(ablation_figures.overlap_dots(rows, title), study, f"05_overlaps_{name}",
         "Overlap of masks of other data, tasks, warm-ups and estimators (and seeds before this one), beside chance.")
    above = [f"{one.label} {one.value:.3f} ({one.value / one.chance:.1f} and {one.value / one.within:.1f} times)"
             for one in rows]
    say(f"**{name}**: overlap, and how many times either chance it is: " + "; ".join(above) + ".")

# %%
effects_figure("scores", "ALLO on the top neurons of other scores, minus ALLO.")

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
    figure = ablation_figures.quality_against_cost(series, level, title=name)
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
                f"[{100 * e.low:+.1f}, {100 * e.high:+.1f}], over problems.")

# %% [markdown]
# ## Which tokens? (C7)
#
# Forgetting weighs a rejected token by $w_t = 1[p_t < 0.5]$; also by $1 - p_t$, by $p_t$ as the released code does,
# or by 1. Learning looks at the share $\varepsilon$ of tokens with the lowest log-ratio, by the current policy
# or by a DPO model.

# %%
effects_figure("token_rules", "ALLO with other tokens, minus ALLO.")

# %%
for name, labels in ablations.wanted("key_tokens", study.profile, asked):
    points = ablations.key_points(study.profile, labels)
    scores = [analysis.score_of(found[name][row]) for row in points.values()]
    control = "dpo_long" if "dpo_long" in found[name] else "dpo"
    level = (arm_label(control), analysis.score_of(found[name][control])[0])
    figure = ablation_figures.share_sweep(list(points), [v for v, _ in scores], [e for _, e in scores], level, title=name,
                                 xlabel=r"share $\varepsilon$ of rejected tokens that are key tokens (%)")
    show(figure, study, f"05_key_tokens_{name}", "ALLO by the share of key tokens; bars are 95% intervals.")
    say(f"**{name}**: " + ", ".join(f"{percent(s, 0)} key tokens {percent(v)}"
                                    for s, (v, _) in zip(points, scores, strict=True)) + ".")

# %% [markdown]
# ## In which order? (C6)
#
# Forgetting before learning, the other way round, each alone for as many updates, and both losses in one stage.

# %%
effects_figure("order", "Other orders of the two stages, minus ALLO; all of equally many updates.")

# %% [markdown]
# ## Does the quality of the reward model matter? (C9)
#
# The same ALLO with reward models of other quality; the oracle is the generator itself.

# %%
for name in study.profile.domains:
    qualities = {row: text for row, (_, text) in ablations.REWARD_MODELS.items()}
    rows = [{"reward model": text, "score": analysis.score_of(found[name][m])[0],
             "standard error": analysis.score_of(found[name][m])[1]}
            for m, text in qualities.items() if m in found[name]]
    table(rows, f"{name}: final score by the reward model that chose the tokens of forgetting.")

# %%
for name, labels in ablations.wanted("reward_models", study.profile, asked):
    points = ablation_figures.reward_points(study, name, found[name], labels)
    if len(points) < 2:
        continue  # only the miniature's generator knows which tokens are wrong
    controls = {"allo_all_tokens_forgetting": "forgetting all tokens", "allo_no_forgetting": "learning alone"}
    levels = {text: analysis.score_of(found[name][m])[0] for m, text in controls.items() if m in found[name]}
    figure = ablation_figures.reward_quality(points, levels, f"{name}, seed {seed}")
    show(figure, study, f"05_reward_models_{name}", "ALLO by how well its reward model finds wrong tokens.")
    slope, low, high = ablation_figures.slope_of(points)
    say(f"**{name}**: a reward model that is better by 0.1 of the area under the curve gives {10 * slope:+.1f} points "
        f"[{10 * low:+.1f}, {10 * high:+.1f}] (line through the rows, as if their errors were independent).")

# %% [markdown]
# ## How far can the learning rates be off?
#
# Two stages that are each fine alone can ruin the model together. ALLO at multiples of its best rates against DPO at
# its best one, with as many updates: $\hat\delta$ as above, and the line where it is zero.

# %%
for name, labels in ablations.wanted("rates", study.profile, asked):
    control = "dpo_long" if "dpo_long" in found[name] else "dpo"
    cells = ablations.rate_cells(labels)
    effects = ablation_figures.effects(found[name], {row: place for place, row in cells.items()}, control)
    figure = ablation_figures.rate_region(effects, arm_label(control), f"{name}, seed {seed}",
                                          results.unit(found[name]["allo"]))
    show(figure, study, f"05_rates_{name}", "ALLO at multiples of its best learning rates, minus DPO at its best.")
    above = sum(effect > 0 for effect, _, _ in effects.values())
    clear = sum(low > 0 for _, low, _ in effects.values())
    below = sum(high < 0 for _, _, high in effects.values())
    say(f"**{name}**: of {len(effects)} pairs of rates {above} are above DPO, {clear} of them clearly; {below} are clearly below.")
