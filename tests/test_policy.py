"""The embedded recogniser through the script's own functions: what it samples and learns. What it hears stands in
test_recognisers.py, for every class."""
import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.nn import Linear8bitLt
from conftest import CPU, first, untrained
from peft import PeftModel
from transformers import AutoModelForMultimodalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

import grpo_asr
from engine import graphs, sampling
from engine.audio import DataError
from engine.models import add_adapters, fuse_norms, refresh_adapters
from engine.recognisers import collate
from engine.run import Run, pick_device
from engine.sampling import (
    Prompts,
    completion_logits,
    completion_logprobs,
    completion_mask,
    generator_for,
    micro_batches,
    prefill,
    reference_logprobs,
    sample,
)
from grpo_asr import encode, end_tokens, grpo_loss, transcripts_as_rollout

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def rollout_of(recogniser, utterances, group=3, temperature=1.0, limit=24, eos=None):
    _, processor, policy = recogniser
    prompts = encode(policy, collate(processor, utterances, "en"))
    return prompts, sample(policy, prompts, group, limit, eos or end_tokens(policy), temperature,
                           generator_for(0, 0, CPU))


def logprobs(recogniser, prompts, rollout, group=3, temperature=1.0):
    with torch.no_grad():
        return completion_logprobs(recogniser[2], prompts, rollout.ids, rollout.mask, group, temperature)


def close(a, b, mask, tolerance=2e-4):
    return float((a - b)[mask].abs().max()) < tolerance


# ---- what reaches the policy ---------------------------------------------------------------------------------

def test_pitfall_21_the_encoder_runs_once_per_clip_and_step(recogniser, clips):
    policy, calls = recogniser[2], []
    handle = policy.get_base_model().model.audio_tower.register_forward_hook(
        lambda module, args, kwargs, out: calls.append(len(kwargs["input_features"])), with_kwargs=True)
    try:
        prompts, rollout = rollout_of(recogniser, clips[:2])
        logprobs(recogniser, prompts, rollout)
        reference_logprobs(policy, prompts, rollout, 3, 3, 1.0)
    finally:
        handle.remove()
    assert calls == [2]


def test_pitfall_1_a_model_that_does_not_hear_is_refused(recogniser, clips, monkeypatch):
    args, processor, policy = recogniser
    model = policy.get_base_model()
    hear = model.get_audio_features

    def deaf(*given, **named):
        out = hear(*given, **named)
        out.pooler_output = torch.zeros_like(out.pooler_output)
        return out

    monkeypatch.setattr(model, "get_audio_features", deaf)
    with untrained(policy), pytest.raises(DataError, match="check failed: .* other audio moves log-probs by 0.00 nats"):
        grpo_asr.check(policy, processor, clips[:2], args)


def test_pitfall_5_a_policy_that_is_not_its_reference_at_the_start_is_refused(recogniser, clips):
    args, processor, policy = recogniser
    with pytest.raises(DataError, match="check failed"):        # the adapters of this one are not zero
        grpo_asr.check(policy, processor, clips[:2], args)


def test_keywords_in_the_prompt_reach_the_model(recogniser):
    """Another clip's keywords, or none, give the same transcripts other log-probs. Whether its own help is not asked.
    """
    _, processor, policy = recogniser
    clips = first(8, "data/test/keywords")
    texts = [u.text + "<|im_end|>" for u in clips]
    ids = processor.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").input_ids
    mask = completion_mask(ids, end_tokens(policy)[0])
    scores = []
    for lists in ([u.keywords for u in clips], [u.keywords for u in clips[1:] + clips[:1]], [()] * len(clips)):
        given = [replace(u, listed=listed) for u, listed in zip(clips, lists)]
        with torch.no_grad(), untrained(policy):
            prompts = encode(policy, collate(processor, given, "en"))
            scores.append(completion_logprobs(policy, prompts, ids, mask, 1, 1.0)[mask])
    assert min(float((scores[0] - other).abs().mean()) for other in scores[1:]) > 0.01


