"""The embedded recogniser through the script's own functions: what it hears, samples and learns."""
import argparse
import copy
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForMultimodalLM, AutoProcessor

import grpo_asr
from data import collate, load_folder, mend_attention
from grpo_asr import completion_logprobs, decode, encode, end_tokens, grpo_loss, reference_logprobs, references
from sampling import Prompts, Rollout, completion_logits, generator_for, micro_batches, prefill, sample

G = 3


def rollout_of(recogniser, utterances, group=G, temperature=1.0, limit=24, seed=0):
    args, processor, policy = recogniser
    prompts = encode(policy, collate(processor, utterances, "en"))
    generator = generator_for(seed, 0, torch.device("cpu"))
    return prompts, sample(policy, prompts, group, limit, end_tokens(policy), temperature, generator)


def logprobs(recogniser, prompts, rollout, group=G, temperature=1.0):
    with torch.no_grad():
        return completion_logprobs(recogniser[2], prompts, rollout.ids, rollout.mask, group, temperature)


def close(a, b, mask, tolerance=2e-4):
    return float((a - b)[mask].abs().max()) < tolerance


# ---- what the policy hears ---------------------------------------------------------------------------------

def test_pitfall_1_other_audio_changes_the_log_probs(recogniser, clips):
    prompts, rollout = rollout_of(recogniser, clips[:2])
    inputs = collate(recogniser[1], clips[:2], "en")
    inputs["input_features"] = inputs["input_features"].flip(1)
    other = encode(recogniser[2], inputs)
    change = (logprobs(recogniser, prompts, rollout) - logprobs(recogniser, other, rollout))[rollout.mask].abs().mean()
    assert change > 0.1


def test_pitfall_1_audio_without_its_places_in_the_prompt_is_an_error(recogniser, clips):
    inputs = collate(recogniser[1], clips[:2], "en")
    inputs["input_ids"][0][inputs["input_ids"][0] == recogniser[2].config.audio_token_id] = 5
    with pytest.raises(RuntimeError, match="audio embeddings"):
        encode(recogniser[2], inputs)


def test_pitfall_2_every_sample_goes_with_its_own_clip(recogniser, clips):
    """A batch of two different clips x G gives the log-probs of each clip alone."""
    prompts, rollout = rollout_of(recogniser, clips[:2])
    together = logprobs(recogniser, prompts, rollout)
    for i in (0, 1):
        rows = slice(i * G, (i + 1) * G)
        alone = encode(recogniser[2], collate(recogniser[1], [clips[i]], "en"))
        with torch.no_grad():
            out = completion_logprobs(recogniser[2], alone, rollout.ids[rows], rollout.mask[rows], G, 1.0)
        assert close(out, together[rows], rollout.mask[rows])
        wrong = encode(recogniser[2], collate(recogniser[1], [clips[1 - i]], "en"))
        with torch.no_grad():
            out = completion_logprobs(recogniser[2], wrong, rollout.ids[rows], rollout.mask[rows], G, 1.0)
        assert not close(out, together[rows], rollout.mask[rows], 0.1)


