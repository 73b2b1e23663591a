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
# # 01 Importance: which neurons matter
#
# **Question.** Is alignment carried by a small part of the weights? The paper scores every *neuron*
# (a scalar entry $\theta_i$ of a weight tensor) by how far a short run of vanilla DPO moves it,
# $$I(\mathcal D, \theta_i) \approx \frac{|\theta'_i - \theta_i|}{\alpha},$$
# where $\theta'$ are the weights after one epoch at the small learning rate $\alpha$, and keeps the
# top $k\%$ of all entries. DPO ([arXiv 2305.18290](https://arxiv.org/abs/2305.18290)) minimises
# $$\mathcal L_\text{DPO} = -\log\sigma\big(\beta\,[\Delta(y^+) - \Delta(y^-)]\big),\qquad
# \Delta(y) = \log\pi_\theta(y\mid x) - \log\pi_\text{ref}(y\mid x),$$
# with $\sigma$ the logistic function, $\beta$ its strength and $\pi_\text{ref}$ the SFT model.

# %% tags=["parameters"]
profile = "tiny"  # name, or path of a YAML file
seed = 0
results_dir = ""  # "" is results/<profile>
overrides = {}  # profile keys to change, dotted: {"domains.miniature.epochs": 2}

# %%
from allo_lib import (
    analysis,
    arms,
    figures,
    importance,
    parallel,
    published,
    results,
    scoring,
    warning_signs,
    weights,
)  # fmt: skip
from allo_lib.notebook import percent, say, show, table, warn
from allo_lib.study import Study

study = Study.open(profile, seed, results_dir, overrides)
share = study.profile.method.share

# %% [markdown]
# ## Scores in three lines
#
# On four weights, by hand: the two that moved furthest are kept.

# %%
import torch

before, after = {"w": torch.tensor([1.0, 2.0, 3.0, 4.0])}, {"w": torch.tensor([1.1, 2.0, 2.5, 4.3])}
scores = importance.delta_scores(before, after, lr=0.1)
mask = importance.select_neurons(scores, share=0.5)
print(scores["w"], mask.indices["w"])

# %% [markdown]
# ## Scores of the real model
#
# Scores come from float32 master weights. The released code casts them to bfloat16, where small
# updates round to nothing: the table says which share of the entries the same run moved in each.

# %%
for name in study.profile.domains:
    record = study.scores(name).json()
    mask = study.mask(name, "top", share)
    scores = weights.read_tensors(study.scores(name).file("scores.safetensors"))
    ties = importance.count_ties(scores, mask)
    table([{"pairs": record["pairs"], "lr": record["lr"], "moved, float32": record["moved_float32"],
            "moved, bfloat16": record["moved_bfloat16"], "kept": mask.kept, "of": mask.total} | ties],
          f"{name}: the importance run, entries moved (shares), the mask and how arbitrary it is.")
    warn(warning_signs.arbitrary_mask(**ties, kept=mask.kept, total=mask.total))

# %% [markdown]
# ## Where the key neurons sit

# %%
for name in study.profile.domains:
    matrix, layers, modules = analysis.where_kept(study.mask(name, "top", share))
    figure = figures.importance_heatmap(matrix, layers, modules, share, title=f"key neurons, {name}")
    show(figure, study, f"01_where_{name}",
         f"Share of each tensor that belongs to the top {percent(share, 0)} of all entries ({name}, "
         f"seed {seed}); evenly spread neurons would give {percent(share, 0)} everywhere.")

# %% [markdown]
# ## Are the masks stable? (C8)
#
# Overlap is intersection over union. Two random masks of share $s$ overlap by $s/(2-s)$.

# %%
for name in study.profile.domains:
    masks = results.top_masks(study, name)
    chance = importance.chance_overlap(share)
    figure = figures.overlap_matrix(list(masks), analysis.overlaps(masks), chance,
                                    title=f"overlap of top masks, {name}")
    show(figure, study, f"01_overlap_{name}",
         f"Masks of the same model by several estimates: |delta|, the same with another order of the "
         f"pairs, on each half of them, by accumulated |gradient|, and by |weight| ({name}).")
    for row in results.overlap_rows(study, name):
        if row.metric == "mask_overlap":
            say(f"{row.method}: overlap {row.value:.3f}, chance {chance:.3f}.")
            warn(warning_signs.weak_overlap(f"{name}, {row.method}", row.value, chance))