# ---- sampling ------------------------------------------------------------------------------------------------

def test_pitfall_4_sampling_is_untruncated_and_ignores_the_generation_config(recogniser, clips):
    """Frequencies of the first token over many draws are the model's own, far tail included."""
    _, processor, policy = recogniser
    config = policy.get_base_model().generation_config
    saved = copy.deepcopy(config.to_dict())
    config.update(do_sample=True, top_k=2, top_p=0.5, temperature=0.1, repetition_penalty=5.0)
    try:
        prompts, draws = rollout_of(recogniser, clips[:1], group=4000, temperature=3.0, limit=1)
    finally:
        config.update(**saved)
    with torch.no_grad():
        p = torch.softmax(prefill(policy, prompts, 1)[0][0].float() / 3.0, -1)
    counts = torch.bincount(draws.ids[:, 0], minlength=len(p)).float()
    assert (counts > 0).sum() > 60                                             # top_k = 50 would stop at 50
    assert (counts / 4000 - p).abs().max() < 5 * (0.25 / 4000) ** 0.5
    assert torch.allclose(draws.entropy[0], -(p * p.log()).sum(), atol=1e-4)


def test_pitfall_6_a_truncated_sample_has_no_end_token_and_every_other_ends_with_one(recogniser, clips):
    eos = torch.tensor(end_tokens(recogniser[2]))
    _, rollout = rollout_of(recogniser, clips[:2], limit=3)
    assert rollout.truncated.all() and rollout.mask.all() and not torch.isin(rollout.ids, eos).any()
    _, rollout = rollout_of(recogniser, clips[:2], limit=60)
    last = rollout.ids.gather(1, rollout.mask.sum(1, keepdim=True) - 1)[:, 0]
    assert (torch.isin(last, eos) == ~rollout.truncated).all() and not rollout.truncated.any()


def test_dropping_ended_rows_changes_nothing(recogniser, clips, monkeypatch):
    """Every row kept to the end: the end tokens are made known only afterwards."""
    _, rollout = rollout_of(recogniser, clips[:3], limit=60)
    monkeypatch.setattr("transformers.DynamicCache.batch_select_indices", None)      # would fail if it were called
    _, plain = rollout_of(recogniser, clips[:3], limit=60, eos=[-1])
    mask = completion_mask(plain.ids, end_tokens(recogniser[2]))
    width = rollout.ids.shape[1]
    assert torch.equal(mask[:, :width], rollout.mask) and not mask[:, width:].any()
    assert (plain.ids[:, :width] == rollout.ids)[rollout.mask].all()
    assert close(plain.logp[:, :width], rollout.logp, rollout.mask)


def test_room_behind_the_keys_changes_nothing(recogniser, clips, monkeypatch):
    """Rows that leave at different times, and more tokens than there is room for at first, bit for bit."""
    rare, asked = list(range(20)), encode(recogniser[2], collate(recogniser[1], clips[:3], "en"))
    with_room = sample(recogniser[2], asked, 4, 150, rare, 2.0, generator_for(0, 0, CPU))
    monkeypatch.setattr(sampling, "RoomyLayer", lambda layer: layer)
    plain = sample(recogniser[2], asked, 4, 150, rare, 2.0, generator_for(0, 0, CPU))
    lengths = with_room.mask.sum(dim=1)
    assert int(lengths.min()) < 64 < 128 < int(lengths.max())
    assert torch.equal(with_room.ids, plain.ids) and torch.equal(with_room.logp, plain.logp)


def without_gpu(monkeypatch):
    """A captured step on fixed memory, run as it is in place of its graph; returns the list of those captured."""
    captured = []
    monkeypatch.setattr(graphs, "BUCKET", 256)
    monkeypatch.setattr(sampling, "graphable", lambda policy: True)
    monkeypatch.setattr(graphs, "memory_limit", lambda device: 2 ** 33)
    monkeypatch.setattr(graphs.GraphedStep, "capture",
                        lambda self: (setattr(self, "graph", 1), captured.append(self)))
    monkeypatch.setattr(graphs.GraphedStep, "__call__",
                        lambda self, token: (self.token.copy_(token[:, None]), self.step())[1])
    return captured


