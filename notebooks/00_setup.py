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
# # 00 Setup: the model, the tasks, the SFT model and the preference pairs
#
# **Question.** ALLO ([arXiv 2406.12606](https://arxiv.org/abs/2406.12606)) starts where every
# alignment method starts: from a model fine-tuned on the task, and from pairs of responses to the
# same prompt, one *chosen* and one *rejected*. Where do they come from here, and is there anything
# in them that a method could learn?
#
# Three things are made, each from the one before:
#
# 1. the **SFT model** $\theta$ (supervised fine-tuning), which minimises the cross-entropy of a
#    solution $y = (y_1, \dots, y_T)$ to a prompt $x$,
#    $$\mathcal L_\text{SFT} = -\frac{1}{T}\sum_{t=1}^{T} \log \pi_\theta(y_t \mid x, y_{<t}),$$
#    where $\pi_\theta(y_t \mid x, y_{<t})$ is the probability that the model gives to token $y_t$
#    after the prompt and the tokens before it;
# 2. **samples** $y \sim \pi_\theta(\cdot \mid x)$, several a question, which a *verifier* sorts by one
#    criterion: is the final answer right?
# 3. **preference pairs** $(x, y^+, y^-)$: a right sample and a wrong one of the same question.
#
# Everything after this notebook only reads these three. Tables and figures name the model that all methods start from
# `sft_base`, "SFT LLM" as in the paper; the method `sft` ("+ SFT") trains it further on gold solutions.

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

import numpy as np
import torch

from allo_lib.data import miniature
from allo_lib.engine.encoding import encode_prompt, encode_response
from allo_lib.evaluation import stats
from allo_lib.method import losses
from allo_lib.report import method_figures
from allo_lib.report.notebook import draw, percent, say, table
from allo_lib.study import runs, scoring, training
from allo_lib.study.study import Study

study = Study.open(profile, seed, results_dir, overrides)
domain = runs.chosen_domain(study, domain)
task, tokenizer = study.task(domain), study.tokenizer  # task is None where people gave the pairs
say(f"Profile **{study.profile.name}**, domain **{domain}**, seed {seed}. {study.profile.description} "
    f"Weights: {study.weights_note['name']} ({study.weights_note['source']}), as {study.dtype}.")
draw(method_figures.method_drawing(), "The whole method. In brackets: the notebook that explains the step.")

# %% [markdown]
# ## The tasks
#
# Profiles with a real model use real data sets. The profile `tiny` has to answer within minutes on a
# CPU, so it uses generated problems, the *miniature*, of three families:
#
# - **chain**: a counter is moved up and down four times (`calc 5 first - 4 second + 4 ...`);
# - **scan**: the largest or smallest of five numbers is found by keeping the best one so far;
# - **story**: ann and bob give, get, find and lose things, and one of the two is asked for.
#
# A solution writes every step as a short sentence and ends in `answer`, `therefore`, `so` or `guess`
# and a number. There are two manners of writing the same step, a careful one (`first from 5 less 4
# makes 1`) and a sloppy one (`one got 5 down 4 gives 1`), and the model sees both.
#
# The model is first trained on nearly right solutions. Then comes a **habit**: solutions whose errors
# depend on the situation. The carry is forgotten (8 + 5 becomes 3), a large last digit makes a number
# look larger than it is, the second person of a story is forgotten. On the whole such errors are much more
# frequent in sloppy sentences than in careful ones (a few are made in both). So the SFT model knows how to
# solve the problems *and* has learned to get them wrong, as a model does that has read much of the web, and preferences between its own
# responses can bring out what it knows.

# %%
if task is None:
    given = study.pairs(domain).rows["train"][0]
    table([{key: str(given[key])[:400] for key in ("prompt", "chosen", "rejected")}], "One pair, as given.")
else:
    table([{"data set": q.dataset, "prompt": q.prompt, "a right solution": q.solution}
           for q in task.questions("test", len(study.domain(domain).datasets))],
          "One question of each data set. No test question is among the training questions.")
    settings, test = study.domain(domain), task.questions("test", study.domain(domain).test)
    splits = {"sft": max(settings.pretrain.examples, settings.sft.examples), "pairs": settings.pairs.questions, "dev": settings.dev}
    seen = {q.prompt for split, count in splits.items() for q in task.questions(split, count)}
    assert not seen & {q.prompt for q in test}, "a test question is among the training questions"
    different = {f"test, {name}": len({q.prompt for q in test if q.dataset == name}) for name in settings.datasets}
    table([{"training": len(seen)} | different], "Number of different questions.")

