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
# **Question.** Is alignment carried by a small part of the weights, and does it suffice to train that
# part?
#
# A *neuron* is, in the paper's words and here, one scalar entry $\theta_i$ of a weight tensor. DPO
# (direct preference optimization, [arXiv 2305.18290](https://arxiv.org/abs/2305.18290)) minimises, over
# pairs of a chosen response $y^+$ and a rejected one $y^-$ to a prompt $x$,
# $$\mathcal L_\text{DPO} = -\log\sigma\Big(\beta\Big[\sum_t \Delta^+_t - \sum_t \Delta^-_t\Big]\Big),\qquad
# \Delta_t = \log\pi_\theta(y_t\mid x, y_{<t}) - \log\pi_\text{ref}(y_t\mid x, y_{<t}).$$
# $\sigma$ is the logistic function, $\beta$ (0.1) says how much a log-ratio $\Delta$ counts, and
# $\pi_\text{ref}$ is the model at the start, kept frozen. A short run of it at the small learning rate
# $\alpha$, the *warm-up*, moves the weights from $\theta$ to $\theta'$. The score of neuron $i$ is how far
# it went,
# $$I(\theta_i) = \frac{|\theta'_i - \theta_i|}{\alpha},$$
# and the *mask* keeps the $k\%$ of all neurons with the highest scores, over all tensors together. The
# stages that follow train those alone.

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

import copy
import math

import torch
import torch.nn.functional as F

from allo_lib.evaluation import stats
from allo_lib.evaluation.outcomes import CHANCE_IN_TENSORS
from allo_lib.machine import weights
from allo_lib.method import neurons
from allo_lib.method.losses import dpo_loss
from allo_lib.method.masked_adamw import MaskedAdamW
from allo_lib.report import method_figures
from allo_lib.report.notebook import draw, percent, say, table
from allo_lib.study import importance, results, runs, scoring, training
from allo_lib.study.study import Study

study = Study.open(profile, seed, results_dir, overrides)
domain = runs.chosen_domain(study, domain)
share, beta = study.profile.method.share, study.profile.method.beta

# %% [markdown]
# ## The warm-up in plain torch, on eight pairs
#
# Two numbers can be checked by hand. Before the first step $\theta$ is its own reference, all $\Delta$ are
# 0 and the loss is $-\log\sigma(0) = \ln 2 = 0.6931$. And Adam moves no weight much further than the
# learning rate in a step, so after eight steps no score is much above 8.

# %%
sft = copy.deepcopy(study.load_sft(domain)).float()  # theta; float32, or small updates are rounded away
lr = study.scores(domain).json()["lr"]  # alpha of the study's own warm-up
pairs = [[torch.tensor(pair[key], device=sft.device) for key in ("prompt", "chosen", "rejected")]
         for pair in study.encoded(domain, "mask")[:8]]  # each [P], [T+], [T-] int64


def response_logps(model, prompt, response):  # [P], [T] -> [T]
    logits = model(torch.cat([prompt, response])[None]).logits[0]  # [P + T, V]
    return logits[len(prompt) - 1 : -1].log_softmax(-1).gather(1, response[:, None])[:, 0]


with torch.no_grad():  # log pi_ref of both sides of each pair, once: [T+], [T-]
    refs = [[response_logps(sft, prompt, side) for side in sides] for prompt, *sides in pairs]


def loss_of(model, i):  # the DPO loss of pair i
    prompt, *sides = pairs[i]
    chosen, rejected = (response_logps(model, prompt, side) - ref for side, ref in zip(sides, refs[i], strict=True))
    return -F.logsigmoid(beta * (chosen.sum() - rejected.sum()))  # of Delta+ [T+] and Delta- [T-]


model = copy.deepcopy(sft)
optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
for i in range(len(pairs)):
    loss = loss_of(model, i)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {i}: loss {loss:.4f}")

before = {name: p.detach() for name, p in sft.named_parameters()}
after = {name: p.detach() for name, p in model.named_parameters()}
scores = {name: (after[name] - before[name]).abs() / lr for name in before}  # shapes of the weights

