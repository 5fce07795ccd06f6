"""Chapter 3: the equations of DiffRO against independent code and finite differences; the script."""
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import CPU
from transformers import AutoTokenizer, BartConfig, BartForConditionalGeneration

import diffro_tts
from data import Sentence, load_sentences
from diffro_tts import categorical_kl, diffro_loss, recordings_as_rollout, soft_tokens, text_logprob
from engine.audio import DataError
from engine.judges import Token2Text
from pretrain.tts import build_tokenizer

CODES = 12


@pytest.fixture(scope="module")
def reader():
    """A random reward model in float64: 8 text tokens, then 12 codes."""
    torch.manual_seed(0)
    config = BartConfig(vocab_size=8 + CODES + 1, max_position_embeddings=512, dropout=0.0, pad_token_id=8 + CODES,
                        bos_token_id=None, eos_token_id=3, decoder_start_token_id=3, forced_eos_token_id=None,
                        first_speech_token=8, init_std=0.3, d_model=16, encoder_layers=1, decoder_layers=1,
                        encoder_ffn_dim=32, decoder_ffn_dim=32, encoder_attention_heads=2, decoder_attention_heads=2)
    return BartForConditionalGeneration(config).eval().requires_grad_(False).double()


def case(n=3, t=7, s=5, seed=0):
    """Random logits, masks of mixed lengths and texts."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, t, CODES, generator=g, dtype=torch.float64)
    mask = torch.arange(t) < torch.tensor([t, t - 2, t - 3])[:n, None]
    text, text_mask = torch.randint(0, 8, (n, s), generator=g), torch.arange(s) < torch.tensor([s, s - 2, s])[:n, None]
    return logits, mask, text, text_mask


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(logits, generator=None):
    """Exp(1) noise for them."""
    return torch.empty(logits.shape, dtype=logits.dtype).exponential_(generator=generator or seeded())


# ---- Eq. 4 -------------------------------------------------------------------------------------------------

def test_eq4_rows_are_distributions_and_hard_rows_one_hot():
    logits = case()[0]
    soft, hard = (soft_tokens(logits, drawn(logits), 0.7, h) for h in (False, True))
    assert torch.allclose(soft.sum(-1), torch.ones(3, 7, dtype=soft.dtype)) and (soft > 0).all()
    assert torch.allclose(hard, torch.nn.functional.one_hot(soft.argmax(-1), CODES).to(hard.dtype), atol=1e-12)


def test_eq4_small_tau_tends_to_exact_samples_of_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0]).expand(1, 20_000, 3)
    soft = soft_tokens(logits, drawn(logits), 1e-3, hard=False)
    assert (soft.max(-1).values > 0.999).float().mean() > 0.99
    frequency = torch.bincount(soft.argmax(-1)[0], minlength=3) / 20_000
    assert torch.allclose(frequency, torch.softmax(logits[0, 0], -1), atol=0.02)
    peaked = torch.tensor([[[0.0, 0.0, 80.0]]])                              # and to the argmax where one stands out
    assert soft_tokens(peaked, drawn(peaked), 1e-3, hard=False).argmax() == 2


def test_eq4_straight_through_has_the_gradient_of_the_soft_sample():
    weight, grads = torch.randn(CODES, dtype=torch.float64), []
    for hard in (False, True):
        logits = case()[0].requires_grad_()
        (soft_tokens(logits, drawn(logits), 1.0, hard) * weight).sum().backward()
        grads.append(logits.grad)
    assert torch.allclose(*grads) and grads[0].abs().sum() > 0


# ---- Eq. 5 -------------------------------------------------------------------------------------------------

def test_eq5_one_hot_rows_are_read_like_tokens(reader):
    _, mask, text, text_mask = case()
    codes = torch.randint(0, CODES, mask.shape, generator=seeded())
    soft = torch.nn.functional.one_hot(codes, CODES).double()
    reward = text_logprob(reader, soft, mask, text, text_mask)
    for i in range(3):      # by the class itself, one at a time, without padding
        out = reader(input_ids=codes[i][mask[i]][None] + 8, labels=text[i][text_mask[i]][None])
        assert torch.allclose(reward[i], -out.loss)                          # its loss is the mean over text tokens


def test_eq5_gradient_against_finite_differences(reader):
    """From the logits of the LLM to the reward, with the Gumbel noise held fixed."""
    logits, mask, text, text_mask = case(n=2, t=4, s=3)

    def reward(logits):
        soft = soft_tokens(logits, drawn(logits), 0.8, hard=False)
        return text_logprob(reader, soft, mask[:, :4], text, text_mask)

    assert torch.autograd.gradcheck(reward, (logits.requires_grad_(),), eps=1e-6, atol=1e-5)


def test_eq5_what_is_masked_or_padded_changes_nothing(reader):
    logits, mask, text, text_mask = case()
    soft = soft_tokens(logits, drawn(logits))
    reward = text_logprob(reader, soft, mask, text, text_mask)
    garbage = torch.where(mask[..., None], soft, torch.rand_like(soft))
    longer = torch.nn.functional.pad(garbage, (0, 0, 0, 3), value=0.1)
    padded = text_logprob(reader, longer, torch.nn.functional.pad(mask, (0, 3)),
                          torch.nn.functional.pad(text, (0, 2)), torch.nn.functional.pad(text_mask, (0, 2)))
    assert torch.allclose(reward, padded)
    soft.requires_grad_()
    text_logprob(reader, soft, mask, text, text_mask).sum().backward()
    assert (soft.grad[~mask] == 0).all() and (soft.grad[mask].abs().sum(-1) > 0).all()
    assert all(p.grad is None for p in reader.parameters())                  # nor does the reward model learn


def test_the_reward_gives_no_gradient_to_the_stop_token_and_the_kl_does(reader):
    """The LLM's vocabulary here: 12 codes, then the stop token."""
    _, mask, text, text_mask = case()
    logits = torch.randn(3, 7, CODES + 1, generator=seeded(), dtype=torch.float64).requires_grad_()
    soft = soft_tokens(logits[..., :CODES], drawn(logits[..., :CODES]))
    text_logprob(reader, soft, mask, text, text_mask).sum().backward()
    assert (logits.grad[..., -1] == 0).all() and logits.grad[..., :-1].abs().sum() > 0
    logits.grad = None
    categorical_kl(logits, torch.zeros_like(logits), mask).sum().backward()
    assert (logits.grad[..., -1][mask] != 0).all()