def test_what_a_gpu_captures_is_the_plain_step_for_the_whole_run(recogniser, clips, monkeypatch):
    """Once for rollouts of as many rows: other prompts, less room, adapters that have moved, not those of the
    reference."""
    policy = recogniser[2]
    moved = next(p for n, p in policy.named_parameters() if "lora_B" in n)

    def rollouts():
        found = [rollout_of(recogniser, clips[:4], limit=60)[1], rollout_of(recogniser, clips[4:8], limit=40)[1]]
        with torch.no_grad(), sampling.reference(policy):
            found.append(rollout_of(recogniser, clips[:4], limit=60)[1])
        moved.data += 0.2
        found.append(rollout_of(recogniser, clips[:4], limit=60)[1])
        moved.data -= 0.2
        return [*found, rollout_of(recogniser, clips[:3], limit=60)[1]]

    plain, captured = rollouts(), without_gpu(monkeypatch)
    for was, now in zip(plain, rollouts()):
        assert torch.equal(was.mask, now.mask) and torch.equal(was.ids[was.mask], now.ids[was.mask])
        assert was.mask.sum(dim=1).unique().numel() > 1 and close(now.logp, was.logp, was.mask)
    assert not any(torch.equal(plain[0].ids, plain[i].ids) for i in (1, 2, 3))
    assert [len(step.token) for step in captured] == [12, 12, 9]                    # one in between, of the reference
    assert list(policy.captured.values()) == [captured[0], captured[2]]
    policy.captured = {}


def test_captured_steps_are_kept_within_their_part_of_the_card(recogniser, clips, monkeypatch):
    """The one unused for longest goes; one that is too large by itself serves its rollout and is not kept."""
    captured, policy = without_gpu(monkeypatch), recogniser[2]
    policy.captured = {}
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    for count in (1, 2, 1):
        rollout_of(recogniser, clips[:count], limit=20)
    one, two = captured
    assert list(policy.captured.values()) == [two, one] and two.nbytes() == 2 * one.nbytes()
    monkeypatch.setattr(graphs, "memory_limit", lambda device: 8 * (two.nbytes() + one.nbytes()))
    rollout_of(recogniser, clips[:2], limit=20)
    assert list(policy.captured.values()) == [one, two]
    rollout_of(recogniser, clips[:1], limit=256)                                    # another bucket, of two units
    assert len(captured) == 3 and one not in policy.captured.values() and captured[2] in policy.captured.values()
    monkeypatch.setattr(graphs, "memory_limit", lambda device: 1)
    assert rollout_of(recogniser, clips[:2], limit=20)[1].mask.any() and policy.captured == {}


@needs_gpu
def test_graphed_rollouts_are_the_trained_pass(clips):
    """Steps captured once, for prompts of several lengths in turn, follow the adapters as they move. In bf16."""
    device = torch.device("cuda")
    processor, policy = grpo_asr.load(grpo_asr.parse_args([]), device)
    prompts = [encode(policy, collate(processor, some, "en").to(device)) for some in (clips[:4], clips[4:8], clips[:2])]
    found = []
    for turn in range(3):
        for weight in policy.masters:
            torch.manual_seed(turn)
            weight.data.copy_(torch.randn_like(weight) * 0.02 * turn)
        for asked in prompts:
            rollout = sample(policy, asked, 4, 30, [-1], 1.0, generator_for(0, turn, device))
            with torch.no_grad():
                again = completion_logprobs(policy, asked, rollout.ids, rollout.mask, 4, 1.0)
            assert float((again - rollout.logp).abs().mean()) < 0.03 and float(again.mean()) < -0.1
            found.append(rollout)
    assert len({step.token.shape for step in policy.captured.values()}) == 2 and len(policy.captured) <= 3
    assert not torch.equal(found[0].ids, found[3].ids) and not torch.equal(found[3].ids, found[6].ids)


