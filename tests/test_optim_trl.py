"""`MaskedAdamW` as the optimizer of TRL's own DPOTrainer, under bf16 autocast, its default."""

import pytest
import torch
from datasets import Dataset
from test_bad_models import words
from tiny_models import tiny_llama, weights_of
from trl import DPOConfig, DPOTrainer

from allo_lib.method.importance import select_neurons
from allo_lib.method.optim import MaskedAdamW

PAIRS = Dataset.from_list(
    [{"prompt": f"w{i} w2", "chosen": " w3 w4", "rejected": f" w{5 + i} w6"} for i in range(8)]
)


def trained(folder, granularity: str, bf16: bool):
    """(the model, its weights before, its mask, log history) of three epochs at a share of 30%."""
    model = tiny_llama()
    generator = torch.Generator().manual_seed(0)
    scores = {n: torch.rand(v.shape, generator=generator) for n, v in model.named_parameters()}
    mask = select_neurons(scores, 0.3, granularity=granularity)
    before = weights_of(model)
    optimizer = MaskedAdamW(model, mask, lr=5e-3, max_grad_norm=1.0)
    config = DPOConfig(
        output_dir=str(folder), per_device_train_batch_size=4, num_train_epochs=3, bf16=bf16,
        max_grad_norm=0, use_cpu=True, report_to=[], logging_steps=1, save_strategy="no",
        gradient_checkpointing=False, disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = DPOTrainer(
        model, ref_model=tiny_llama(), args=config, train_dataset=PAIRS, processing_class=words(),
        optimizers=(optimizer, None),
    )  # fmt: skip
    trainer.train()
    optimizer.close()
    return model, before, mask, [one["loss"] for one in trainer.state.log_history if "loss" in one]


@pytest.mark.parametrize("granularity", ["scalar", "row"])
def test_kept_entries_are_trained_and_no_others_in_trls_trainer(tmp_path, granularity):
    results = [trained(tmp_path, granularity, bf16) for bf16 in (True, False)]
    for model, before, mask, losses in results:
        assert losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[-1] < 0.6
        for name, value in model.named_parameters():
            kept = mask.dense(name)
            assert value.dtype == torch.float32
            assert torch.equal(value[~kept], before[name][~kept])
    # Of those kept some are of words that no pair has: they move in neither.
    (half, before, *_, losses), (full, *_, exact) = results
    assert losses == pytest.approx(exact, abs=0.02)
    assert any(
        not torch.equal(a, b) for a, b in zip(half.parameters(), full.parameters(), strict=True)
    )
    way = [
        torch.cat([(v - before[n]).flatten() for n, v in m.named_parameters()])
        for m in (half, full)
    ]
    assert torch.cosine_similarity(*way, dim=0) > 0.95


@pytest.mark.parametrize("bias", [True, False])
def test_row_gradients_under_autocast_are_those_of_a_plain_linear_layer(bias):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=bias), torch.nn.Linear(5, 3, bias=bias))
    x = torch.randn(7, 6, requires_grad=True)
    scores = {n: torch.rand(v.shape) for n, v in model.named_parameters()}
    mask = select_neurons(scores, 0.6, granularity="row")

    def gradients(step):
        x.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(x).float().square().sum()
        loss.backward()
        return [x.grad, *step()]

    plain = gradients(lambda: [v.grad.clone() for v in model.parameters()])
    model.zero_grad(set_to_none=True)
    optimizer = MaskedAdamW(model, mask)
    packed = {p.name: p for p in optimizer._packed}
    taken = gradients(lambda: [packed[n].master.grad for n in packed])
    assert any(p.linear is not None for p in packed.values())
    assert torch.equal(plain[0], taken[0])
    named = dict(zip([n for n, _ in model.named_parameters()], plain[1:], strict=True))
    for name, gradient in zip(packed, taken[1:], strict=True):
        expected = named[name].flatten()[mask.indices[name]]
        assert torch.allclose(gradient, expected, rtol=1e-2, atol=1e-3), name
