"""Chapter 2: the rewards of speech on cases worked out by hand, the frozen models, and the policy that speaks."""
import copy
import json

import jiwer
import numpy as np
import pytest
import torch

import data
import grpo_tts
from data import DataError, load_folder, load_sentences
from grpo_asr import completion_logprobs, group_advantages, grpo_loss
from judges import Codec, Judge, Speaker
from rewards import (
    Speech,
    diversity_reward,
    duration_reward,
    f0_spread,
    repeats,
    token_diversity,
    tts_reward,
)
from sampling import Prompts, Rollout, generator_for, micro_batches, prefill, sample
from speech import (
    END,
    START,
    codes_of,
    evaluate,
    load,
    load_judges,
    load_voices,
    make_prompts,
    prompt_ids,
    self_check,
    speech_tokens,
    voices_of,
)

CPU, G, RATE = torch.device("cpu"), 4, 16_000


@pytest.fixture(scope="module")
def speaker_of_text():
    """(args, tokenizer, policy with adapters off zero, frozen models, code table, voices)."""
    args = grpo_tts.parse_args(["--device", "cpu"])
    data.quiet()
    tokenizer, policy = load(args, CPU)
    models = load_judges(args, CPU)
    code = speech_tokens(tokenizer, models[0], policy.config.vocab_size)
    recordings = [u.waveform(RATE) for u in load_folder("data/tts/test")[:10]]
    heard = models[0].encode(recordings)                       # before the encoder is dropped
    voices = load_voices(args, models[0], models[3])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.003, generator=generator)
    return args, tokenizer, policy, models, code, voices, (recordings, heard)


TEXTS = ("marian told anna a cheap story about the falcon", "the animal near the market belongs to walter")


def prompts_of(made, texts=TEXTS):
    return make_prompts(made[2], made[1], texts, made[5][:len(texts)])


def stop_of(made):
    return made[1].convert_tokens_to_ids(END)


def rollout_of(made, prompts, limit=40, temperature=1.0, seed=0):
    return sample(made[2], prompts, G, limit, stop_of(made), temperature, generator_for(seed, 0, CPU))


# ---- rewards by hand ---------------------------------------------------------------------------------------

def test_duration_reward_by_hand():
    lengths = torch.tensor([[10, 20, 30], [50, 50, 50], [0, 0, 0]])
    assert torch.allclose(duration_reward(lengths), torch.tensor([[-0.5, 0, -0.5], [0, 0, 0], [0, 0, 0]]))
    assert torch.allclose(duration_reward(torch.tensor([[10, 20, 40, 100]])),      # the median is 30
                          torch.tensor([[-2 / 3, -1 / 3, -1 / 3, -7 / 3]]))


def test_token_diversity_by_hand():
    same, other = np.array([1, 2, 3, 4]), np.array([1, 2, 3, 9])
    assert token_diversity([same, same, same]).tolist() == [0, 0, 0]
    assert np.allclose(token_diversity([same, same, other]), [0.125, 0.125, 0.25])
    assert np.allclose(token_diversity([same, np.array([], dtype=int)]), [1, 1])
    assert token_diversity([same]).tolist() == [0]


def tone(hertz):
    """A harmonic sound whose pitch in Hz is given sample by sample."""
    phase = np.cumsum(hertz) / RATE * 2 * np.pi
    return (0.2 * np.sin(phase) + 0.1 * np.sin(2 * phase)).astype(np.float32)


def test_f0_spread_of_known_pitches():
    steady = tone(np.full(2 * RATE, 150.0))
    octave = tone(np.where(np.arange(2 * RATE) < RATE, 100.0, 200.0))       # half each: 6 semitones of deviation
    pause = np.concatenate([steady, np.zeros(RATE, np.float32)])            # unvoiced frames do not count
    spread = f0_spread([steady, octave, pause, np.zeros(RATE, np.float32), np.zeros(0, np.float32)], RATE)
    assert spread[0] < 0.3 and abs(spread[1] - 6) < 0.6 and spread[2] < 0.6 and spread[3:].tolist() == [0, 0]