flat = torch.cat([score.flatten() for score in scores.values()])  # [N], N all neurons
kept = round(share * len(flat))
cut = flat.topk(kept).values[-1]
mask = {name: score >= cut for name, score in scores.items()}  # bool, shapes of the weights
print(f"highest score {flat.max():.2f}, cut at {cut:.2f}: {kept} of {len(flat)} neurons are kept")

# %% [markdown]
# ## The masked step, in plain torch
#
# This is all that masking means: the gradient of every other neuron is set to zero. (With weight decay it
# would not suffice, as decay moves a weight without a gradient; here there is none.) The same eight steps
# again: with all neurons, with the mask, with as many neurons chosen at random, and with the lowest scores.

# %%
def masked_step(model, i, optimizer, mask):
    loss_of(model, i).backward()
    for name, p in model.named_parameters():
        p.grad *= mask[name]
    optimizer.step()
    optimizer.zero_grad()


chances = torch.rand(len(flat), generator=torch.Generator().manual_seed(seed)).to(flat.device)  # [N]
chances = dict(zip(scores, chances.split([s.numel() for s in scores.values()]), strict=True))
masks = {
    "all": {name: torch.ones_like(s, dtype=torch.bool) for name, s in scores.items()},
    "top": mask,
    "random": {name: chances[name].view_as(s) < share for name, s in scores.items()},
    "last": {name: s <= flat.kthvalue(kept).values for name, s in scores.items()},
}
losses_after = [{"neurons": "none: before", "mean loss": math.log(2)}]
for kind, picked in masks.items():
    trained = copy.deepcopy(sft)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=lr, weight_decay=0.0)
    for i in range(len(pairs)):
        masked_step(trained, i, optimizer, picked)
    with torch.no_grad():
        losses_after.append({"neurons": kind, "mean loss": sum(loss_of(trained, i).item() for i in range(len(pairs))) / len(pairs)})
    for name, p in trained.named_parameters():  # the others did not move by a bit
        assert torch.equal(p[~picked[name]], before[name][~picked[name]])
table(losses_after, "Mean DPO loss of the eight pairs after eight steps, all at the same learning rate.")

# %% [markdown]
# Read this table with care. Adam divides every gradient by its own size, so a score counts how *steadily* the
# pairs pull at a neuron and not how hard; after few pairs that is mostly noise, and a random mask can do as
# well or better. And a mask changes how far a learning rate goes.
# [arXiv 2405.02596](https://arxiv.org/abs/2405.02596) found that even a *random* mask matches full training
# once its learning rate is raised enough, and sparser masks want larger rates
# ([2502.15975](https://arxiv.org/abs/2502.15975) and [2602.01599](https://arxiv.org/abs/2602.01599) say the
# same of later models). So the comparison below gives every mask its own search of learning rates.
#
# ## The same with the library
#
# - `neurons.delta_scores` and `neurons.select_neurons` are the scores and the mask. The library
#   keeps *exactly* the requested number: where scores tie at the cut, the order of the tensors decides.
# - `masked_adamw.MaskedAdamW` is the masked step. It holds moments for kept neurons only, so it also saves the
#   memory that multiplying gradients by zeros does not.
# - `losses.dpo_loss` takes summed log-probabilities of whole responses.

# %%
library_scores = neurons.delta_scores(before, after, lr)
library_mask = neurons.select_neurons(library_scores, share)
for name, score in scores.items():
    torch.testing.assert_close(library_scores[name], score)
    assert not (library_mask.dense(name).to(score.device) & ~mask[name]).any(), name
assert library_mask.kept == kept

with torch.no_grad():  # of the trained model, whose log-ratios are not 0
    policy = [response_logps(model, pairs[0][0], side).sum()[None] for side in pairs[0][1:]]  # each [1]
    reference = [ref.sum()[None] for ref in refs[0]]
    torch.testing.assert_close(dpo_loss(*policy, *reference, beta=beta)[0], loss_of(model, 0), atol=1e-4, rtol=0)

plain, library = copy.deepcopy(sft), copy.deepcopy(sft)
dense = {name: library_mask.dense(name).to(sft.device) for name in scores}
adam, masked_adam = torch.optim.AdamW(plain.parameters(), lr=lr, weight_decay=0.0), MaskedAdamW(library, library_mask, lr=lr)
for i in range(8):
    masked_step(plain, i, adam, dense)
    loss_of(library, i).backward()
    masked_adam.step()