# ---- Eq. 6 and 7 -------------------------------------------------------------------------------------------

def test_eq6_against_torch_distributions():
    a, b = case(seed=1)[0], case(seed=2)[0]
    mask = case()[1]
    exact = torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=x) for x in (a, b)))
    expected = torch.stack([row[m].mean() for row, m in zip(exact, mask)])
    assert torch.allclose(categorical_kl(a, b, mask), expected)
    assert torch.allclose(categorical_kl(a, a, mask), torch.zeros(3, dtype=torch.float64))


def test_eq7_by_hand_and_the_filter_keeps_exactly_what_it_is_given():
    reward, kl = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True), torch.tensor([0.1, 0.2, 0.3], requires_grad=True)
    assert diffro_loss(reward, kl, 0.5).item() == pytest.approx((1.05 + 2.1 + 3.15) / 3)
    loss = diffro_loss(reward, kl, 0.5, torch.tensor([0.7, -0.2, 0.0]) > 0)      # A = 0 is not better than average
    assert loss.item() == pytest.approx(1.05 / 3)
    loss.backward()
    assert reward.grad.tolist() == pytest.approx([-1 / 3, 0, 0]) and kl.grad.tolist() == pytest.approx([0.5 / 3, 0, 0])
    assert diffro_loss(reward, kl, 0.5, torch.zeros(3, dtype=torch.bool)).item() == 0


def test_pitfall_12_the_loss_adds_up_over_micro_batches():
    reward, kl, keep = torch.randn(6), torch.rand(6), torch.tensor([1, 0, 1, 1, 0, 1]).bool()
    parts = sum(diffro_loss(reward[i:i + 2], kl[i:i + 2], keep=keep[i:i + 2]) * 2 / 6 for i in (0, 2, 4))
    assert torch.allclose(parts, diffro_loss(reward, kl, keep=keep))


