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
# **Question.** After forgetting, what is there to learn, and from which tokens?
#
# ALLO's second stage is DPO that starts from the forgetting checkpoint, which is also its reference. The
# chosen response counts with all its tokens, the rejected one with its *key tokens* $K$ only:
# $$\mathcal L = -\log\sigma\Big(\beta\Big[\sum_t \Delta^+_t - \sum_{t\in K}\Delta^-_t\Big]\Big),\qquad
# \Delta_t = \log\pi_\theta(y_t) - \log\pi_\text{ref}(y_t).$$
# $K$ are the tokens of the rejected response with the lowest $\Delta^-_t$, a share $\epsilon$ of them and at
# least one: those that DPO's own token reward $\beta\Delta_t$ likes least. They are chosen again in every step.
# Only the key neurons of 01 move. With $K$ the whole response this is DPO.

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
from allo_lib.method import losses, tokens
from allo_lib.method.masked_adamw import MaskedAdamW
from allo_lib.profiles import methods
from allo_lib.report import method_figures
from allo_lib.report.notebook import draw, percent, say, table
from allo_lib.study import runs, scoring, training
from allo_lib.study.study import Study

study = Study.open(profile, seed, results_dir, overrides)
domain = runs.chosen_domain(study, domain)
beta, threshold = study.profile.method.beta, study.profile.method.token_threshold
first, stage = methods.stages_of("allo", study.profile)  # what ALLO's two stages are set to
rate = runs.run_methods(study, {domain: ["allo"]})[domain]["allo"]["rates"][1]  # as tuned

# %% [markdown]
# ## Key tokens, by hand
#
# Of five tokens a share of 0.4 is two: those with $-2.0$ and $-0.5$. Before the first step the policy *is*
# its reference and every $\Delta_t$ is 0. Then all tie, and ties are broken by position: the key tokens of the
# first step are simply the first tokens. (The official code lets all tokens pass in that case, and counts
# the share of the padded length, prompt included.)

# %%
def key_tokens(delta, share):  # [T] -> bool [T]
    k = max(1, round(share * len(delta)))
    key = torch.zeros(len(delta), dtype=torch.bool, device=delta.device)
    key[delta.argsort(stable=True)[:k]] = True
    return key


print(key_tokens(torch.tensor([0.1, -2.0, 0.3, -0.5, 0.0]), 0.4).tolist())
print(key_tokens(torch.zeros(10), 0.2).tolist(), "before the first step")

# %% [markdown]
# ## Learning from one pair, in plain torch
#
# The real SFT model and one pair; for the picture it stands in for the forgetting checkpoint. Its key
# tokens stand in brackets. They settle within a few steps on the words that the model finds easiest to give
# up.

# %%
split = "heldout"
number = next((i for i, p in enumerate(study.keep_probabilities(domain, split)) if min(p) < threshold), 0)
row = study.encoded(domain, split)[number]
reference = copy.deepcopy(study.load_sft(domain)).float()
prompt, chosen, rejected = (torch.tensor(row[key], device=reference.device) for key in ("prompt", "chosen", "rejected"))
neurons = training.mask_of(study, domain, stage)
mask = {name: neurons.dense(name).to(reference.device) for name, _ in reference.named_parameters()}
words = [study.tokenizer.decode([i]) for i in row["rejected"]]


def response_logps(model, prompt, response):  # [P], [T] -> [T]
    logits = model(torch.cat([prompt, response])[None]).logits[0]  # [P + T, V]
    return logits[len(prompt) - 1 : -1].log_softmax(-1).gather(1, response[:, None])[:, 0]


with torch.no_grad():
    ref_chosen, ref_rejected = (response_logps(reference, prompt, side) for side in (chosen, rejected))  # [T+], [T-]
model = copy.deepcopy(reference)
optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
for step in range(10):
    delta_chosen = response_logps(model, prompt, chosen) - ref_chosen  # [T+]
    delta_rejected = response_logps(model, prompt, rejected) - ref_rejected  # [T-]
    key = key_tokens(delta_rejected.detach(), stage.key_share)  # bool [T-], chosen at every step
    loss = -F.logsigmoid(beta * (delta_chosen.sum() - (delta_rejected * key).sum()))
    loss.backward()
    for name, p in model.named_parameters():
        p.grad *= mask[name]
    optimizer.step()
    optimizer.zero_grad()
    if step in (0, 1, 2, 4, 9):
        line = " ".join(f"[{word.strip()}]" if k else word.strip() for word, k in zip(words, key, strict=True))
        print(f"step {step}, loss {loss:.4f}: {line[:220]}")

# %% [markdown]
# ## The same with the library
#
# `tokens.key_tokens` and `losses.token_dpo_loss` take batches, `[B, T]`. With both masks the whole
# responses the loss is that of DPO.

# %%
def pad(values):  # [T] -> [1, the longer response]
    return F.pad(values, (0, max(len(chosen), len(rejected)) - len(values)))[None]


again = copy.deepcopy(reference)
optimizer = MaskedAdamW(again, neurons, lr=rate)
inside_chosen, inside = pad(torch.ones_like(chosen).bool()), pad(torch.ones_like(rejected).bool())
for _ in range(10):
    ratios = [pad(response_logps(again, prompt, side) - ref) for side, ref in ((chosen, ref_chosen), (rejected, ref_rejected))]
    key = tokens.key_tokens(ratios[1], inside, stage.key_share)
    losses.token_dpo_loss(*ratios, inside_chosen, key, beta).mean().backward()
    optimizer.step()