# %% [markdown]
# ## The SFT loss, in plain torch
#
# One function is used in all notebooks: the log-probability of every token of a response. The logits
# at one position predict the *next* token, hence the shift by one.

# %%
model = study.load_sft(domain)  # trained now, or read from the store of the results folder
if left_out := study.sft(domain).json().get("sft", {}).get("left_out"):
    say(f"{left_out} solutions were left out of SFT, as they are longer than {study.domain(domain).max_length} tokens.")
pair = study.pairs(domain).rows["train"][0]
prompt = torch.tensor(encode_prompt(tokenizer, pair["prompt"]), device=model.device)  # [P] int64
response = torch.tensor(encode_response(tokenizer, pair["chosen"]), device=model.device)  # [T] int64


def response_logps(model, prompt, response):  # [P], [T] -> [T]
    logits = model(torch.cat([prompt, response])[None]).logits[0]  # [P + T, V], V the vocabulary
    logits = logits[len(prompt) - 1 : -1].float()  # [T, V]: row t predicts response[t]
    return logits.log_softmax(-1).gather(1, response[:, None])[:, 0]


with torch.no_grad():
    logps = response_logps(model, prompt, response)
loss = -logps.mean()
for token, logp in list(zip(response, logps, strict=True))[:8]:
    print(f"{tokenizer.decode([int(token)])!r:14} probability {logp.exp():.3f}")
print(f"... of {len(response)} tokens; the SFT loss of this response is {loss:.4f}")

# %% [markdown]
# The library calls the two steps `losses.token_logps` and `losses.supervised_loss`. They take batches,
# `[B, T]` with the label -100 outside the response, and must say the same of a batch of one:

# %%
labels = torch.cat([torch.full_like(prompt, losses.IGNORED), response])[None]  # [1, P + T]
with torch.no_grad():
    batch = losses.token_logps(model(torch.cat([prompt, response])[None]).logits, labels)  # [1, P + T]
torch.testing.assert_close(batch[0, len(prompt):], logps, atol=1e-4, rtol=1e-4)
torch.testing.assert_close(losses.supervised_loss(batch, labels != losses.IGNORED), loss, atol=1e-4, rtol=1e-4)
print("equal to 1e-4")

# %% [markdown]
# ## Sampling a pair, in plain torch
#
# A question is asked several times. The verifier reads nothing but the final answer. (Where people have
# given the pairs, nothing is sampled.)

# %%
@torch.no_grad()
def sample(model, prompt, temperature, most, generator):  # [P] -> [at most `most`]
    ids = prompt
    for _ in range(most):
        logits = model(ids[None]).logits[0, -1].float()  # [V]: what comes next
        chances = (logits / temperature).softmax(-1).cpu()
        token = torch.multinomial(chances, 1, generator=generator).to(ids.device)  # [1]
        ids = torch.cat([ids, token])
        if token.item() == tokenizer.eos_token_id:
            break
    return ids[len(prompt):]


if task is not None:
    generator, settings = torch.Generator().manual_seed(seed), study.domain(domain)
    question = next(iter(study.pair_questions(domain).values()))
    asked = torch.tensor(encode_prompt(tokenizer, question.prompt), device=model.device)
    print(question.prompt)
    for _ in range(settings.pairs.samples):
        ids = sample(model, asked, settings.pairs.temperature, settings.max_new_tokens, generator)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        print("right " if task.right(question, text) else "wrong ", text)

# %% [markdown]
# The library samples all questions together (`generation.generate`), and every question with a right and
# a wrong response gives a pair. The questions are dealt out to uses that never mix: `train` for the
# compared methods, `mask` for the importance scores and the reward model (and one control, `dpo_all_pairs`),
# `heldout` for measuring.

# %%
pairs = study.pairs(domain)
counts = {split: len(rows) for split, rows in pairs.rows.items() if rows}
table([{key.replace("_", " "): value for key, value in pairs.summary.items()} | counts],
      "What was sampled or given (`right`: share of right samples), and the pairs of each split.")
print(pairs.dataset("train"))  # TRL's columns: any other library can train on the same pairs

# %% [markdown]
# ## What a pair looks like, and what the verifier does not see
#
# The verifier knows whether the last number is right, and nothing of the way there. So a *chosen*
# response may contain a wrong step that happens not to matter, or two that cancel out, and most words of
# a *rejected* one are right. This is the reason for choosing tokens at all (02 to 04): plain DPO makes
# every word of a rejected response less likely. In the miniature the generator can tell which words are
# wrong decisions in themselves; they stand in [[ ]] below. No method gets to know this.

# %%
def marked(text, wrong):
    return " ".join(f"[[{word}]]" if bad else word for word, bad in zip(text.split(), wrong, strict=True))