def test_a_toy_policy_reaches_the_optimum_in_50_steps():
    """Code v says letter v, and the reward model knows it: the policy must come to say the text, code by code."""
    target = torch.tensor([[3, 1, 4, 1, 5]])
    table = torch.nn.Embedding.from_pretrained(torch.eye(8))

    class Known:
        config = SimpleNamespace(first_speech_token=0)

        def get_input_embeddings(self):
            return table

        def __call__(self, inputs_embeds, attention_mask, labels):
            return SimpleNamespace(logits=6 * inputs_embeds)                     # letter j from position j

    logits = torch.zeros(1, 5, 8, requires_grad=True)
    optimizer, mask, generator = torch.optim.Adam([logits], lr=0.2), torch.ones(1, 5, dtype=torch.bool), seeded()
    first = None
    for _ in range(50):
        reward = text_logprob(Known(), soft_tokens(logits, drawn(logits, generator)), mask, target, mask)
        loss = diffro_loss(reward, categorical_kl(logits, torch.zeros_like(logits), mask), beta=0.01)
        first = first or float(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(logits.argmax(-1), target) and torch.softmax(logits, -1).max(-1).values.min() > 0.8
    assert float(loss.detach()) < 0.2 * first


# ---- the script --------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "test.txt"
    path.write_text(load_sentences("data/tts/test/plain")[0].text)
    return path


def run(out, text, *flags):
    diffro_tts.main(["--device", "cpu", "--dev", str(text), "--test", str(text), "--out", str(out), "--batch", "2",
                     "--group", "4", "--micro", "4", "--max-seconds", "1", "--eval-every", "0", *flags])
    return rows_of(out)


def rows_of(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "reading" in line]


def test_diffro_alone_needs_no_waveform_and_no_group_and_resume_equals_the_unbroken_run(loaded_once, text, tmp_path):
    """Its reward has a gradient of its own: no sample is compared with another, one of each text will do."""
    rows = run(tmp_path / "whole", text, "--steps", "2", "--group", "1", "--max-seconds", "1")
    assert [r["step"] for r in rows] == [0, 1] and rows[0]["kept"] == 1 and rows[0]["grad_norm_diffro"] > 0
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6) and rows[1]["kl"] > 0
    assert "decode" not in rows[0]["seconds"] and "reward" not in rows[0]["seconds"]
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text(encoding="utf-8"))
    assert summary["test"]["test.txt"]["after"]["token2text_wer"] is not None  # its own word, beside the second judge's
    run(tmp_path / "parts", text, "--steps", "1", "--group", "1", "--max-seconds", "1")
    diffro_tts.main(["--resume", str(tmp_path / "parts"), "--steps", "2"])
    a, b = (torch.load(tmp_path / f / "state.pt", weights_only=True)["adapter"] for f in ("whole", "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert [r["step"] for r in rows_of(tmp_path / "parts")] == [0, 1]


def test_the_filter_leaves_grpo_untouched(loaded_once, text, tmp_path):
    """Step 0 of two runs: the same samples, the same pull of GRPO; DiffRO on all, and on A > 0."""
    rows = {f: run(tmp_path / f, text, "--steps", "1", "--method", "grpo+diffro", "--group", "2", "--filter", f)[0]
            for f in ("none", "positive")}
    assert rows["none"]["kept"] == 1 and 0 < rows["positive"]["kept"] < 1
    assert rows["none"]["grad_norm_grpo"] == rows["positive"]["grad_norm_grpo"] > 0
    assert rows["none"]["grad_norm_diffro"] != rows["positive"]["grad_norm_diffro"]
    assert rows["none"]["reward"] == rows["positive"]["reward"]


def test_teaching_by_recordings(loaded_once, text, tmp_path):
    rows = run(tmp_path / "run", text, "--steps", "1", "--group", "1", "--max-seconds", "1", "--teach",
               "recording")
    assert rows[0]["speech_s"] > 0.5 and rows[0]["grad_norm_diffro"] > 0
    assert not {"entropy", "truncated", "tokens_per_s"} & set(rows[0])                # nothing was sampled
    batch = [Sentence("a", codes=(5, 6)), Sentence("b", codes=(7,))]
    rollout = recordings_as_rollout(batch, 2, torch.arange(100, 110), 99)
    assert rollout.ids.tolist() == [[105, 106, 99]] * 2 + [[107, 99, 99]] * 2
    assert rollout.mask.tolist() == [[True, True, True]] * 2 + [[True, True, False]] * 2    # the stop token is taught
    assert not rollout.truncated.any()


def test_a_reward_model_of_another_codec_is_refused_and_the_embedded_one_has_the_tokens_that_pretraining_gives_it():
    with pytest.raises(DataError, match="does not read the 65536 codes"):
        Token2Text("checkpoints/token2text", CPU, 65536)
    assert AutoTokenizer.from_pretrained("checkpoints/token2text").get_vocab() == build_tokenizer(4096).get_vocab()