def test_pitch_and_voice_of_a_clip_do_not_depend_on_the_clips_beside_it():
    rng, sweep = np.random.default_rng(0), tone(np.linspace(90, 300, 3 * RATE))
    waves = [sweep[:n] + 0.02 * rng.standard_normal(n).astype(np.float32) for n in (9000, 48000, 31234, 31234, 100)]
    assert torch.equal(f0_spread(waves, RATE), torch.cat([f0_spread([w], RATE) for w in waves]))
    speaker = Speaker("checkpoints/speaker", CPU)
    alone = torch.cat([speaker.embed([w]) for w in waves])
    assert torch.allclose(speaker.embed(waves), alone, atol=1e-5) and alone[:4].norm(dim=1).allclose(torch.ones(4))


def test_a_sample_too_short_for_a_voice_has_none():
    """Of 5,199 samples one frame is left to the pooling, whose deviation is NaN, of fewer none at all."""
    speaker, noise = Speaker("checkpoints/speaker", CPU), np.random.default_rng(0).standard_normal(5200)
    vectors = speaker.embed([noise[:n].astype(np.float32) for n in (3300, 5199, 5200)])
    assert vectors.norm(dim=1).tolist() == pytest.approx([0, 0, 1])


def test_diversity_reward_stays_on_its_scale_and_rewards_variety():
    steady, lively = tone(np.full(RATE, 150.0)), tone(100 * 2 ** (np.arange(RATE) / RATE))
    a, b = np.arange(20), np.arange(20) + 100
    reward = diversity_reward([a, a, a, b], [steady, steady, steady, lively], 2, RATE)
    assert reward.shape == (2, 2) and (reward >= 0).all() and (reward <= 1).all()
    assert reward[0].max() < 0.1 and reward[1].min() >= 0.5 and reward[1, 1] > reward[1, 0]


def spoken(transcript, length=50, text="anna met peter in rome"):
    return Speech(text, np.arange(length), np.zeros(RATE, np.float32), transcript)


def test_pitfall_8_one_more_error_or_a_longer_detour_never_pays():
    heard = ["anna met peter in rome", "anna met peter in paris", "hannah met peter in paris", "the horse"]
    for rewards in (["R1"], ["R1", "R2"]):
        total = tts_reward([spoken(h) for h in heard], 4, rewards)[0][0]
        assert (total.diff() < 0).all(), rewards
    total = tts_reward([spoken(heard[0], n) for n in (50, 50, 60, 90)], 4, ["R1", "R2"])[0][0]
    assert total[3] < total[2] < total[1] + 1e-6


def test_pitfall_9_a_failed_judge_masks_and_silence_is_worst():
    group = [spoken("anna met peter in rome"), spoken(None), spoken(""), spoken("anna met peter in paris")]
    total, parts, judged = tts_reward(group, 4)
    assert judged.tolist() == [[True, False, True, True]]
    assert parts["R1"][0, 2] == 0 and parts["R1"][0, 1].isnan()
    advantage = group_advantages(total)
    assert abs(advantage[0, 1]) < 1e-6 and advantage[0, 2] < 0 < advantage[0, 0] and not advantage.isnan().any()
    alone = group_advantages(total[judged][None])            # what the others would have got without it
    assert torch.allclose(advantage[judged] * 0.75 ** 0.5, alone[0], atol=1e-3)
    total, _, judged = tts_reward([spoken(None)] * 4, 4)
    assert not judged.any() and (group_advantages(total) == 0).all()


def test_pitfall_9_a_masked_sample_has_no_gradient():
    logp = torch.randn(2, 5, requires_grad=True)
    mask = torch.ones(2, 5, dtype=torch.bool) & torch.tensor([[True], [False]])
    grpo_loss(logp, logp.detach(), logp.detach() - 0.3, torch.tensor([1.0, 0.0]), mask).backward()
    assert logp.grad[0].abs().sum() > 0 and (logp.grad[1] == 0).all()