# %% [markdown]
# ## The empirical study (C1-C3)
#
# DPO is run on all neurons, on the top, the last and a random share. A mask changes how far a given
# learning rate goes, so every arm gets the same number of trained models, and its own best rate on
# the development split (*fair* protocol). The paper runs one rate for all: those rows are named
# `_paper` here.

# %%
arms_of_study = ["dpo", "dpo_top10", "dpo_last10", "dpo_random10"]
paper_arms = ["dpo_paper", "dpo_top10_paper", "dpo_last10_paper"]
percentage = f"{share * 100:g}".replace(".", "p")
arms_of_study = [arm.replace("10", percentage) for arm in arms_of_study]
paper_arms = [arm.replace("10", percentage) for arm in paper_arms]
found = parallel.run_methods(study, {
    name: [arm for arm in arms_of_study + paper_arms if arm in results.methods_of(study, name)]
    for name in study.profile.domains})

compared = [name for name in study.profile.domains if len(found[name]) > 1]
for name in study.profile.domains:
    if name not in compared:
        say(f"**{name}**: no part of the neurons is among the methods of this domain.")

# %%
for name in compared:
    curves = {arm: [found[name][arm]["loss"][-1]] for arm in arms_of_study if arm in found[name]}
    show(figures.loss_curves(curves, title=f"{name}, each arm at its own best rate"), study,
         f"01_loss_fair_{name}", "Training loss by step under the fair protocol.")
    curves = {arm: [found[name][arm]["loss"][-1]] for arm in paper_arms
              if arm in found[name] and found[name][arm]["loss"]}  # without arms that diverged
    if curves:
        figure = figures.loss_curves(curves, title=f"{name}, one rate for all (paper's protocol)")
        show(figure, study, f"01_loss_paper_{name}",
             "Training loss by step when every arm runs at plain DPO's best rate.")

# %%
for name in compared:
    measured = {arm: analysis.score_of(found[name][arm]) for arm in arms_of_study
                if arm in found[name]}
    figure = figures.empirical_bars(measured, published.empirical_study(), title=f"measured, {name}")
    show(figure, study, f"01_empirical_{name}",
         "Accuracy of DPO on parts of the neurons, each at its own best rate; bars are standard "
         "errors. Right: the paper's, on its own data sets.")
    start, _ = analysis.score_of(arms.result(study, name, "sft_base"))
    for arm, (value, error) in measured.items():
        say(f"{name}, {arm}: {percent(value)} (standard error {percent(error)}), from {percent(start)}.")

# %% [markdown]
# ## Is it the neurons or the step size?
#
# A sparser update moves less at the same rate. So the arms are also compared at equal learning rate,
# at equal displacement $\lVert\theta'-\theta\rVert$, and at equal reward margin, over all models of
# the search (development split).

# %%
for name in study.profile.domains:
    tried = {arm: [one for one in found[name][arm]["tried"] if one["displacement"] is not None]
             for arm in arms_of_study if arm in found[name]}  # without rates that diverged
    sweep = {arm: [(one["rates"][0], one["dev"]) for one in rows] for arm, rows in tried.items()}
    count = scoring.dev_count(study, name)
    show(figures.rate_sweep(sweep, title=name, count=count), study, f"01_rates_{name}",
         "Development accuracy by learning rate; the best of each arm is ringed.")
    # The margins of preference pairs are taken to the starting model itself, so it has no score.
    start = arms.result(study, name, "sft_base")["dev"] if study.task(name) is not None else None
    for key, label in (("displacement", "displacement"), ("train_margin", "margin")):
        points = {arm: [(one[key], one["dev"]) for one in rows] for arm, rows in tried.items()}
        figure = figures.displacement_curve(points, x=label, start=start, title=name, count=count)
        show(figure, study, f"01_{label}_{name}",
             f"Development accuracy by {label} of every model of the search.")

# %%
for name in study.profile.domains:
    best = {arm: max(one["dev"] for one in found[name][arm]["tried"])
            for arm in arms_of_study if arm in found[name]}
    order = sorted(best, key=best.get, reverse=True)
    say(f"**{name}**: at their best rates, on the development split: "
        + ", ".join(f"{arm} {percent(best[arm])}" for arm in order)
        + ". Intervals over test problems and seeds, and the verdicts, are in 06_evaluation.")