def test_torch_s_norm_is_that_of_a_model_in_bf16_and_of_no_other(recogniser):
    """Within bf16's rounding, value and gradient; Gemma's, which adds one to its weight, stays."""
    plain = Qwen3RMSNorm(64).to(torch.bfloat16)
    plain.weight.data = torch.linspace(0.5, 2, 64, dtype=torch.bfloat16)
    fused, gemma, fp32 = copy.deepcopy(plain), Gemma3RMSNorm(64).to(torch.bfloat16), Qwen3RMSNorm(64)
    x = torch.linspace(-3, 2, 256).view(4, 64).bfloat16().requires_grad_()
    for norm in (fused, gemma, fp32):
        fuse_norms(SimpleNamespace(modules=lambda norm=norm: [norm], dtype=norm.weight.dtype))
    gradients = [torch.autograd.grad(norm(x).cos().sum(), x)[0] for norm in (plain, fused)]
    assert "forward" in fused.__dict__ and "forward" not in {**gemma.__dict__, **fp32.__dict__}
    assert torch.allclose(plain(x), fused(x), rtol=0.02) and torch.allclose(*gradients, rtol=0.1, atol=0.02)


# ---- learning ------------------------------------------------------------------------------------------------

def test_reference_log_probs_are_those_of_the_model_without_adapters(recogniser, clips):
    policy = recogniser[2]
    for group, micro in ((4, 1), (4, 2), (4, 16), (1, 2)):
        prompts, rollout = rollout_of(recogniser, clips[:3], group=group, limit=12)
        found = reference_logprobs(policy, prompts, rollout, group, micro, 0.7)
        trained = logprobs(recogniser, prompts, rollout, group, 0.7)                       # the adapters are on again
        with policy.disable_adapter():
            expected = logprobs(recogniser, prompts, rollout, group, 0.7)
        assert found.shape == rollout.ids.shape and close(found, expected, rollout.mask, 1e-4)
        assert not close(found, trained, rollout.mask, 1e-2)
    assert all(weight.requires_grad == ("lora" in name) for name, weight in policy.named_parameters())


def test_log_probs_a_few_rows_at_a_time_are_those_of_all_logits(recogniser, clips, monkeypatch):
    """Values and gradients; the logits of all rows never exist at once, and the output layer is back in its place."""
    _, processor, policy = recogniser
    prompts, rollout = rollout_of(recogniser, clips[:2], group=3)
    head, most = policy.get_base_model().get_output_embeddings(), []
    handle = head.register_forward_hook(lambda module, given, out: most.append(out.shape[0]))

    def found():
        policy.zero_grad()
        logp = completion_logprobs(policy, prompts, rollout.ids, rollout.mask, 3, 0.7)
        (logp * rollout.mask).cos().sum().backward()
        return logp.detach(), torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad])

    try:
        plain, gradient = found()
        most.clear()
        monkeypatch.setattr(sampling, "AT_ONCE", 2 * rollout.ids.shape[1] * head.weight.shape[0])
        parts, in_parts = found()
    finally:
        handle.remove()
    assert most == [2] * 6                                                          # forward, and again backward
    assert close(parts, plain, rollout.mask, 1e-4) and torch.allclose(in_parts, gradient, atol=1e-4)
    assert policy.get_base_model().get_output_embeddings() is head and gradient.norm() > 0