def test_an_unknown_reward_is_refused():
    with pytest.raises(ValueError, match="R1, R2, R3"):
        tts_reward([spoken("")], 1, ["R4"])


@pytest.mark.parametrize("codes, loop", [
    (np.arange(60), False), (np.full(30, 7), True), (np.full(20, 7), False), (np.tile([1, 2, 3], 12), True),
    (np.concatenate([np.arange(40), np.tile([5, 6], 15)]), True), (np.zeros(0, dtype=int), False)])
def test_pitfall_17_loops_are_counted(codes, loop):
    assert repeats(codes, 25) is loop


# ---- the frozen models -------------------------------------------------------------------------------------

def test_codec_round_trip_is_intelligible_and_uses_its_codes(speaker_of_text):
    codec, judge = speaker_of_text[3][:2]
    recordings, codes = speaker_of_text[6]
    waves = codec.decode(codes)
    assert all(0 <= len(w) - len(r) <= codec.hop for w, r in zip(waves, recordings))   # to a whole token
    texts = [s.text for s in load_sentences("data/tts/test")[:10]]
    assert jiwer.wer(texts, judge.transcribe(waves)) <= jiwer.wer(texts, judge.transcribe(recordings)) + 0.1
    assert len(np.unique(np.concatenate(codes))) > 200


def test_pitfall_15_decoding_in_a_batch_is_decoding_alone(speaker_of_text):
    """The decoder has no mask: rows are padded with themselves, and stay within a thirtieth of what they are alone."""
    codec, codes = speaker_of_text[3][0], speaker_of_text[6][1]
    for together, row in zip(codec.decode(codes), codes):
        alone = codec.decode([row])[0]
        assert np.linalg.norm(together - alone) < 0.07 * np.linalg.norm(alone)
    assert [len(w) for w in codec.decode([codes[0][:0], codes[0][:3]])] == [0, 3 * codec.hop]


def test_pitfall_22_every_transcript_goes_with_its_own_waveform(speaker_of_text):
    """Waveforms of mixed lengths, one of them broken, one empty: each gets what it gets alone, in the given order."""
    judge, recordings = speaker_of_text[3][1], speaker_of_text[6][0]
    broken = np.full(RATE, np.nan, np.float32)
    waves = [recordings[3], broken, recordings[0], np.zeros(0, np.float32), recordings[5]]
    together = judge.transcribe(waves)
    assert together[1] is None and together[3] == ""
    assert [together[i] for i in (0, 2, 4)] == [judge.transcribe([waves[i]])[0] for i in (0, 2, 4)]


def test_pitfall_9_a_sample_on_which_the_judge_fails_costs_only_itself(speaker_of_text, monkeypatch):
    judge, recordings = speaker_of_text[3][1], speaker_of_text[6][0][:4]
    expected, ask = judge.transcribe(recordings), judge.processor.apply_transcription_request
    poison = len(recordings[2])

    def failing(waves, **options):
        if any(len(w) == poison for w in waves):
            raise ValueError("a judge that breaks on one sample")
        return ask(waves, **options)

    monkeypatch.setattr(judge.processor, "apply_transcription_request", failing)
    assert judge.transcribe(recordings) == expected[:2] + [None] + expected[3:]


def test_silence_gets_the_worst_accuracy(speaker_of_text):
    judge = speaker_of_text[3][1]
    text, waves = "anna met peter in rome", [np.zeros(0, np.float32), np.zeros(500, np.float32)]
    for wave, transcript in zip(waves, judge.transcribe(waves)):
        assert Speech(text, np.zeros(0), wave, transcript).accuracy() == 0


def test_similarity_is_higher_for_the_same_voice(speaker_of_text):
    speaker, voices, recordings = speaker_of_text[3][3], speaker_of_text[5], speaker_of_text[6][0]
    names = [s.voice for s in load_sentences("data/tts/test")[:10]]
    alike = speaker.embed(recordings) @ torch.stack([v.vector for v in voices]).T          # (10, voices)
    same = torch.tensor([[v.name == name for v in voices] for name in names])
    assert alike[same].mean() > 0.85 and alike[same].min() > alike[~same].mean() + 0.4
    assert alike[same].mean() > alike[~same].mean() + 0.6
    assert (speaker.embed([np.zeros(0, np.float32)]) @ voices[0].vector).tolist() == [0]       # no sound, no voice


