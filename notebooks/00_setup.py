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
# # 00 Setup: the model, the tasks, the SFT model and the preference pairs
#
# **Question.** ALLO ([arXiv 2406.12606](https://arxiv.org/abs/2406.12606)) starts where every
# alignment method starts: from a model $\theta$ fine-tuned on the task (SFT), and from pairs of
# responses to a prompt $x$, one *chosen* $y^+$ and one *rejected* $y^-$. Where do they come from here,
# and can they decide the paper's claims at all?
#
# The SFT loss is cross-entropy on the tokens of the solution,
# $$\mathcal L_\text{SFT} = -\frac{1}{|y|}\sum_{t} \log \pi_\theta(y_t \mid x, y_{<t}),$$
# with $\pi_\theta$ the model's distribution. Pairs are sampled from the SFT model and sorted by a
# verifier (is the final answer right?), as in the paper; where people have given the pairs, those
# are taken.

# %% tags=["parameters"]
profile = "tiny"  # name, or path of a YAML file
seed = 0
results_dir = ""  # "" is results/<profile>
overrides = {}  # profile keys to change, dotted: {"domains.miniature.epochs": 2}

# %%
from allo_lib import analysis, figures, parallel, results
from allo_lib.notebook import percent, say, show, table
from allo_lib.study import Study

study = Study.open(profile, seed, results_dir, overrides)
say(f"Profile **{study.profile.name}**, size {study.profile.size}, seed {seed}: "
    f"{study.profile.description}")

# %% [markdown]
# ## The tasks
#
# One question of each data set, with the solution the model is to learn.

# %%
for name in study.profile.domains:
    task = study.task(name)
    if task is None:
        rows = [{key: str(row[key])[:300] for key in ("prompt", "chosen", "rejected")}
                for row in study.pairs(name).rows["train"][:2]]
    else:
        questions = task.questions("test", len(study.domain(name).datasets))
        rows = [{"data set": q.dataset, "prompt": q.prompt, "solution": q.solution}
                for q in questions]
    table(rows, f"Examples of the domain {name}.")

# %% [markdown]
# No test question may occur in training. Counted over everything this seed trains on:

# %%
for name in study.profile.domains:
    if study.task(name) is not None:
        counts = analysis.distinct_questions(study, name)
        table([counts], f"Distinct prompts of {name}; none of the test prompts is a training prompt.")

# %% [markdown]
# ## The SFT model
#
# In the miniature the model first learns nearly right solutions and then a *habit*: errors that
# depend on the context and show in the wording. It knows better, and preferences can bring that out.

# %%
for name in study.profile.domains:
    record = study.sft(name).json()
    curves = {phase: [values["loss"]] for phase, values in record.items()}
    if curves:
        figure = figures.loss_curves(curves, title=f"supervised training, {name}")
        show(figure, study, f"00_sft_{name}",
             f"Loss of the supervised phases of {name}, seed {seed}; each has its own length.")
weights = study.weights_note
say(f"Weights: {weights['name']} ({weights['source']}), as {study.dtype}.")

# %% [markdown]
# ## The preference pairs
#
# Several responses are sampled to each question. A question that got right and wrong ones gives a
# pair. The questions are dealt out to four uses that never mix: `train` for the compared methods,
# `mask` for importance scores and the reward model, `heldout` for measuring, `dev` for choosing
# learning rates where nothing is answered.

# %%
for name in study.profile.domains:
    pairs = study.pairs(name)
    table([pairs.summary | {split: len(rows) for split, rows in pairs.rows.items()}],
          f"{name}: what was sampled or given, and the pairs of each split.")

# %% [markdown]
# The columns are those that TRL expects, so that other libraries can train on the same pairs:

# %%
first = next(iter(study.profile.domains))
print(study.pairs(first).dataset("train"))
pair = study.pairs(first).rows["train"][0]
table([{"": key, "text": str(pair[key])} for key in ("prompt", "chosen", "rejected", "corrected")],
      "One pair. `corrected` is the rejected response with as few words changed as make it right: "
      "what the reward model of 02_token_rewards learns to write.")

# %% [markdown]
# ## Can these pairs decide the claims?
#
# Plain DPO is trained from $\theta$ on the pairs, at the best of equally many learning rates on the
# development split (never on the test split). If it did not rank held-out pairs better than chance,
# or ended near 100%, no method could be told from another. RFT, which imitates the right responses
# ([arXiv 2308.01825](https://arxiv.org/abs/2308.01825)), shows what the chosen side alone is worth, and
# SFT on as many gold solutions what more of the same would have been.

# %%
others = ("dpo_long", "rft", "sft")
asked = {name: ["sft_base", "dpo", *(m for m in others if m in results.methods_of(study, name))]
         for name in study.profile.domains}
for name, found in parallel.run_methods(study, asked).items():
    (before, error), (after, error_after) = (analysis.score_of(found[m]) for m in ("sft_base", "dpo"))
    say(f"**{name}**: the SFT model scores {percent(before)} (standard error {percent(error)}), DPO "
        f"{percent(after)} ({percent(error_after)}), with held-out reward accuracy "
        f"{percent(analysis.reward_accuracy(found['dpo']))}. The others: "
        + ", ".join(f"{m} {percent(analysis.score_of(found[m])[0])}" for m in asked[name][2:]) + ".")

# %%
for name in study.profile.domains:
    if study.domain(name).kind == "miniature":
        checks = analysis.requirements(study, name)
        table(checks, "What a miniature must fulfil, measured on this seed. DPO is `dpo_long`, with as "
              "many updates as the compared methods; its tokens are those of held-out pairs.")
        table(analysis.by_dataset(study, name, ["sft_base", "dpo", "dpo_long"]), "Accuracy by family: "
              "near 100% a family can no longer tell good methods apart.")
        failed = [row["requirement"] for row in checks if not row["holds"]]
        say("All of them hold." if not failed else f"**Not fulfilled: {'; '.join(failed)}.**")

# %% [markdown]
# Everything above is kept in the store of the results folder; the next notebooks read it from there.