masked_adam.close()
furthest = max((p - q).abs().max().item() for p, q in zip(plain.parameters(), library.parameters(), strict=True))
assert furthest < 0.1 * lr, furthest
print(f"same mask; after eight steps no weight differs by more than {furthest / lr:.1e} learning rates")
# Some twenty copies of the weights: of a real model gigabytes that the rest of the notebook can use.
del sft, model, loss, trained, plain, library, before, after, optimizer, adam, masked_adam, flat, chances, masks, dense, library_scores

# %% [markdown]
# ## The scores of the study
#
# The study's warm-up is one epoch over the pairs of the split `mask`, which no method but one control
# (`dpo_all_pairs`) is trained on.

# %%
record = study.scores(domain).json()
mask = study.mask(domain, "top", share)
scores = weights.read_tensors(study.scores(domain).file("scores.safetensors"))
values = torch.cat([score.flatten() for score in scores.values()]).float()
lowest = min(scores[name].flatten()[index].min().item() for name, index in mask.indices.items() if len(index))
draw(method_figures.score_histogram(values.numpy(), lowest, f"{domain}, seed {seed}"),
     f"Scores of all {mask.total:,} neurons after {record['pairs']} pairs. The cut takes the top {percent(share, 0)}; "
     "there is no gap at it, the share is a choice.")
say(f"**The warm-up moved {percent(record['moved_float32'])} of the neurons in float32; of the same run, rounded to "
    f"bfloat16, {percent(record['moved_bfloat16'])} would be seen to move.**")
ties = neurons.count_ties(scores, mask)
arbitrary = stats.arbitrary_mask(**ties, kept=mask.kept, total=mask.total)
say(f"The mask is partly arbitrary: {arbitrary}." if arbitrary else f"{ties['zeros']} scores are exactly 0, and "
    f"{ties['tied_kept']} of {mask.kept} kept ones tie at the cut: which neurons are kept hardly hangs on how ties are broken.")

# %% [markdown]
# [arXiv 2505.11711](https://arxiv.org/abs/2505.11711) reports that PPO, GRPO, DPO and others change only 5
# to 30% of the weights, and that training those alone recovers the result. Both numbers above are of one
# and the same run: how sparse an update *looks* depends on the number format that is looked at
# ([2511.08567](https://arxiv.org/abs/2511.08567), [2602.03839](https://arxiv.org/abs/2602.03839)). That is
# why the scores here are taken from float32 weights. The released code rounds them to bfloat16.
#
# ## Where the key neurons sit

# %%
matrix, layers, modules = importance.where_kept(mask)
draw(method_figures.importance_heatmap(matrix, layers, modules, share, title=f"key neurons, {domain}"),
     f"Share of each tensor that is kept; neurons spread evenly would give {percent(share, 0)} everywhere.")

# %% [markdown]
# ## Are the masks stable?
#
# If the scores say something about the model and not only about the run, two estimates must agree. The
# overlap is the intersection over the union of two masks; two random masks of share $s$ overlap by
# $s / (2 - s)$.

# %%
masks, chance = results.top_masks(study, domain), neurons.chance_overlap(share)
meant = {"delta": "the warm-up's |delta|", "order": "the same with the pairs in another order", "half_a": "on the first half of the pairs",
         "half_b": "on the second half", "gradient": "accumulated |gradient|", "magnitude": "|weight|"}
draw(method_figures.overlap_matrix(list(masks), [[a.overlap(b) for b in masks.values()] for a in masks.values()], chance, title=domain),
     "Masks of one model by several scores: " + "; ".join(f"{key}: {meant.get(key, '')}" for key in masks) + ".")
rows = results.overlap_rows(study, domain)
compared, within = ({row.method: row.value for row in rows if row.metric == metric} for metric in ("mask_overlap", CHANCE_IN_TENSORS))
say("**Overlap, chance being " + f"{chance:.3f}: " + ", ".join(f"{key} {value:.3f}" for key, value in compared.items()) + ".**")
say("Claim C8 asks for agreement *within* the tensors, so its chance is that of random masks which are as dense in each tensor as "
    "these: " + ", ".join(f"{key} {value:.3f}" for key, value in within.items()) + ".")