def test_offloaded_models_return_to_main_memory(speaker_of_text):
    judge = Judge("checkpoints/asr2", CPU, offload=True)
    with judge.at_work() as model:
        assert not torch.is_grad_enabled() and model.device == judge.device
    assert next(judge.model.parameters()).device == judge.home
    assert not any(p.requires_grad for p in judge.model.parameters()) and not judge.model.training


# ---- the policy --------------------------------------------------------------------------------------------

def test_the_prompt_is_that_of_llasa(speaker_of_text):
    _, tokenizer, *_, voices, _ = speaker_of_text
    asked = prompt_ids(tokenizer, TEXTS, voices[:2])
    said = tokenizer.decode(asked.input_ids[0][asked.attention_mask[0].bool()])
    assert said.startswith("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nConvert the text to speech:"
                           f"<|TEXT_UNDERSTANDING_START|>{voices[0].text} {TEXTS[0]}<|TEXT_UNDER")
    assert said.endswith(f"{START}" + "".join(f"<|s_{c}|>" for c in voices[0].codes))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_pitfall_3_and_5_sampled_log_probs_are_the_trained_ones(speaker_of_text, temperature):
    prompts = prompts_of(speaker_of_text)
    rollout = rollout_of(speaker_of_text, prompts, temperature=temperature)
    with torch.no_grad():
        logp = completion_logprobs(speaker_of_text[2], prompts, rollout.ids, rollout.mask, G, temperature)
    assert (logp - rollout.logp)[rollout.mask].abs().max() < 1e-3


def test_pitfall_2_and_15_every_sample_goes_with_its_own_text_whatever_is_beside_it(speaker_of_text):
    policy, prompts = speaker_of_text[2], prompts_of(speaker_of_text)
    assert prompts.mask[0].sum() != prompts.mask[1].sum()                   # one of them is padded
    rollout = rollout_of(speaker_of_text, prompts)
    with torch.no_grad():
        both = completion_logprobs(policy, prompts, rollout.ids, rollout.mask, G, 1.0)
        for i in (0, 1):
            rows, real = slice(i * G, i * G + G), prompts.mask[i].bool()
            alone = Prompts(prompts.embeds[i:i + 1, real], prompts.mask[i:i + 1, real])
            logp = completion_logprobs(policy, alone, rollout.ids[rows], rollout.mask[rows], G, 1.0)
            assert (logp - both[rows])[rollout.mask[rows]].abs().max() < 1e-3


def test_pitfall_4_sampling_is_untruncated_and_ignores_the_generation_config(speaker_of_text):
    policy, prompts = speaker_of_text[2], prompts_of(speaker_of_text)[:1]
    prompts = Prompts(prompts.embeds[:, -8:], prompts.mask[:, -8:])         # 3,000 copies of a long one would not fit
    config = policy.get_base_model().generation_config
    saved = copy.deepcopy(config.to_dict())
    config.update(do_sample=True, top_k=2, temperature=0.1)
    try:
        draws = sample(policy, prompts, 3000, 1, stop_of(speaker_of_text), 3.0, generator_for(0, 0, CPU))
    finally:
        config.update(**saved)
    with torch.no_grad():
        p = torch.softmax(prefill(policy, prompts, 1)[0][0].float() / 3.0, -1)
    counts = torch.bincount(draws.ids[:, 0], minlength=len(p)).float()
    assert (counts > 0).sum() > 200 and (counts / 3000 - p).abs().max() < 5 * (0.25 / 3000) ** 0.5


