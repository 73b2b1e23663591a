"""Losses beside others' code: TRL's trainers where it has them, else the authors' formulas.

The formulas are written out in numpy and float64 from the papers and the authors' repositories,
and compared on random log-probs.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_losses import close, draw
from tiny_models import VOCABULARY, tiny_llama

from allo_lib.method.losses import (
    bco_loss,
    dpo_loss,
    ipo_loss,
    rdpo_loss,
    sequence_npo_loss,
    simpo_loss,
    token_logps,
)

# --- authors' formulas ---

ROWS = 64


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def drawn():
    """Log-probs of whole responses under policy and reference, and lengths; float64 and int64."""
    rng = np.random.default_rng(0)
    lengths = [rng.integers(1, 40, ROWS) for _ in range(2)]
    policy, reference = ([-n * rng.uniform(0.05, 2, ROWS) for n in lengths] for _ in range(2))
    return policy, reference, lengths


def theirs(name, policy, reference, lengths):
    """The loss of each pair; beta .1, or 2 of SimPO."""
    (chosen, rejected), (ref_chosen, ref_rejected), (long, short) = policy, reference, lengths
    margin = 0.1 * (chosen - ref_chosen) - 0.1 * (rejected - ref_rejected)
    if name == "dpo":  # eric-mitchell/direct-preference-optimization, preference_loss
        return -log_sigmoid(0.1 * ((chosen - rejected) - (ref_chosen - ref_rejected)))
    if name == "rdpo":  # arXiv 2403.19159
        return -log_sigmoid(margin + 0.01 * long - 0.01 * short)
    if name == "ipo":  # arXiv 2310.12036, eq. 17, of log-probs per token
        h = (chosen / long - rejected / short) - (ref_chosen / long - ref_rejected / short)
        return (h - 1 / (2 * 0.1)) ** 2
    if name == "simpo":  # princeton-nlp/SimPO: gamma counts in units of beta there
        return -log_sigmoid(2 * (chosen / long - rejected / short - 0.5))
    if name == "npo":  # licong-lin/negative-preference-optimization: of losses, not log-probs
        return -log_sigmoid(0.1 * (-rejected + ref_rejected)) * 2 / 0.1
    # arXiv 2404.04656: TRL's BCOTrainer at its first batch, whose mean all of its average is.
    rewards = 0.1 * (chosen - ref_chosen), 0.1 * (rejected - ref_rejected)
    delta = np.concatenate(rewards).mean()
    return (-log_sigmoid(rewards[0] - delta) - log_sigmoid(-(rewards[1] - delta))) / 2


NAMED = {
    "dpo": lambda policy, reference, lengths: dpo_loss(*policy, *reference),
    "rdpo": lambda policy, reference, lengths: rdpo_loss(*policy, *reference, *lengths),
    "ipo": lambda policy, reference, lengths: ipo_loss(*policy, *reference, *lengths),
    "bco": lambda policy, reference, lengths: bco_loss(*policy, *reference),
    "simpo": lambda policy, reference, lengths: simpo_loss(*policy, *lengths),
    "npo": lambda policy, reference, lengths: sequence_npo_loss(policy[1], reference[1]),
}


@pytest.mark.parametrize("name", NAMED)
def test_same_loss_as_the_authors_formula(name):
    given = drawn()
    tensors = [[torch.tensor(side, dtype=torch.float32) for side in part] for part in given]
    close(NAMED[name](*tensors), theirs(name, *given))


# --- TRL ---


@pytest.fixture(scope="module")
def trl_trainer(tmp_path_factory):
    """A function (loss_type, beta, smoothing) -> (trainer, batch) around TRL's own DPOTrainer."""
    import datasets
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    specials = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials)
    rows = [
        {"prompt": "w1 w2 w3", "chosen": " w4 w5", "rejected": " w6 w7 w8 w9"},
        {"prompt": "w9", "chosen": " w4 w5 w8 w2 w2", "rejected": " w6"},
        {"prompt": "w20 w21", "chosen": " w22 w23", "rejected": " w24 w25"},
    ]
    folder = tmp_path_factory.mktemp("trl")

    def make(loss_type, beta, smoothing=0.0):
        arguments = DPOConfig(
            output_dir=str(folder),
            loss_type=[loss_type],
            beta=beta,
            label_smoothing=smoothing,
            per_device_train_batch_size=len(rows),
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        )
        trainer = DPOTrainer(
            model=tiny_llama(0),
            ref_model=tiny_llama(1),
            args=arguments,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        return trainer, next(iter(trainer.get_train_dataloader()))

    return make


def robust(pc, pr, rc, rr, beta, smoothing):
    """Robust DPO (arXiv 2403.00409): swapping the pair flips the label."""
    kept, flipped = dpo_loss(pc, pr, rc, rr, beta), dpo_loss(pr, pc, rr, rc, beta)
    return ((1 - smoothing) * kept - smoothing * flipped) / (1 - 2 * smoothing)


OURS = {
    "sigmoid": lambda logps, lengths, beta, _: dpo_loss(*logps, beta),
    "ipo": lambda logps, lengths, beta, _: ipo_loss(*logps, *lengths, beta),
    # Without the shift, which TRL's BCO on pairs leaves out, and the sum of both sides.
    "bco_pair": lambda logps, lengths, beta, _: 2 * bco_loss(*logps, beta, shift=0.0),
    "robust": lambda logps, lengths, beta, smoothing: robust(*logps, beta, smoothing),
}


@pytest.mark.parametrize("loss_type", OURS)
def test_same_loss_and_gradient_as_trl_dpo_trainer(trl_trainer, loss_type):
    beta, smoothing = (0.7, 0.2) if loss_type == "robust" else (0.3, 0.0)
    trainer, batch = trl_trainer(loss_type, beta, smoothing)
    theirs = trainer.compute_loss(trainer.model, dict(batch))
    theirs.backward()

    policy, reference = tiny_llama(0), tiny_llama(1)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    chosen, rejected = token_logps(policy(**inputs).logits, labels).sum(dim=1).chunk(2)
    with torch.no_grad():
        ref = token_logps(reference(**inputs).logits, labels).sum(dim=1).chunk(2)
    lengths = batch["completion_mask"].sum(dim=1).chunk(2)
    ours = OURS[loss_type]((chosen, rejected, *ref), lengths, beta, smoothing).mean()
    ours.backward()

    untrained = {"ipo": (0.5 / beta) ** 2, "bco_pair": 2 * math.log(2)}
    assert abs(theirs.item() - untrained.get(loss_type, math.log(2))) > 0.01
    close(ours, theirs.item())
    expected = {name: p.grad for name, p in trainer.model.named_parameters()}
    for name, parameter in policy.named_parameters():
        close(parameter.grad, expected[name])


@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
def test_same_loss_and_gradient_as_trl_simpo():
    from trl.experimental.cpo import CPOTrainer

    settings_ = SimpleNamespace(
        alpha=0.0,
        accelerator=SimpleNamespace(device=torch.device("cpu")),
        loss_type="simpo",
        simpo_gamma=1.3,
        beta=2.2,
        label_smoothing=0.0,
    )
    logits = draw(2, 4, 8, VOCABULARY)
    labels = torch.randint(0, VOCABULARY, (2, 4, 8), generator=torch.Generator().manual_seed(5))
    for row in range(4):
        labels[0, row, : row + 1] = -100
        labels[1, row, 8 - row :] = -100
    theirs_in, ours_in = (logits.clone().requires_grad_() for _ in range(2))
    averaged = [CPOTrainer.get_batch_logps(theirs_in[i], labels[i], True) for i in range(2)]
    theirs, _, _ = CPOTrainer.cpo_loss(settings_, *averaged)
    logps = [token_logps(ours_in[i], labels[i]) for i in range(2)]
    lengths = [(labels[i][:, 1:] != -100).sum(dim=1) for i in range(2)]
    ours = simpo_loss(*(x.sum(dim=1) for x in logps), *lengths, beta=2.2, gamma=1.3)
    close(ours, theirs.detach())
    theirs.sum().backward()
    ours.sum().backward()
    close(ours_in.grad, theirs_in.grad)
