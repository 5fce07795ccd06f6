"""Chapter 1's equations against loops written from the paper, planted answers and finite differences."""
import math

import pytest
import torch
import torch.nn.functional as F

from engine.sampling import completion_mask, micro_batches, token_logprobs
from grpo_asr import group_advantages, grpo_loss, kl_k3


def random_step(samples=6, tokens=5, vocabulary=7, seed=0, dtype=torch.float64):
    """Logits of a policy and log-probs of a sampler and a reference that differ from it, with ragged lengths."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(samples, tokens, vocabulary, generator=g, dtype=dtype)
    ids = torch.randint(vocabulary, (samples, tokens), generator=g)
    logp = torch.log_softmax(logits, -1).gather(-1, ids[..., None])[..., 0]
    old_logp, ref_logp = (logp + 0.3 * torch.randn(logp.shape, generator=g, dtype=dtype) for _ in range(2))
    lengths = torch.randint(1, tokens + 1, (samples,), generator=g)
    mask = torch.arange(tokens) < lengths[:, None]
    return logits, ids, old_logp, ref_logp, mask


# ---- Eq. 1 -------------------------------------------------------------------------------------------------

def test_eq1_against_the_formula_and_pitfall_11_baseline_is_per_group():
    reward = torch.tensor([[1.0, 0.0, 0.5, 0.5], [10.0, 12.0, 11.0, 15.0]])
    advantage = group_advantages(reward)
    for row, out in zip(reward.tolist(), advantage.tolist()):
        mean = sum(row) / len(row)
        std = math.sqrt(sum((r - mean) ** 2 for r in row) / len(row))
        assert out == pytest.approx([(r - mean) / (std + 1e-4) for r in row], abs=1e-5)
    assert advantage.mean(dim=1).abs().max() < 1e-6          # a baseline over the batch would leave +-5 here


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 1 / 3, -1.0, 1e6])
def test_pitfall_13_equal_rewards_give_exact_zeros(value):
    assert (group_advantages(torch.full((2, 7), value)) == 0).all()


# ---- the mask ----------------------------------------------------------------------------------------------

def test_pitfall_6_mask_includes_the_first_end_token_and_nothing_after():
    eos, pad = 9, 0
    ids = torch.tensor([[1, 2, 9, 0, 0], [9, 0, 0, 0, 0], [1, 2, 3, 4, 5], [1, 9, 9, 4, 9]])
    expected = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], dtype=torch.bool)
    assert (completion_mask(ids, eos) == expected).all()
    assert (completion_mask(ids.masked_fill(ids == pad, eos), eos) == expected).all()       # pad = EOS changes nothing
    ids = torch.tensor([[1, 8, 2, 9], [1, 2, 9, 8]])
    assert completion_mask(ids, [8, 9]).sum(1).tolist() == [2, 3]                           # several end tokens


# ---- log-probs ---------------------------------------------------------------------------------------------

def test_log_probs_against_cross_entropy_and_finite_differences():
    logits, ids, *_ = random_step()
    expected = -F.cross_entropy(logits.transpose(1, 2) / 0.7, ids, reduction="none")
    assert torch.allclose(token_logprobs(logits, ids, 0.7), expected, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x, ids, 0.8), logits.requires_grad_())


def test_log_probs_in_chunks_equal_those_in_one_go(monkeypatch):
    logits, ids, *_ = random_step(samples=7)
    grads = []
    for rows in (100, 1, 3):
        monkeypatch.setattr("engine.sampling._TokenLogprobs.rows", staticmethod(lambda logits, rows=rows: rows))
        x = logits.clone().requires_grad_()
        token_logprobs(x, ids).cos().sum().backward()
        grads.append(x.grad)
    assert all(torch.equal(grads[0], g) for g in grads[1:])


def test_log_probs_of_bf16_logits_come_in_fp32():
    logits, ids, *_ = random_step(vocabulary=500, dtype=torch.float32)
    half = logits.bfloat16()
    out = token_logprobs(half.requires_grad_(), ids)
    assert out.dtype == torch.float32
    assert torch.allclose(out, token_logprobs(half.detach().float(), ids), atol=1e-6)
    out.sum().backward()
    assert half.grad.dtype == torch.bfloat16


# ---- KL ----------------------------------------------------------------------------------------------------

def test_pitfall_7_k3_is_zero_at_equality_and_never_negative():
    _, _, old, ref, _ = random_step()
    assert (kl_k3(old, old) == 0).all() and (kl_k3(old, ref) >= 0).all()


def test_pitfall_7_mean_of_k3_is_the_exact_kl_on_an_enumerable_policy():
    g = torch.Generator().manual_seed(3)
    policy, reference = (torch.log_softmax(torch.randn(5, generator=g, dtype=torch.float64), 0) for _ in range(2))
    expected = (policy.exp() * (policy - reference)).sum()                       # KL(policy | reference)
    other_way = (reference.exp() * (reference - policy)).sum()
    k3 = (policy.exp() * kl_k3(policy, reference)).sum()                         # expectation over the policy's samples
    assert k3 == pytest.approx(float(expected), abs=1e-12) and abs(k3 - other_way) > 1e-3


# ---- Eq. 2-3 -----------------------------------------------------------------------------------------------

def loss_by_the_paper(logp, old_logp, ref_logp, advantage, mask, clip, beta, kl):
    """Eq. 2-3 as loops over samples and tokens."""
    total = 0.0
    for i in range(len(logp)):
        length, inner = 0, 0.0
        for t in range(logp.shape[1]):
            if mask[i, t]:
                ratio = math.exp(logp[i, t] - old_logp[i, t])
                clipped = min(max(ratio, 1 - clip), 1 + clip)
                d = ref_logp[i, t] - logp[i, t]
                estimate = d * d / 2 if kl == "k2" else math.exp(d) - d - 1
                inner += min(ratio * advantage[i], clipped * advantage[i]) - beta * estimate
                length += 1
        total += inner / length
    return float(-total / len(logp))


@pytest.mark.parametrize("clip, beta, kl", [(0.2, 0.1, "k2"), (0.05, 0.0, "k2"), (0.3, 1.0, "k3")])
def test_eq3_against_loops(clip, beta, kl):
    logits, ids, old, ref, mask = random_step()
    advantage = torch.tensor([1.2, -0.7, 0.0, 0.4, -1.5, 2.0], dtype=torch.float64)
    logp = token_logprobs(logits, ids)
    out = grpo_loss(logp, old, ref, advantage, mask, clip, beta, kl)
    assert float(out) == pytest.approx(loss_by_the_paper(logp, old, ref, advantage, mask, clip, beta, kl), abs=1e-12)
    assert float(grpo_loss(logp, old, ref, advantage.view(2, 3), mask, clip, beta, kl)) == pytest.approx(float(out))


def test_eq3_gradient_against_finite_differences():
    logits, ids, old, ref, mask = random_step()
    advantage = torch.tensor([1.2, -0.7, 0.0, 0.4, -1.5, 2.0], dtype=torch.float64)
    loss = lambda x: grpo_loss(token_logprobs(x, ids), old, ref, advantage, mask)  # noqa: E731
    assert torch.autograd.gradcheck(loss, logits.requires_grad_())


def test_pitfall_10_the_clip_stops_a_ratio_that_has_gone_far_enough():
    old = torch.zeros(2, 1)
    logp = torch.tensor([[0.5], [-0.5]], requires_grad=True)                # ratios 1.65 and 0.61
    grpo_loss(logp, old, logp.detach(), torch.tensor([1.0, -1.0]), torch.ones(2, 1), beta=0.0).backward()
    assert (logp.grad == 0).all()
    logp = torch.tensor([[-0.5], [0.5]], requires_grad=True)                # gone the wrong way: still pulled back
    grpo_loss(logp, old, logp.detach(), torch.tensor([1.0, -1.0]), torch.ones(2, 1), beta=0.0).backward()
    assert (logp.grad != 0).all()


def test_pitfall_12_padding_changes_nothing():
    logits, ids, old, ref, mask = random_step()
    advantage = torch.linspace(-1, 1, 6, dtype=torch.float64)
    plain = grpo_loss(token_logprobs(logits, ids), old, ref, advantage, mask)
    wide = [F.pad(x, (0, 3), value=5.0) for x in (token_logprobs(logits, ids), old, ref)]
    assert grpo_loss(*wide, advantage, F.pad(mask, (0, 3))) == plain


@pytest.mark.parametrize("batch, group, micro", [(3, 4, 4), (3, 4, 8), (3, 4, 2), (3, 4, 1), (2, 6, 100)])
def test_micro_batches_cover_every_sample_once_with_its_own_prompt(batch, group, micro):
    rows_seen = []
    for prompts, rows, each in micro_batches(batch, group, micro):
        owners = [p for p in range(prompts.start, prompts.stop) for _ in range(each)]
        rows = list(range(rows.start, rows.stop))
        assert owners == [r // group for r in rows]
        rows_seen += rows
    assert rows_seen == list(range(batch * group))


# ---- a whole policy, small enough to enumerate -------------------------------------------------------------

def test_grpo_finds_the_planted_answer():
    """Two tokens out of three, nine sequences, one of them right: 60 steps of Eq. 1-3 must find it."""
    g = torch.Generator().manual_seed(0)
    logits = torch.zeros(2, 3, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    reference = torch.log_softmax(logits.detach(), -1)
    for _ in range(60):
        policy = torch.log_softmax(logits, -1)
        ids = torch.multinomial(policy.detach().exp().repeat(32, 1), 1, generator=g).view(32, 2)
        logp = token_logprobs(logits.expand(32, 2, 3), ids)
        reward = ((ids[:, 0] == 2).float() + (ids[:, 1] == 1).float()).view(4, 8)
        loss = grpo_loss(logp, logp.detach(), reference.expand(32, 2, 3).gather(-1, ids[..., None])[..., 0],
                         group_advantages(reward), torch.ones(32, 2), beta=0.01)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    best = torch.log_softmax(logits, -1).exp()
    assert best[0, 2] > 0.9 and best[1, 1] > 0.9


def test_beta_holds_the_policy_at_the_reference():
    """With no signal and a large beta the KL term alone must bring a drifted policy back."""
    logits = torch.tensor([[2.0, 0.0, -1.0]], requires_grad=True)
    reference = torch.log_softmax(torch.zeros(1, 3), -1)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    g = torch.Generator().manual_seed(0)
    for _ in range(200):
        ids = torch.multinomial(torch.softmax(logits.detach(), -1).expand(256, -1), 1, generator=g)
        logp = token_logprobs(logits.expand(256, 1, 3), ids)
        loss = grpo_loss(logp, logp.detach(), reference.expand(256, -1).gather(1, ids), torch.zeros(256),
                         torch.ones(256, 1), beta=1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (torch.softmax(logits, -1) - 1 / 3).abs().max() < 0.03