def test_pitfall_6_the_stop_token_is_an_action_and_a_truncated_sample_has_none(speaker_of_text):
    stop, prompts = stop_of(speaker_of_text), prompts_of(speaker_of_text)
    short = rollout_of(speaker_of_text, prompts, limit=10)
    assert short.truncated.all() and short.mask.all() and (short.ids != stop).all()
    whole = rollout_of(speaker_of_text, prompts, limit=150)
    last = whole.ids.gather(1, whole.mask.sum(1, keepdim=True) - 1)[:, 0]
    assert ((last == stop) == ~whole.truncated).all() and not whole.truncated.all()
    assert ((whole.ids == stop) & whole.mask).sum(1).max() == 1


def test_codes_are_the_speech_tokens_alone(speaker_of_text):
    code, tokenizer = speaker_of_text[4], speaker_of_text[1]
    ids = tokenizer.convert_tokens_to_ids(["<|s_5|>", "<|s_4095|>", "a", "<|s_0|>", END, "<|s_9|>"])
    rollout = Rollout(torch.tensor([ids]), torch.tensor([[True] * 5 + [False]]), None, None, None)
    assert [c.tolist() for c in codes_of(rollout, code)] == [[5, 4095, 0]]


@pytest.mark.parametrize("micro", [2, 4])
def test_pitfall_12_the_gradient_does_not_depend_on_the_micro_batch(speaker_of_text, micro):
    """Nor on the padding: every part reads only as many tokens as its longest sample has."""
    policy, prompts = speaker_of_text[2], prompts_of(speaker_of_text)
    rollout, advantage = rollout_of(speaker_of_text, prompts, limit=110), torch.linspace(-1, 1, 2 * G)

    def gradient(micro):
        policy.zero_grad()
        for part, rows, group in micro_batches(2, G, micro):
            span = rows, slice(int(rollout.mask[rows].sum(dim=1).max()))
            asked = (prompts[part], rollout.ids[span], rollout.mask[span], group, 1.0)
            logp = completion_logprobs(policy, *asked)
            loss = grpo_loss(logp, rollout.logp[span], logp.detach() - 0.1, advantage[rows], rollout.mask[span])
            (loss * len(logp) / (2 * G)).backward()
        return torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad])

    whole, parts = gradient(2 * G), gradient(micro)
    assert whole.norm() > 0 and (whole - parts).norm() <= 1e-3 * whole.norm()


def test_only_the_adapters_learn_and_in_fp32(speaker_of_text):
    trained = {n: p for n, p in speaker_of_text[2].named_parameters() if p.requires_grad}
    assert trained and all("lora" in n and p.dtype == torch.float32 for n, p in trained.items())
    assert not any(m.training for m in speaker_of_text[2].modules())


# ---- data and mistakes -------------------------------------------------------------------------------------

def test_texts_from_a_plain_file_and_from_metadata(tmp_path):
    (tmp_path / "texts.txt").write_text("one  two\n\nthree\n")
    assert [s.text for s in load_sentences(tmp_path / "texts.txt")] == ["one two", "three"]
    (tmp_path / "metadata.jsonl").write_text('{"text": "four", "voice": "anna"}\n')
    for path in (tmp_path, tmp_path / "metadata.jsonl"):
        assert [(s.text, s.voice, s.seconds) for s in load_sentences(path)] == [("four", "anna", 0.0)]
    assert len(load_sentences("data/tts/train.jsonl")[0].codes) > 20
    recorded = load_sentences("data/tts/test")[0]
    assert recorded.seconds > 1 and recorded.voice


@pytest.mark.parametrize("content, message", [
    ('{"text": 3}\n', r"metadata.jsonl:1: needs \"text\""), ('{"text": "a"}\n{oops\n', "metadata.jsonl:2: not JSON"),
    ('{"text": "..."}\n', "no word"), ('{"text": "a", "tokens": [1.5]}\n', "whole numbers"), ("\n", "nothing usable"),
    ('{"text": "a", "file_name": "gone.wav"}\n', "metadata.jsonl:1: .*gone.wav: no such file")])