def test_pitfall_15_a_batch_of_mixed_lengths_equals_its_clips_alone(recogniser, clips):
    mixed = sorted(clips, key=lambda u: u.seconds)[:: len(clips) // 4]
    _, greedy = rollout_of(recogniser, mixed, group=1, temperature=0)
    texts = decode(recogniser[1], greedy)
    for i, clip in enumerate(mixed):
        prompts, alone = rollout_of(recogniser, [clip], group=1, temperature=0)
        assert decode(recogniser[1], alone) == [texts[i]]
        width = alone.ids.shape[1]
        assert close(alone.logp, greedy.logp[i:i + 1, :width], alone.mask, 1e-3)


def test_pitfall_21_the_encoder_runs_once_per_clip_and_step(recogniser, clips, monkeypatch):
    policy, calls = recogniser[2], []
    tower = policy.get_base_model().model.audio_tower
    handle = tower.register_forward_hook(lambda module, args, kwargs, out: calls.append(len(kwargs["input_features"])),
                                         with_kwargs=True)
    try:
        prompts, rollout = rollout_of(recogniser, clips[:2])
        logprobs(recogniser, prompts, rollout)
        with policy.disable_adapter():
            logprobs(recogniser, prompts, rollout)
    finally:
        handle.remove()
    assert calls == [2]


def test_embeddings_and_logits_are_those_of_the_models_own_forward(recogniser, clips):
    """encode + prefill against one call of the class itself with features and ids."""
    policy = recogniser[2]
    inputs = collate(recogniser[1], clips[:3], "en")
    with torch.no_grad():
        expected = policy(**inputs, position_ids=(inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)).logits[:, -1]
        first, _ = prefill(policy, encode(policy, inputs), 1)
    assert torch.allclose(first, expected, atol=1e-4)


# ---- sampling ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_pitfall_3_and_5_sampled_log_probs_are_the_trained_ones(recogniser, clips, temperature):
    """Ratio 1 at step 0: the sampler's scores and the trained log-probs agree, at any temperature."""
    prompts, rollout = rollout_of(recogniser, clips[:2], temperature=temperature)
    assert close(logprobs(recogniser, prompts, rollout, temperature=temperature), rollout.logp, rollout.mask, 1e-3)
    if temperature != 1.0:
        assert not close(logprobs(recogniser, prompts, rollout), rollout.logp, rollout.mask, 0.05)


def test_pitfall_5_kl_is_zero_where_nothing_was_trained(clips):
    from conftest import load_policy
    fresh = load_policy()
    prompts, rollout = rollout_of(fresh, clips[:2])
    now = logprobs(fresh, prompts, rollout)
    with fresh[2].disable_adapter():
        assert torch.equal(now, logprobs(fresh, prompts, rollout))
    assert not any(m.training for m in fresh[2].modules())


@pytest.mark.parametrize("group, micro", [(4, 1), (4, 2), (4, 16), (8, 1), (1, 2)])
def test_reference_log_probs_are_those_of_the_model_without_adapters(recogniser, clips, group, micro):
    args, policy = argparse.Namespace(group=group, micro=micro, temperature=0.7), recogniser[2]
    prompts, rollout = rollout_of(recogniser, clips[:3], group=group)
    found = reference_logprobs(policy, prompts, rollout, args)
    trained = logprobs(recogniser, prompts, rollout, group=group, temperature=0.7)         # the adapters are on again
    with policy.disable_adapter():
        expected = logprobs(recogniser, prompts, rollout, group=group, temperature=0.7)
    assert found.shape == rollout.ids.shape and close(found, expected, rollout.mask, 1e-4)
    assert not close(found, trained, rollout.mask, 1e-2)
    assert all(weight.requires_grad == ("lora" in name) for name, weight in policy.named_parameters())


def test_pitfall_4_sampling_is_untruncated_and_ignores_the_generation_config(recogniser, clips):
    """Frequencies of the first token over many draws are the model's own, far tail included."""
    args, processor, policy = recogniser
    config = policy.get_base_model().generation_config
    saved = copy.deepcopy(config.to_dict())
    config.update(do_sample=True, top_k=2, top_p=0.5, temperature=0.1, repetition_penalty=5.0)
    try:
        prompts = encode(policy, collate(processor, clips[:1], "en"))
        draws = sample(policy, prompts, 4000, 1, end_tokens(policy), 3.0, generator_for(0, 0, torch.device("cpu")))
    finally:
        config.update(**saved)
    with torch.no_grad():
        p = torch.softmax(prefill(policy, prompts, 1)[0][0].float() / 3.0, -1)
    counts = torch.bincount(draws.ids[:, 0], minlength=len(p)).float()
    assert (counts > 0).sum() > 60                                             # top_k = 50 would stop at 50
    assert (counts / 4000 - p).abs().max() < 5 * (0.25 / 4000) ** 0.5
    assert torch.allclose(draws.entropy[0], -(p * p.log()).sum(), atol=1e-4)


def test_pitfall_6_a_truncated_sample_has_no_end_token(recogniser, clips):
    _, rollout = rollout_of(recogniser, clips[:2], limit=3)
    eos = torch.tensor(end_tokens(recogniser[2]))
    assert rollout.truncated.all() and rollout.mask.all() and not torch.isin(rollout.ids, eos).any()
    _, rollout = rollout_of(recogniser, clips[:2], limit=60)
    last = rollout.ids.gather(1, rollout.mask.sum(1, keepdim=True) - 1)[:, 0]
    assert (torch.isin(last, eos) == ~rollout.truncated).all() and not rollout.truncated.any()


def test_the_same_seed_and_step_give_the_same_rollout(recogniser, clips):
    a, b, c = (rollout_of(recogniser, clips[:2], seed=s)[1].ids for s in (1, 1, 2))
    assert torch.equal(a, b) and (a.shape != c.shape or not torch.equal(a, c))


def test_supervised_is_the_cross_entropy_of_the_references(recogniser, clips):
    """The gradient of Eq. 3 on the references with A = 1 and beta = 0 is that of their mean cross-entropy."""
    _, processor, policy = recogniser
    prompts = encode(policy, collate(processor, clips[:3], "en"))
    taught = references(policy, processor, prompts, clips[:3], end_tokens(policy), 1.0)
    assert decode(processor, taught) == [u.text for u in clips[:3]]
    assert (taught.ids.gather(1, taught.mask.sum(1, keepdim=True) - 1) == end_tokens(policy)[0]).all()

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


def test_what_a_gpu_captures_is_the_plain_step(recogniser, clips, monkeypatch):
    """The step on fixed memory, run as it is in place of its graph."""
    draw = lambda: rollout_of(recogniser, clips[:4], group=3, limit=30)[1]  # noqa: E731
    plain = draw()
    monkeypatch.setattr("sampling.graphable", lambda policy: True)
    monkeypatch.setattr("sampling.GraphedStep.capture", lambda self: None)
    monkeypatch.setattr("sampling.GraphedStep.__call__", lambda self, token: (self.token.copy_(token[:, None]),
                                                                              self.step())[1])
    found = draw()
    assert torch.equal(found.mask, plain.mask) and plain.mask.sum(dim=1).unique().numel() > 1
    assert torch.equal(found.ids[plain.mask], plain.ids[plain.mask]) and close(found.logp, plain.logp, plain.mask)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graphed_rollout_is_the_plain_one(clips, monkeypatch):
    device = torch.device("cuda")
    processor, policy = grpo_asr.load(grpo_asr.parse_args([]), device)
    prompts = encode(policy, collate(processor, clips[:4], "en").to(device))
    draw = lambda: sample(policy, prompts, 4, 30, [-1], 1.0, generator_for(0, 0, device))  # noqa: E731
    graphed = draw()
    monkeypatch.setattr("sampling.graphable", lambda policy: False)
    plain = draw()
    assert torch.equal(graphed.ids, plain.ids) and torch.allclose(graphed.logp, plain.logp, atol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("length", [64, 100, 128, 192])
def test_gradients_are_finite_whatever_the_padded_length(length):
    """With cuDNN's attention they are not where length % 128 = 64, on an H100 with torch 2.11."""
    device = grpo_asr.pick_device("cuda")
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


def test_dropping_ended_rows_changes_nothing(recogniser, clips, monkeypatch):
    _, rollout = rollout_of(recogniser, clips[:3], limit=60)
    monkeypatch.setattr("transformers.DynamicCache.batch_select_indices", None)      # would fail if it were called
    _, plain = rollout_of_without_dropping(recogniser, clips[:3])
    assert torch.equal(plain.mask, rollout.mask) and (plain.ids == rollout.ids)[plain.mask].all()
    assert close(plain.logp, rollout.logp, plain.mask)


def rollout_of_without_dropping(recogniser, utterances):
    """The same rollout with every row kept to the end: the end tokens are made known only afterwards."""
    args, processor, policy = recogniser
    prompts = encode(policy, collate(processor, utterances, "en"))
    draws = sample(policy, prompts, G, 60, [-1], 1.0, generator_for(0, 0, torch.device("cpu")))
    mask = grpo_asr.completion_mask(draws.ids, end_tokens(policy))
    width = int(mask.sum(1).max())
    return prompts, Rollout(draws.ids[:, :width], mask[:, :width], draws.logp[:, :width],
                                     draws.entropy[:, :width], draws.truncated)


def test_greedy_equals_generate(recogniser, clips):
    args, processor, policy = recogniser
    inputs = collate(processor, clips[:4], "en")
    out = policy.generate(**inputs, do_sample=False, max_new_tokens=40)
    expected = processor.batch_decode(out[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
    _, rollout = rollout_of(recogniser, clips[:4], group=1, temperature=0, limit=40)
    assert decode(processor, rollout) == [text.strip() for text in expected]


# ---- learning ----------------------------------------------------------------------------------------------

def gradients(recogniser, clips, micro, extra=0):
    args, processor, policy = recogniser
    prompts, rollout = rollout_of(recogniser, clips[:2], group=4)
    pad = lambda x, value=0: torch.nn.functional.pad(x, (0, extra), value=value)  # noqa: E731
    ids, mask, old = pad(rollout.ids), pad(rollout.mask, False), pad(rollout.logp)
    advantage = torch.linspace(-1, 1, 8)
    policy.zero_grad()
    for part, rows, group in micro_batches(2, 4, micro):
        logp = completion_logprobs(policy, prompts[part], ids[rows], mask[rows], group, 1.0)
        with torch.no_grad(), policy.disable_adapter():
            ref = completion_logprobs(policy, prompts[part], ids[rows], mask[rows], group, 1.0)
        (grpo_loss(logp, old[rows], ref, advantage[rows], mask[rows]) * len(ids[rows]) / 8).backward()
    return {n: p.grad.clone() for n, p in policy.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("micro, extra", [(1, 0), (2, 0), (4, 0), (8, 7)])
def test_pitfall_12_gradient_of_the_real_policy(recogniser, clips, micro, extra):
    whole, parts = gradients(recogniser, clips, 8), gradients(recogniser, clips, micro, extra)
    for name, grad in whole.items():
        assert (grad - parts[name]).norm() <= 1e-3 * grad.norm() + 1e-7, name
    assert sum(float(g.norm()) for g in whole.values()) > 0


def test_only_the_adapters_of_the_llm_learn_and_in_fp32(recogniser):
    trained = [n for n, p in recogniser[2].named_parameters() if p.requires_grad]
    assert trained and all("language_model" in n and "lora" in n for n in trained)
    assert all(p.dtype == torch.float32 for p in recogniser[2].parameters() if p.requires_grad)


def test_pitfall_20_adapters_stay_in_fp32_on_a_bf16_base_and_one_step_moves_them():
    from peft import LoraConfig, get_peft_model
    base = AutoModelForMultimodalLM.from_pretrained("checkpoints/asr", dtype=torch.bfloat16)
    policy = get_peft_model(base, LoraConfig(r=4, target_modules=r".*language_model.*\.(q|v)_proj"))
    weights = [p for p in policy.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 for p in weights)
    before = [p.detach().clone() for p in weights]
    optimizer = torch.optim.AdamW(weights, lr=1e-6)                            # far below the spacing of bf16
    ids = torch.arange(12)[None]
    policy(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, weights))


def test_pitfall_19_saved_adapter_reloaded_by_peft_gives_the_same_text(recogniser, clips, tmp_path):
    args, processor, policy = recogniser
    policy.save_pretrained(tmp_path)
    base = mend_attention(AutoModelForMultimodalLM.from_pretrained("checkpoints/asr", dtype=torch.float32))
    own = AutoProcessor.from_pretrained("checkpoints/asr")
    reloaded = (args, own, PeftModel.from_pretrained(base, tmp_path).eval())
    _, a = rollout_of(recogniser, clips[:4], group=1, temperature=0)
    _, b = rollout_of(reloaded, clips[:4], group=1, temperature=0)
    assert decode(processor, a) == decode(reloaded[1], b) and torch.equal(a.logp, b.logp)
    merged = copy.deepcopy(reloaded[2]).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    plain = mend_attention(AutoModelForMultimodalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
    out = plain.generate(**collate(processor, clips[:4], "en"), do_sample=False, max_new_tokens=24)
    assert [t.strip() for t in processor.batch_decode(out[:, -a.ids.shape[1]:], skip_special_tokens=True)
            ] == decode(processor, a)


def test_keywords_in_the_prompt_help():
    """The base model gives the right transcript more probability with its own keywords in the prompt than without
    any, and least with another clip's."""
    from conftest import load_policy
    _, processor, policy = load_policy()
    clips = load_folder("data/test/keywords")[:48]
    texts = [u.text + "<|im_end|>" for u in clips]
    ids = processor.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").input_ids
    mask = grpo_asr.completion_mask(ids, end_tokens(policy)[0])
    others = [replace(u, keywords=v.keywords) for u, v in zip(clips, clips[1:] + clips[:1])]
    scores = []
    for given, hotwords in ((clips, True), (clips, False), (others, True)):
        prompts = encode(policy, collate(processor, given, "en", hotwords))
        with torch.no_grad():
            scores.append(float(completion_logprobs(policy, prompts, ids, mask, 1, 1.0)[mask].mean()))
    assert scores[0] > scores[1] > scores[2], scores