weak = [key for key, value in compared.items() if value < stats.NEAR_CHANCE * chance]
noisy = [text for key, text in (("orders", "two orders"), ("halves", "two halves")) if key in weak]
say(f"Between {' and between '.join(noisy)} of the pairs the masks agree hardly better than random ones: the scores are mostly noise here, and "
    "more pairs would be needed." if noisy else
    "Masks that should agree (the same pairs in another order, two halves of the pairs) do so better than random ones; full "
    "agreement would be 1.")
if "estimators" in weak:
    say("|delta| and accumulated |gradient| do not agree: Adam divides the gradient by its size, so one tells how steadily "
        "and the other how hard the pairs pull. They are two different scores and not two estimates of one.")

# %% [markdown]
# ## Does it suffice to train the key neurons? (C1 to C3)
#
# DPO on all neurons, on the top share, on the last and on a random one. The paper runs all of them at one
# learning rate (its rows end in `_paper` here). A mask changes how far a rate goes, so every one of them also gets
# a search of its own, of the rate and, in some profiles, of $\beta$, by the same rule. Where a profile runs both protocols, both are
# shown.

# %%
percentage = f"{share * 100:g}".replace(".", "p")
studied = [a for a in ("dpo", *(f"dpo_{kind}{percentage}" for kind in ("top", "random", "last")))
                 if a in runs.methods_of(study, domain)]
at_one_rate = [f"{a}_paper" for a in studied if f"{a}_paper" in runs.methods_of(study, domain)]
found = runs.run_methods(study, {domain: [*studied, *at_one_rate]})[domain]
fair = {a: scoring.score_of(found[a]) for a in studied}
paper = {a.removesuffix("_paper"): scoring.score_of(found[a]) for a in at_one_rate}
curves = {a.removesuffix("_paper"): found[a]["loss"][-1] for a in at_one_rate} or {a: found[a]["loss"][-1] for a in studied}
draw(method_figures.empirical_panels(curves, fair, paper, f"{scoring.unit(found['dpo'])} (%)"),
     f"DPO on parts of the neurons, the same colours on both sides; {domain}, seed {seed}. Whiskers: 95% over the problems "
     "of one trained model.")
start, _ = scoring.score_of(training.result(study, domain, "sft_base"))
say(f"**From {percent(start)}, each tuned by itself: "
    + ", ".join(f"{a} {percent(value)}" for a, (value, _) in fair.items()) + ".**")

# %% [markdown]
# ## Is it the neurons or the step size?
#
# All models that were trained to find the rates. Where they were searched on this seed, they are also drawn by how far
# the weights moved and how far the preference was learned: masks whose curves lie on each other there differ in the
# rate they need and not in what they can learn. Where a profile takes rates that were tuned before, each point is the mean
# over the models that they were tuned on.

# %%
tried, problems = runs.tried(study, domain, {a: found[a] for a in studied})
before_alignment = None if not training.is_searched(study, domain) or study.task(domain) is None else (
    training.result(study, domain, "sft_base")["dev"])
draw(method_figures.sweep_panels(tried, before_alignment, problems),
     "Every model that was trained to find the rates, scored on development questions.")
order = sorted(tried, key=lambda a: -max(one["dev"] for one in tried[a]))
say("Best development scores: " + ", ".join(f"{a} {percent(max(one['dev'] for one in tried[a]))}" for a in order)
    + ", at the rates " + ", ".join(f"{found[a]['rates'][0]:g}" for a in order) + ".")

# %% [markdown]
# ## What it means
#
# A score says how steadily the preferences pull at a neuron. Whether the top ones are special, or any
# tenth would do at a larger rate, is what the row `dpo_random10` is for. One seed cannot decide it: the
# intervals over all seeds and the verdicts C1 to C3 and C8 are in [06_evaluation](06_evaluation.ipynb).
#
# Next: [02_token_rewards](02_token_rewards.ipynb) asks the same of tokens.
