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
#
# ALLO asks a *rewriter* (RLMEC, [arXiv 2401.06081](https://arxiv.org/abs/2401.06081)): a small model that is
# trained to turn a question $x$, a correct solution $s$ and a wrong prediction $\hat y$ into the minimally
# corrected prediction. Then it is asked how likely it would write the wrong prediction itself,
# $$p_t = P_\text{RM}(\hat y_t \mid x, s, \hat y, \hat y_{<t}).$$
# Where it would write something else, $p_t$ is low: the token is *unaligned*. From $p_t$ follows the
# weight $w_t$ of the token in forgetting (03), by one of three rules:
#
# | rule | $w_t$ | |
# | --- | --- | --- |
# | `threshold` | $1$ if $p_t < 0.5$, else $0$ | the paper's figure; the default here |
# | `soft` | $1 - p_t$ | |
# | `released` | $p_t$ | what the released code feeds to its loss: it forgets the *good* tokens most |

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

import numpy as np
import torch

from allo_lib.engine import rewriter
from allo_lib.engine.encoding import encode_response
from allo_lib.evaluation import stats
from allo_lib.method.tokens import unaligned_weights
from allo_lib.profiles import methods
from allo_lib.report import method_figures
from allo_lib.report.notebook import draw, percent, say, table
from allo_lib.study import importance, runs, training
from allo_lib.study.study import Study

study = Study.open(profile, seed, results_dir, overrides)
domain = runs.chosen_domain(study, domain)
tokenizer, threshold = study.tokenizer, study.profile.method.token_threshold

# %% [markdown]
# ## From probabilities to weights, by hand
#
# A rewriter over four words reads the wrong prediction "5 less 4 makes 2" and has these probabilities for
# the word at each place. At the last place it would rather write 1.

# %%
words = ["1", "2", "4", "5", "less", "makes"]
said = ["5", "less", "4", "makes", "2"]  # T = 5 tokens
chances = torch.tensor([  # [T, V]: row t is the distribution of the word at place t
    [0.01, 0.01, 0.03, 0.95, 0.00, 0.00],
    [0.00, 0.00, 0.00, 0.00, 0.98, 0.02],
    [0.10, 0.05, 0.80, 0.05, 0.00, 0.00],
    [0.00, 0.00, 0.00, 0.00, 0.03, 0.97],
    [0.88, 0.06, 0.03, 0.03, 0.00, 0.00],
])
ids = torch.tensor([words.index(word) for word in said])  # [T]
p = chances.gather(1, ids[:, None])[:, 0]  # [T]: p_t, the probability of the word that stands there
w = {"threshold": (p < 0.5).float(), "soft": 1 - p, "released": p}  # each [T]
table([{"word": said[t], "p_t": p[t].item(), **{rule: v[t].item() for rule, v in w.items()}} for t in range(5)])

for rule, value in w.items():  # the library's function takes batches, [B, T]
    torch.testing.assert_close(unaligned_weights(p[None], torch.ones(1, 5, dtype=torch.bool), rule)[0], value)

# %% [markdown]
# ## What the rewriter reads
#
# It begins as the SFT model and learns by plain SFT (the loss of 00_setup) on the pairs of the split
# `mask`, which no method but one control is trained on. Prompt: question, correct solution, wrong prediction.
# Response: the correction. In the miniature the generator makes exact minimal edits; for questions the
# final answer is replaced by the gold one; where people gave the pairs, the chosen reply takes the place
# of both solution and correction.

# %%
rows = study.pairs(domain).rows["heldout"]


def changed_places(row):  # where the correction has another token, [T] bool
    said, right = (encode_response(tokenizer, row[key] or row["rejected"]) for key in ("rejected", "corrected"))
    return [t >= len(right) or right[t] != token for t, token in enumerate(said)]


# A short example whose correction changes one to four tokens, if there is one.
number = next((i for i, row in enumerate(rows) if 1 <= sum(changed_places(row)) <= 4), 0)
row = rows[number]
reads = rewriter.rewriter_prompt(tokenizer, row["prompt"], row["solution"], row["rejected"], study.plain)  # [P] ids
print("reads:", tokenizer.decode(reads), "\nlearns to write:", row["corrected"])

