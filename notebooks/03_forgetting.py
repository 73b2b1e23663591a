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
# **Question.** Can the model be made to forget what is wrong before it learns what is right?
#
# ALLO's first stage reads rejected responses only. Its loss is token-level NPO (negative preference
# optimization, [arXiv 2404.05868](https://arxiv.org/abs/2404.05868)) with the weights $w_t$ of
# 02_token_rewards, and it moves only the key neurons of 01_importance:
# $$\mathcal L_\text{NPO} = -\frac{2}{\beta}\,\frac{\sum_t w_t\,\log\sigma(-\beta\,\Delta_t)}
# {\#\{t: w_t \ne 0\}},\qquad
# \Delta_t = \log\pi_\theta(y^-_t) - \log\pi_\text{ref}(y^-_t).$$
# $\pi_\text{ref}$ is the SFT model, $\sigma$ the logistic function, $\beta$ is 0.1, and the sum runs over the
# tokens of a batch of rejected responses. The gradient of a term with respect to
# $\log\pi_\theta(y^-_t)$ is $2\,w_t\,\sigma(\beta\Delta_t)$ over the number of selected tokens: it pushes with
# full strength at first and lets go of a token that has become unlikely. Plain gradient ascent
# on the wrong tokens would push on for ever, and ruin the model.

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

from allo_lib.engine import forward
from allo_lib.engine.batching import rejected_batch
from allo_lib.evaluation import stats
from allo_lib.method import losses
from allo_lib.method.masked_adamw import MaskedAdamW
from allo_lib.profiles import methods
from allo_lib.report import method_figures
from allo_lib.report.notebook import draw, percent, say, table
from allo_lib.study import runs, scoring, training
from allo_lib.study.study import Study

study = Study.open(profile, seed, results_dir, overrides)
domain = runs.chosen_domain(study, domain)
beta, threshold = study.profile.method.beta, study.profile.method.token_threshold
stage = methods.stages_of("allo", study.profile)[0]  # what ALLO's first stage is set to
rate = runs.run_methods(study, {domain: ["allo"]})[domain]["allo"]["rates"][0]  # as tuned

# %% [markdown]
# ## The loss, by hand
#
# At the start $\Delta_t = 0$ for every token, so the first loss is $\frac{2}{\beta}\ln 2$ whatever
# the model, 13.86 at $\beta = 0.1$. The table shows how the push on a token lets go as it becomes less likely.

# %%
def npo_loss(logps, ref, w, beta):  # all [T] -> scalar
    delta = logps - ref
    return -(2 / beta) * (w * F.logsigmoid(-beta * delta)).sum() / (w != 0).sum().clamp(min=1)


ref, w = torch.tensor([-0.1, -0.5, -2.0]), torch.tensor([1.0, 0.0, 1.0])  # two of three tokens are selected
print(f"first loss {npo_loss(ref, ref, w, beta):.4f}, by hand {2 / beta * math.log(2):.4f} (beta {beta:g})")
pushes = []
for change in (0.0, -1.0, -10.0, -50.0):
    delta = torch.tensor([change], requires_grad=True)
    npo_loss(delta, torch.zeros(1), torch.ones(1), beta).backward()
    pushes.append({"change so far": change, "push": delta.grad.item(), "by hand, 2 sigma(beta change)": 2 / (1 + math.exp(-beta * change))})
table(pushes)

# %% [markdown]
# ## Forgetting one response, in plain torch
#
# The real SFT model, one rejected response, its weights, and the mask. Ten steps.

# %%
split = "heldout"
number = next((i for i, p in enumerate(study.keep_probabilities(domain, split)) if min(p) < threshold), 0)
row = study.encoded(domain, split)[number]
sft = copy.deepcopy(study.load_sft(domain)).float()
prompt, rejected = (torch.tensor(row[key], device=sft.device) for key in ("prompt", "rejected"))  # [P], [T]
p_keep = torch.tensor(study.keep_probabilities(domain, split)[number], device=sft.device)  # [T], of 02
w = (p_keep < threshold).float()  # [T]
neurons = training.mask_of(study, domain, stage)  # of 01
mask = {name: neurons.dense(name).to(sft.device) for name, _ in sft.named_parameters()}  # bool, shapes of the weights


def response_logps(model, prompt, response):  # [P], [T] -> [T]
    logits = model(torch.cat([prompt, response])[None]).logits[0]  # [P + T, V]
    return logits[len(prompt) - 1 : -1].log_softmax(-1).gather(1, response[:, None])[:, 0]


with torch.no_grad():
    ref = response_logps(sft, prompt, rejected)  # [T]
model = copy.deepcopy(sft)
optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
for _ in range(10):
    loss = npo_loss(response_logps(model, prompt, rejected), ref, w, beta)
    loss.backward()
    for name, p in model.named_parameters():
        p.grad *= mask[name]
    optimizer.step()
    optimizer.zero_grad()
with torch.no_grad():
    change = response_logps(model, prompt, rejected) - ref  # [T]

words = [study.tokenizer.decode([i]) for i in row["rejected"]]
draw(method_figures.token_panel(words, [("$p_t$", "low", p_keep.tolist()), ("$w_t$", "high", w.tolist()),
                                        ("change, nats", "change", change.tolist())]),
     "Change of the log-probability of every token after ten steps on this one response.")
for (name, p), q in zip(model.named_parameters(), sft.parameters(), strict=True):
    assert torch.equal(p[~mask[name]], q[~mask[name]])  # all neurons outside the mask are the same bits