def test_a_bad_line_of_texts_is_named(tmp_path, content, message):
    (tmp_path / "metadata.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        load_sentences(tmp_path)


def test_embedded_texts_and_tests_are_disjoint_and_what_is_in_both_is_left_out(tmp_path, capsys):
    train, test = ({s.text for s in load_sentences(f"data/tts/{name}")} for name in ("train.jsonl", "test"))
    assert len(train) == 400 and len(test) == 100 and not train & test
    (tmp_path / "texts.txt").write_text("\n".join([*train, next(iter(test))]))
    args = grpo_tts.parse_args(["--data", str(tmp_path / "texts.txt"), "--test", "data/tts/test"])
    texts, tests = data.split_sentences(args)
    assert not {s.text for s in texts} & {s.text for s in tests} and "1 texts of --data" in capsys.readouterr().out


@pytest.mark.parametrize("flags, message", [
    (["--model", "checkpoints/token"], "--model checkpoints/token: no such folder"),
    (["--model", "checkpoints/asr"], "no speech tokens"), (["--codec", "checkpoints/tts"], "--codec checkpoints/tts"),
    (["--judge", "checkpoints/tts"], "--judge checkpoints/tts"), (["--data", "nowhere.txt"], "nowhere.txt: no such"),
    (["--speaker", "nowhere"], "--speaker nowhere"), (["--voices", "nowhere"], "nowhere: no such folder"),
    (["--batch", "1000"], "fewer than --batch"), (["--max-seconds", "0.1"], "a second of speech or more"),
    (["--max-seconds", "1000"], "positions"), (["--language", "klingon"], "--language klingon"),
    (["--second-judge", "checkpoints/asr"], "must not be --judge")])
def test_a_users_mistake_gets_one_line(flags, message):
    with pytest.raises(SystemExit) as stopped:
        grpo_tts.main(["--device", "cpu", "--steps", "1", *flags])
    assert str(stopped.value).startswith("error: ") and message in str(stopped.value)
    assert len(str(stopped.value).splitlines()) == 1


@pytest.mark.parametrize("count", [100, 65536])
def test_a_codec_of_another_model_is_refused(speaker_of_text, monkeypatch, count):
    codec = speaker_of_text[3][0]
    monkeypatch.setattr(codec, "count", count)
    with pytest.raises(DataError, match=f"speaks 4096 codes, up to 4095, and --codec knows {count}"):
        speech_tokens(speaker_of_text[1], codec, 4361)


def test_weights_of_another_task_are_refused(tmp_path):
    from transformers import AutoModelForAudioXVector
    AutoModelForAudioXVector.from_pretrained("checkpoints/speaker").wavlm.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="has no weights for"):
        data.load_pretrained(AutoModelForAudioXVector, str(tmp_path), flag="--speaker")


def test_what_is_evaluated(speaker_of_text):
    """Each test sentence in its own voice, compared with its own recording; the same figures whenever it is asked."""
    args, tokenizer, policy, models, code, voices, _ = speaker_of_text
    tests = load_sentences("data/tts/test")[:4][::-1]
    due = [s.seconds * 25 for s in tests]
    with policy.disable_adapter():
        speech, metrics = evaluate(policy, tokenizer, tests, voices, models, code, args, CPU, due)
        again = evaluate(policy, tokenizer, tests, voices, models, code, args, CPU, due)[1]
    assert metrics == again and [s.text for s in speech] == [s.text for s in tests]
    assert [v.name for v in voices_of(tests, voices)] == [s.voice for s in tests]
    assert metrics["length_ratio"] == pytest.approx(sum(len(s.codes) for s in speech) / sum(due))
    words = sum(len(s.text.split()) for s in tests)
    assert metrics["words_per_s"] == pytest.approx(words / sum(len(s.codes) / 25 for s in speech))
    alike = [float(models[3].embed([s.wave])[0] @ v.vector) for s, v in zip(speech, voices_of(tests, voices))]
    assert metrics["similarity"] == pytest.approx(np.mean(alike), abs=1e-4)