# %% [markdown]
# ## The rewriter's training and its probabilities, in plain torch
#
# To see what the training does, a copy of the SFT model is trained on this single example: what becomes of
# its probability of the words to change, and of the others?

# %%
def response_logps(model, prompt, response):  # [P], [T] -> [T]
    logits = model(torch.cat([prompt, response])[None]).logits[0]  # [P + T, V]
    return logits[len(prompt) - 1 : -1].log_softmax(-1).gather(1, response[:, None])[:, 0]


model = copy.deepcopy(study.load_sft(domain)).float()
reads, said, corrected = (torch.tensor(ids, device=model.device) for ids in (
    reads, encode_response(tokenizer, row["rejected"]), encode_response(tokenizer, row["corrected"] or row["rejected"])))
wrong = torch.tensor(changed_places(row), device=model.device)  # [T]
optimizer = torch.optim.AdamW(model.parameters(), lr=study.domain(domain).rewriter.learning_rate / 4)
for step in range(11):
    with torch.no_grad():
        p = response_logps(model, reads, said).exp()  # [T]: p_t of the prediction
    if step % 2 == 0:
        groups = {"to change": p[wrong], "of the others": p[~wrong]}
        means = [f"{text} {values.mean():.3f}" for text, values in groups.items() if len(values)]
        print(f"step {step:2}: mean p_t of the words {', '.join(means)}")
    loss = -response_logps(model, reads, corrected).mean()  # of the correction
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

# %% [markdown]
# ## The same with the study's rewriter
#
# `Study.reward_model` trains it on all corrections of the split `mask`, and `rewriter.keep_probabilities`
# computes $p_t$ in batches.

# %%
trained = copy.deepcopy(study.load(study.reward_model(domain))).float()
with torch.no_grad():
    p = response_logps(trained, reads, said).exp()  # [T]
examples = study.pairs(domain).corrections("heldout")[number : number + 4]
library = rewriter.keep_probabilities(trained, tokenizer, examples, 4, study.plain)  # a list a response
torch.testing.assert_close(torch.tensor(library[0]), p.cpu(), atol=1e-4, rtol=1e-3)
record = study.reward_model(domain).json()
say(f"Equal to a thousandth. The study's rewriter learned from {record['examples']} corrections; its loss went from "
    f"{record['loss'][0]:.2f} to {record['loss'][-1]:.2f}.")

# %% [markdown]
# One rejected response, aligned with its correction. In the miniature the generator also knows which words
# are wrong decisions in themselves; words that merely follow from an earlier error are not marked there,
# but the correction changes them too.

# %%
tokens, right = ([study.tokenizer.decode([i]) for i in ids.tolist()] for ids in (said, corrected))
aligned = (right + [""] * len(tokens))[: len(tokens)]
strips = [("correction", "words", [b if a != b else "" for a, b in zip(tokens, aligned, strict=True)])]
if study.domain(domain).kind == "miniature":
    strips.append(("wrong decision", "marks", study.oracle_tokens(domain, "heldout")[number]))
strips += [("$p_t$", "low", p.tolist()), ("$w_t$ (threshold)", "high", (p < threshold).float().tolist())]
print("prompt:", row["prompt"])
draw(method_figures.token_panel(tokens, strips), "A held-out rejected response, token by token. Orange: what forgetting will work on.")

# %% [markdown]
# ## Does it find the wrong decisions?
#
# In the miniature the rewriter can be graded, and so can worse ones: untrained, trained on a quarter of the examples (`early`), and trained
# on corrections that belong to other questions. Elsewhere only the distribution of $p_t$ can be shown.