def test_supervised_is_the_cross_entropy_of_the_transcripts(recogniser, clips):
    """The gradient of Eq. 3 on the transcripts with A = 1 and beta = 0 is that of their mean cross-entropy."""
    _, processor, policy = recogniser
    prompts = encode(policy, collate(processor, clips[:3], "en"))
    with torch.no_grad():
        taught = transcripts_as_rollout(policy, processor, prompts, clips[:3], 1.0)

    def gradient(loss):
        policy.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad])

    logp = completion_logprobs(policy, prompts, taught.ids, taught.mask, 1, 1.0)
    ours = gradient(grpo_loss(logp, taught.logp, logp.detach(), torch.ones(3), taught.mask, beta=0.0))
    logits = completion_logits(policy, prompts, taught.ids, taught.mask, 1)
    entropies = [torch.nn.functional.cross_entropy(row[keep], ids[keep])
                 for row, ids, keep in zip(logits, taught.ids, taught.mask)]
    assert torch.allclose(ours, gradient(sum(entropies) / 3), atol=1e-5) and ours.norm() > 0


def test_pitfall_12_the_gradient_depends_neither_on_the_micro_batch_nor_on_padding(recogniser, clips):
    policy = recogniser[2]
    prompts, rollout = rollout_of(recogniser, clips[:2], group=4)
    ref_logp = reference_logprobs(policy, prompts, rollout, 4, 8, 1.0)

    def gradient(micro, extra=0):
        ids, mask, old, ref = (torch.nn.functional.pad(x, (0, extra)) for x in (
            rollout.ids, rollout.mask, rollout.logp, ref_logp))
        policy.zero_grad()
        for asked, rows, each in micro_batches(2, 4, micro):
            logp = completion_logprobs(policy, prompts[asked], ids[rows], mask[rows], each, 1.0)
            loss = grpo_loss(logp, old[rows], ref[rows], torch.linspace(-1, 1, 8)[rows], mask[rows])
            (loss * len(logp) / 8).backward()
        return torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad])

    whole = gradient(8)
    for parts in (gradient(1), gradient(2), gradient(4, extra=7)):
        assert whole.norm() > 0 and (whole - parts).norm() <= 1e-3 * whole.norm()


def test_pitfall_20_adapters_stay_in_fp32_on_a_bf16_base_and_one_step_moves_them():
    base = AutoModelForMultimodalLM.from_pretrained("checkpoints/asr", dtype=torch.bfloat16)
    policy = add_adapters(base, "language_model", 4, 1)
    weights = [p for p in policy.parameters() if p.requires_grad]
    assert base.dtype == torch.bfloat16 and all(p.dtype == torch.float32 for p in weights)
    before = [p.detach().clone() for p in weights]
    optimizer = torch.optim.AdamW(weights, lr=1e-6)                            # far below the spacing of bf16
    ids = torch.arange(12)[None]
    policy(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, weights))


def test_adapters_in_bf16_products_are_peft_s(tmp_path):
    """On a bf16 base: values and gradients against PEFT's own product in fp32, adapters off, a copy that is refreshed
    after a step, and a saved folder that PEFT loads by itself."""
    load = lambda: AutoModelForMultimodalLM.from_pretrained("checkpoints/asr", dtype=torch.bfloat16)  # noqa: E731
    policy, ids = add_adapters(load(), "language_model", 4, 1), torch.arange(12)[None]
    for seed, weight in enumerate(p for p in policy.parameters() if p.requires_grad):
        torch.manual_seed(seed)
        weight.data.copy_(torch.randn_like(weight) * 0.05)
    policy.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(load(), tmp_path, is_trainable=True).eval()
    exact = PeftModel.from_pretrained(load().float(), tmp_path, is_trainable=True).eval()

    def found(model):
        refresh_adapters(model)
        logits = model(input_ids=ids).logits.float()
        torch.log_softmax(logits, -1)[0, :-1].gather(1, ids[0, 1:, None]).sum().backward()
        return logits.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    (ours, pull), (theirs, pull_2), (truth, pull_3) = map(found, (policy, plain, exact))
    assert float((ours - truth).norm()) <= 1.5 * float((theirs - truth).norm())
    assert float((pull - pull_3).norm()) <= 2 * float((pull_2 - pull_3).norm()) < 0.2 * float(pull_3.norm())
    with policy.disable_adapter(), plain.disable_adapter(), torch.no_grad():
        assert torch.equal(policy(input_ids=ids).logits, plain(input_ids=ids).logits)
    with torch.no_grad():
        assert float((policy(input_ids=ids).logits - ours).norm()) == 0
        policy.masters[1].add_(1)
        assert float((policy(input_ids=ids).logits - ours).norm()) == 0             # until it is refreshed
        refresh_adapters(policy)
        assert float((policy(input_ids=ids).logits - ours).norm()) > 0