def test_pitfall_1_a_model_that_does_not_read_is_refused(speaker_of_text):
    args, _, policy = speaker_of_text[:3]
    prompts = prompts_of(speaker_of_text)
    with pytest.raises(DataError, match="check failed"):
        self_check(policy, prompts, prompts, args, 30, stop_of(speaker_of_text), CPU)


def test_encoding_needs_the_whole_codec(speaker_of_text):
    codec = Codec("checkpoints/codec", CPU)
    wave = speaker_of_text[6][0][0]
    assert np.array_equal(codec.encode([wave])[0], speaker_of_text[6][1][0])
    assert codec.model.semantic_encoder is not None and codec.decoder_only().model.semantic_encoder is None


# ---- the script --------------------------------------------------------------------------------------------

FAST = ["--device", "cpu", "--batch", "2", "--group", "2", "--micro", "2", "--eval-every", "2", "--max-seconds", "2"]


def run(out, test, *flags):
    grpo_tts.main([*FAST, "--test", str(test), "--out", str(out), *flags])
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    root = tmp_path_factory.mktemp("tts")
    texts = [s.text for s in load_sentences("data/tts/test")[:4]]
    (root / "test.txt").write_text("\n".join(texts))
    return root, run(root / "run", root / "test.txt", "--steps", "4", "--rewards", "R1,R2,R3")


def test_a_run_leaves_everything_behind(unbroken):
    root, lines = unbroken
    rows = [line for line in lines if "reward" in line]
    assert [r["step"] for r in rows] == [0, 1, 2, 3] and rows[0]["kl"] == 0 and rows[3]["kl"] > 0
    assert set(rows[1]["seconds"]) >= {"rollout", "decode", "reward", "update"}
    for key in ("R1", "R2", "R3", "judge_failed", "tokens", "truncated", "repetition", "entropy", "grad_norm",
                "peak_by_phase_gib", "no_signal", "empty", "lr"):
        assert key in rows[0], key
    summary = json.loads((root / "run" / "summary.json").read_text())
    for key in ("wer", "similarity", "length_ratio", "words_per_s", "f0_spread", "truncated", "repetition"):
        assert summary["test"]["before"][key] is not None, key
    assert summary["test"]["before"]["length_ratio"] == 1 and summary["steps"] == 4     # no recordings: its own
    page = (root / "run" / "samples" / "index.html").read_text()
    assert page.count("<audio") == 8 and (root / "run" / "samples" / "04-after.wav").exists()
    assert (root / "run" / "adapter" / "adapter_model.safetensors").exists()


def test_resume_equals_the_unbroken_run(unbroken, tmp_path):
    root, lines = unbroken
    run(tmp_path / "run", root / "test.txt", "--steps", "2", "--rewards", "R1,R2,R3")
    grpo_tts.main(["--resume", str(tmp_path / "run"), "--steps", "4"])
    a, b = (torch.load(f / "run" / "state.pt", weights_only=True)["adapter"] for f in (root, tmp_path))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_an_8bit_policy_trains(unbroken, tmp_path):
    from bitsandbytes.nn import Linear8bitLt
    policy = load(grpo_tts.parse_args(["--device", "cpu", "--quantize", "8bit"]), CPU)[1]
    assert sum(isinstance(m, Linear8bitLt) for m in policy.modules()) == 6 * 7          # every linear layer, no head
    lines = run(tmp_path / "run", unbroken[0] / "test.txt", "--steps", "3", "--quantize", "8bit", "--eval-every", "0")
    rows = [line for line in lines if "reward" in line]
    assert len(rows) == 3 and rows[2]["kl"] > 0


def test_several_samples_of_every_test_text_are_evaluated(unbroken, tmp_path):
    """Other samples each time, of every text alike."""
    run(tmp_path / "run", unbroken[0] / "test.txt", "--steps", "0", "--eval-samples", "3")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    once = json.loads((unbroken[0] / "run" / "summary.json").read_text())["test"]["before"]
    assert summary["test"]["before"]["utterances"] == 3 * once["utterances"]
    assert summary["test"]["before"]["f0_spread"] != once["f0_spread"]