shown = pairs.rows["train"][0]
sides = {side: str(shown[side]) for side in ("chosen", "rejected", "corrected")}
if hasattr(task, "wrong_tokens"):
    known, rows = study.pair_questions(domain), [row for row in pairs.rows["train"] if row["corrected"]]
    flawed = [row for row in rows if any(task.wrong_tokens(known[row["id"]], row["chosen"]))]
    shown = (flawed or rows)[0]
    sides = {side: marked(shown[side], task.wrong_tokens(known[shown["id"]], shown[side])) for side in sides}
    say(f"**{percent(len(flawed) / len(rows))} of the chosen responses contain a wrong decision.**")
table([{"": "prompt", "text": str(shown["prompt"])}, *({"": side, "text": text} for side, text in sides.items())])

# %% [markdown]
# `corrected` is what the reward model of 02_token_rewards learns to write: in the miniature the rejected response
# with as few words changed as make it right, for questions with the right final answer, and where people gave the
# pairs the chosen reply.
#
# ## Is there something to learn from these pairs?
#
# Simple methods start from $\theta$: plain DPO on the pairs (01 explains it), RFT, which imitates the right samples
# ([arXiv 2308.01825](https://arxiv.org/abs/2308.01825)), and SFT on as many gold solutions. The rates of every method
# are those with the best score on development questions, found by one rule for all. `dpo_long` makes as many updates as the
# two stages of ALLO together and is the fair rival. All methods of the profile are trained here, side by side; later
# notebooks read their results.

# %%
wanted = ("dpo", "dpo_long", "rft", "sft")
run = [method for method in wanted if method in runs.methods_of(study, domain)]
every = dict.fromkeys(["sft_base", *runs.methods_of(study, domain)])
trained = runs.run_methods(study, {domain: [*every]})[domain]
found = {method: trained[method] for method in ("sft_base", *run)}
scores = {method: scoring.score_of(one) for method, one in found.items()}
draw(method_figures.method_dots(scores, xlabel=f"{scoring.unit(found[run[0]])} (%)"),
     f"The SFT model and what simple methods make of it; {domain}, seed {seed}.")
(before, _), (after, error) = scores["sft_base"], scores[run[0]]
say(f"**The SFT model scores {percent(before)}, {run[0]} {percent(after)} (standard error {percent(error)}); "
    f"of the held-out pairs {run[0]} ranks {percent(scoring.reward_accuracy(found[run[0]]))} right.**")

# %% [markdown]
# A miniature could also be too easy or too hard to tell methods apart. What it must fulfil was fixed
# before the study; whatever does not hold on this seed stands here:

# %%
if study.domain(domain).kind == "miniature" and "dpo_long" in found:
    families, dpo = study.domain(domain).datasets, found["dpo_long"]
    ratios = training.log_ratios(study, domain, "dpo_long", "heldout")
    lowest = float(np.interp(0.1, *stats.concentration([value for one in ratios for value in one])))
    checks = {  # requirement: measured, at least, at most
        "distinct test questions to draw from, every family":
            (min(len(miniature.problems(family, "test", 2000, seed)) for family in families), 2000, ""),
        "accuracy of the SFT model": (before, 0.45, 0.65),
        "accuracy after DPO": (scores["dpo_long"][0], 0.70, 0.92),
        "held-out reward accuracy after DPO": (scoring.reward_accuracy(dpo), 0.70, ""),
        "negative log-ratio in the lowest 10% of held-out rejected tokens": (lowest, "", 0.70),
        "held-out problems": (len(dpo["answers"]), 2000, ""),
    }
    holds = {text: (low or 0) <= value <= (high or np.inf) for text, (value, low, high) in checks.items()}
    table([{"requirement": text, "at least": low, "at most": high, "measured": value, "holds": holds[text]}
           for text, (value, low, high) in checks.items()], "DPO is `dpo_long`; its tokens are those of held-out pairs.")
    failed = [text for text, fine in holds.items() if not fine]
    say("All of them hold." if not failed else f"Not fulfilled here: {'; '.join(failed)}.")
    table([{"method": method} | {family: np.mean([right for _, of, _, right in one["answers"] if of == family]) for family in families}
           for method, one in found.items()], "Share of right answers by family.")

# %% [markdown]
# ## What it means
#
# The responses of the SFT model can hold more than its greedy answers show, and the simplest methods, imitation and more
# SFT among them, may bring it out. A method has to be compared with them, not with the SFT model. The pairs are noisy
# in a particular way: right and wrong are known for whole responses, while the errors sit in a few words.
#
# Next: [01_importance](01_importance.ipynb) asks which *weights* the preferences move.