# %%
probabilities = [value for one in study.keep_probabilities(domain, "heldout") for value in one]
groups = {"all rejected tokens": probabilities}
if study.domain(domain).kind == "miniature":
    truth = [value for one in study.oracle_tokens(domain, "heldout") for value in one]
    pairs = list(zip(probabilities, truth, strict=True))
    groups = {"wrong decisions": [v for v, bad in pairs if bad], "other tokens": [v for v, bad in pairs if not bad]}
draw(method_figures.probability_histogram(groups, threshold), f"Held-out rejected tokens of {domain}, seed {seed}.")
if study.domain(domain).kind == "miniature":
    grades = [importance.separation(study, domain, quality) for quality in ("trained", "early", "shuffled", "untrained")]
    table(grades, "auc: chance that a wrong decision gets a lower p_t than another token (0.5 is guessing); selected: "
          "share of all tokens below the threshold; found: share of the wrong decisions among them.")
    say(f"**The rewriter selects {percent(grades[0]['selected'])} of the rejected tokens and finds "
        f"{percent(grades[0]['found'])} of the wrong decisions (AUC {grades[0]['auc']:.2f}).**")
    say("It selects far more tokens than are wrong: those that merely follow from an error, and those for which it would have "
        "used another word of the same meaning. A rewriter of *shuffled* corrections cannot know what is right; where it ranks "
        "well, too, a high AUC does not show that the question was read.")
else:
    selected = [p < threshold for one in study.keep_probabilities(domain, "train") for p in one]
    say(f"**The threshold rule selects {percent(sum(selected) / len(selected))} of the rejected tokens.**")
nothing = stats.no_choice_of_tokens(study.forgetting_weights(domain, methods.stages_of("allo", study.profile)[0]))
if nothing:
    say(f"{nothing[0].upper()}{nothing[1:]}.")

# %% [markdown]
# ## Could choosing tokens matter? DPO's own token rewards
#
# Plain DPO has a reward for each token, too: $\beta\Delta_t$ with
# $\Delta_t = \log\pi_\theta(y_t) - \log\pi_\text{ref}(y_t)$ (01). If it put all of a rejected response's
# negative $\Delta_t$ on one token, DPO would choose by itself; if it spread it evenly, it would not choose at
# all. The learning stage (04) keeps the tokens with the lowest $\Delta_t$.

# %%
runs.run_methods(study, {domain: ["dpo_long"]})
ratios = training.log_ratios(study, domain, "dpo_long", "heldout")
curve, lowest = stats.concentration([value for one in ratios for value in one]), 0.1  # of the tokens
negative = [sorted(min(value, 0.0) for value in one) for one in ratios]
within = sum(sum(one[: max(1, round(lowest * len(one)))]) for one in negative) / sum(map(sum, negative))
draw(method_figures.concentration_curve(domain, *curve, lowest),
     "Share of the negative log-ratio of held-out rejected responses that the lowest tokens hold, after plain DPO.")
say(f"**After plain DPO the lowest {percent(lowest, 0)} of the rejected tokens hold {percent(np.interp(lowest, *curve))} "
    f"of the negative log-ratio** (counted within each response: {percent(within)}).")

# %% [markdown]
# ## What it means
#
# The rewriter reads a correct solution, which no method has at test time: it is a teacher, and its marks
# are only as good as its training. Others choose tokens without one: by learned sparse masks (SparsePO,
# [2410.05102](https://arxiv.org/abs/2410.05102)), by gradient attribution (TI-DPO,
# [2505.19653](https://arxiv.org/abs/2505.19653)), by log-probability differences as in ALLO's second stage
# (Selective-DPO, [2507.07725](https://arxiv.org/abs/2507.07725)), or by the policy's own confidence (ConfPO,
# [2506.08712](https://arxiv.org/abs/2506.08712)), the cheapest rival;
# [2506.01939](https://arxiv.org/abs/2506.01939) finds the 20% of tokens with the highest entropy enough.
# Whether ALLO's choice helps the trained model is asked in 05_ablations, by comparing it with all tokens and
# with as many random ones.
#
# Next: [03_forgetting](03_forgetting.ipynb) unlearns the tokens with $w_t = 1$.