def test_a_gradient_that_is_not_finite_leaves_the_adapter_alone(recogniser, tmp_path, capsys):
    policy = recogniser[2]
    run = Run("test", grpo_asr.parse_args(["--device", "cpu", "--out", str(tmp_path / "run")]), policy)
    before = [w.detach().clone() for w in run.weights]
    for weight in run.weights:
        weight.grad = torch.ones_like(weight)
    run.weights[3].grad[0, 0] = float("nan")
    run.learn(7)
    assert all(torch.equal(a, b) for a, b in zip(before, run.weights)) and all(w.grad is None for w in run.weights)
    assert "step 7: the gradient is not finite, step left out" in capsys.readouterr().out


@needs_gpu
@pytest.mark.parametrize("length", [64, 100, 128, 192])
def test_gradients_are_finite_whatever_the_padded_length(length):
    """With cuDNN's attention they are not where length % 128 = 64, on an H100 with torch 2.11."""
    device = pick_device("cuda")
    _, policy = grpo_asr.load(grpo_asr.parse_args([]), device)
    width = policy.get_base_model().config.get_text_config().hidden_size
    embeds = torch.randn(2, length, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    mask = torch.ones(2, length, dtype=torch.long, device=device)
    mask[1, :length // 2] = 0                                                       # half of it is padding
    ids = torch.arange(40, device=device).view(4, 10)
    logp = completion_logprobs(policy, Prompts(embeds, mask), ids, torch.ones_like(ids, dtype=torch.bool), 2, 1.0)
    logp.sum().backward()
    assert embeds.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in policy.parameters() if p.requires_grad)


# ---- 8 bits --------------------------------------------------------------------------------------------------

def test_an_8bit_policy_passes_the_check_and_learns_in_the_direction_of_fp32(eight_bit, recogniser, clips, capsys):
    """The adapters of the first layer learn through every quantised layer above: their gradient keeps its direction."""
    args, processor, policy = eight_bit
    grpo_asr.check(policy, processor, clips[:2], args)
    assert "check: |ratio - 1|" in capsys.readouterr().out
    grads = []
    with untrained(recogniser[2]):
        for policy in (recogniser[2], eight_bit[2]):
            policy.zero_grad()
            prompts, ids = encode(policy, collate(processor, clips[:2], "en")), torch.arange(20, 40).expand(2, -1)
            completion_logprobs(policy, prompts, ids, torch.ones_like(ids, dtype=torch.bool), 1, 1.0).sum().backward()
            grads.append(torch.cat([p.grad.flatten() for n, p in policy.named_parameters()
                                    if "layers.0" in n and "lora_B" in n]))
    assert torch.cosine_similarity(*grads, dim=0) > 0.9


def test_an_8bit_product_is_that_of_the_weights_it_stands_for(eight_bit):
    """Weights in int8, activations as they are: values and gradients of the plain product, and no copy of the matrix
    kept for the backward pass."""
    layer = next(m for m in eight_bit[2].modules() if isinstance(m, Linear8bitLt))
    weight = layer.weight.data.float() * (layer.weight.SCB / 127)[:, None]
    x = torch.randn(3, 5, layer.in_features, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer(x)
    torch.testing.assert_close(y, x @ weight.T, atol=1e-5, rtol=1e-5)
    assert {t.dtype for t in kept if t.ndim == 2} == {torch.int8}
    ours, plain = (torch.autograd.grad(out.square().sum(), x)[0] for out in (y, x @ weight.T))
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)