print(f"{1 - neurons.share:.0%} of the weights did not move by a bit")

# %% [markdown]
# ## The same with the library
#
# `losses.npo_loss` takes batches, `[B, T]`, with the weight 0 outside the responses; `masked_adamw.MaskedAdamW` is
# AdamW and the mask in one.

# %%
again = copy.deepcopy(sft)
optimizer = MaskedAdamW(again, neurons, lr=rate)
for _ in range(10):
    losses.npo_loss(response_logps(again, prompt, rejected)[None], ref[None], w[None], beta).backward()
    optimizer.step()
optimizer.close()
with torch.no_grad():
    difference = (response_logps(again, prompt, rejected) - ref - change).abs().max().item()
assert difference < 1e-2, difference
print(f"the changes of all tokens agree to {difference:.0e} nats")

# %% [markdown]
# ## The whole stage: which tokens fall
#
# One epoch over the training pairs at the rate that was found for ALLO, watched on held-out
# responses, which the stage never reads. If forgetting is as precise as it is meant to be, selected tokens
# fall and the others stay.

# %%
model = copy.deepcopy(study.load_sft(domain))
rows = [row | {"rejected_weights": weights} for row, weights in zip(
    study.encoded(domain, study.train), study.forgetting_weights(domain, stage), strict=True)]
watched, keep = study.encoded(domain, split)[:64], study.keep_probabilities(domain, split)[:64]
layout, size = forward.layout_of(model, study.tokenizer.pad_token_id), study.domain(domain).batch_size
optimizer = MaskedAdamW(model, neurons, lr=rate, max_grad_norm=study.profile.method.max_grad_norm)
total = math.ceil(len(rows) / size)
order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()


def measured():  # mean change of the selected and of the other tokens
    groups = {True: [], False: []}
    for now, row, p in zip(study.logps(model, watched), watched, keep, strict=True):
        for value, before, p_t in zip(now["rejected"], row["rejected_reference"], p, strict=True):
            groups[p_t < threshold].append(value - before)
    return [sum(values) / max(1, len(values)) for values in (groups[True], groups[False])]


steps, changes = [0], [measured()]
for step in range(total):
    for group in optimizer.param_groups:  # a cosine, as in the study, whose first steps also rise
        group["lr"] = rate * (1 + math.cos(math.pi * step / total)) / 2
    batch = rejected_batch([rows[i] for i in order[step * size : (step + 1) * size]], layout)
    batch = forward.to_device(batch, model)  # "reference" and "weights" are [B, T]
    losses.npo_loss(forward.response_logps(model, batch), batch["reference"], batch["weights"], beta).backward()
    optimizer.step()
    if (step + 1) % math.ceil(total / 12) == 0 or step + 1 == total:
        steps.append(step + 1)
        changes.append(measured())
optimizer.close()

selected, others = zip(*changes, strict=True)
draw(method_figures.change_curve(steps, {"selected tokens ($w_t = 1$)": selected, "other tokens": others}),
     f"Held-out rejected responses of {domain} during forgetting, seed {seed}.")
say(f"**Forgetting changed the log-probability of selected tokens by {selected[-1]:+.3f} nats on average, "
    f"that of the others by {others[-1]:+.3f}.**")

# %% [markdown]
# ## What it does to the model
#
# `allo_no_learning` is forgetting alone, with a search and as many updates of its own;
# `allo_all_tokens_forgetting` is ALLO whose forgetting weighs all tokens of a rejected response alike.

# %%
here = ("allo_no_learning", "allo", "allo_all_tokens_forgetting")
run = [method for method in here if method in runs.methods_of(study, domain)]
found = runs.run_methods(study, {domain: ["sft_base", *run]})[domain]
scores = {method: scoring.score_of(one) for method, one in found.items()}
draw(method_figures.method_dots(scores, xlabel=f"{scoring.unit(found['allo'])} (%)"),
     f"ALLO with and without a choice of tokens in forgetting, and what else of these is run; {domain}, seed {seed}.")
if "allo_no_learning" in scores:
    (start, error), (score, noise) = scores["sft_base"], scores["allo_no_learning"]
    harm = stats.far_below("Forgetting alone", score, start, math.hypot(error, noise))
    say(f"**Forgetting alone scores {percent(score)}, the SFT model {percent(start)}: {100 * (score - start):+.1f} points** "
        f"(standard error of the difference at most {100 * math.hypot(error, noise):.1f})." + (f" {harm}." if harm else ""))
else:
    say(f"Profile {study.profile.name} does not run forgetting alone on {domain}; `tiny-full` does.")

# %% [markdown]
# ## What it means
#
# Pushing wrong tokens down says nothing of what should stand there instead; the probability goes to
# whatever the model finds next best. In the miniature that can be the right word, as the model
# knows better than its habit. Tokens that were not selected can move too, as they share their
# neurons with the selected ones. How far either falls hangs on the rate, and the search may choose one at which the stage
# hardly moves anything: where it stays near zero in the figure above, ALLO is little else than learning. SimNPO
# ([2410.07163](https://arxiv.org/abs/2410.07163)) names a weakness of the loss: the reference makes it push
# tokens alike that were likely and unlikely before.
#
# Whether forgetting *first* helps is claim C6, tested in 05_ablations and 06_evaluation.
#
# Next: [04_learning](04_learning.ipynb) learns from the forgetting checkpoint.