optimizer.close()
with torch.no_grad():
    change, ours = (response_logps(one, prompt, rejected) - ref_rejected for one in (model, again))
assert (change - ours).abs().max() < 1e-2
sums = [ratio.detach().sum(1) for ratio in ratios]
zero = torch.zeros_like(sums[0])
torch.testing.assert_close(losses.token_dpo_loss(*ratios, inside_chosen, inside, beta), losses.dpo_loss(*sums, zero, zero, beta=beta))
print(f"the changes of all tokens agree to {(change - ours).abs().max():.0e} nats")

# %% [markdown]
# ## One rejected response through all stages
#
# Now the study's own ALLO, both stages over all training pairs. The response is held out: no stage has read
# it. Read the panel from top to bottom: in the miniature the wrong decisions, what the rewriter thinks of each word, which words forgetting would
# select, how the log-probability changed in forgetting, which tokens were the key tokens at the end of
# learning, and how it changed in learning. In the miniature, look whether the blue cells sit on the wrong
# word or on those that betray the sloppy manner (`got`, `grabs`, `kept`, `guess`): a preference between responses
# cannot tell the two apart.

# %%
by_stage = training.logps_by_stage(study, domain, "allo", split)  # the pairs' log-probs after each stage
rows, keep = study.encoded(domain, split), study.keep_probabilities(domain, split)


def follow(i):  # the changes of rejected response i in each stage, and its key tokens at the end
    start = torch.tensor(rows[i]["rejected_reference"])
    forgot, learned = (torch.tensor(after[i]["rejected"]) for after in by_stage)  # [T]
    return forgot - start, learned - forgot, key_tokens(learned - forgot, stage.key_share)


forgetting, learning, key = follow(number)
strips = [("$p_t$: the rewriter keeps it", "low", keep[number]),
          ("$w_t$: selected to forget", "high", [float(p < threshold) for p in keep[number]]),
          ("change in forgetting", "change", forgetting.tolist()),
          ("key token", "marks", key.tolist()),
          ("change in learning", "change", learning.tolist())]
if study.domain(domain).kind == "miniature":
    strips.insert(0, ("wrong decision", "marks", study.oracle_tokens(domain, split)[number]))
print("prompt:", study.pairs(domain).rows[split][number]["prompt"])
draw(method_figures.token_panel(words, strips), "Changes of log-probability in nats; blue: less likely than before.")

# %% [markdown]
# Which tokens do the key tokens become, over all held-out rejected responses?

# %%
followed = [follow(i) for i in range(len(rows))]
chosen_keys = torch.cat([one[2] for one in followed])
groups = {"tokens that the rewriter would not keep": torch.cat([torch.tensor(p) < threshold for p in keep]),
          "tokens that fell in forgetting already": torch.cat([one[0] < 0 for one in followed]),
          "the first tokens, as at step 0": torch.cat([key_tokens(torch.zeros(len(p)), stage.key_share) for p in keep])}
if study.domain(domain).kind == "miniature":
    groups["wrong decisions"] = torch.tensor([v for one in study.oracle_tokens(domain, split) for v in one]) > 0
shares = {text: (inside[chosen_keys].float().mean().item(), inside.float().mean().item()) for text, inside in groups.items()}
table([{"key tokens among": text, "share of the key tokens": percent(ours), "of all rejected tokens": percent(every)}
       for text, (ours, every) in shares.items()], "Key tokens at the end of learning; equal shares would mean chance.")

# %% [markdown]
# ## The result
#
# ALLO beside what it is made of, every method at rates found by the same rule: the SFT model, DPO
# with as many updates as both stages (`dpo_long`), learning alone, forgetting alone, and learning from all
# tokens.

# %%
wanted = ("dpo", "dpo_long", "allo_no_learning", "allo_no_forgetting", "allo_all_tokens_learning", "allo")
run = [method for method in wanted if method in runs.methods_of(study, domain)]
found = runs.run_methods(study, {domain: ["sft_base", *dict.fromkeys(["dpo_long", "allo", *run])]})[domain]
scores = {method: scoring.score_of(found[method]) for method in ("sft_base", *run)}
draw(method_figures.method_dots(scores, xlabel=f"{scoring.unit(found['allo'])} (%)"), f"ALLO and its parts; {domain}, seed {seed}.")
(allo, error), (long, noise) = (scoring.score_of(found[method]) for method in ("allo", "dpo_long"))
start, start_error = scores["sft_base"]
say(f"**ALLO {percent(allo)}, DPO with as many updates {percent(long)}: {100 * (allo - long):+.1f} points on this seed** "
    f"(each with a standard error of {100 * max(error, noise):.1f} points over problems).")
harm = stats.far_below("ALLO", allo, start, math.hypot(error, start_error))
if harm:
    say(f"{harm}.")

# %% [markdown]
# ## What it means
#
# The key tokens are chosen by the model that is being trained: a token that has fallen a little is a key
# token of the next step and falls further. So they need not be the wrong words; the table above says how
# far they are. Selective-DPO ([2507.07725](https://arxiv.org/abs/2507.07725)) chooses by log-probability
# differences, too, but of a fixed model.
#
# One seed with one set of pairs decides nothing: results change more from seed to seed than from problem to
# problem. [05_ablations](05_ablations.ipynb) takes ALLO apart, and [06_evaluation](06_evaluation.ipynb) has the
# intervals over all seeds.
