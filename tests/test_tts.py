"""Chapter 2: the rewards of speech on cases worked out by hand, the frozen models, and the policy that speaks."""
import json
from dataclasses import replace

import jiwer
import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear8bitLt
from conftest import CPU, untrained

import diffro_tts
import grpo_tts
from data import load_sentences, split_texts
from engine.audio import DataError
from engine.judges import Codec, Judge, Speaker
from engine.models import load_pretrained
from engine.sampling import Prompts, Rollout, completion_logprobs, generator_for, sample, self_check
from engine.speech import END, START, codes_of, evaluate, load, make_prompts, prompt_ids, speech_tokens
from grpo_tts import judged_advantages
from rewards import Speech, asr_metrics, duration_reward, f0_spread, repeats, tts_reward

G, RATE = 4, 16_000
TEXTS = ("marian told anna a cheap story about the falcon", "the animal near the market belongs to walter")


def prompts_of(studio, texts=TEXTS):
    return make_prompts(studio.policy, studio.tokenizer, texts, studio.voices[:len(texts)])


# ---- rewards by hand ---------------------------------------------------------------------------------------

def test_duration_reward_by_hand():
    lengths = torch.tensor([[10, 20, 30], [50, 50, 50], [0, 0, 0]])
    assert torch.allclose(duration_reward(lengths), torch.tensor([[-0.5, 0, -0.5], [0, 0, 0], [0, 0, 0]]))
    assert torch.allclose(duration_reward(torch.tensor([[10, 20, 40, 100]])),      # the median is 30
                          torch.tensor([[-2 / 3, -1 / 3, -1 / 3, -7 / 3]]))


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


def spoken(transcript, length=50, text="anna met peter in rome"):
    return Speech(text, np.arange(length), np.zeros(RATE, np.float32), transcript)


def test_pitfall_8_one_more_error_or_a_longer_detour_never_pays():
    heard = ["anna met peter in rome", "anna met peter in paris", "hannah met peter in paris", "the horse"]
    for rewards in (["R1"], ["R1", "R2"]):
        total = tts_reward([spoken(h) for h in heard], 4, rewards)[0][0]
        assert (total.diff() < 0).all(), rewards
    total = tts_reward([spoken(heard[0], n) for n in (50, 50, 60, 90)], 4, ["R1", "R2"])[0][0]
    assert total[3] < total[2] < total[1] + 1e-6


def test_pitfall_9_and_31_a_failed_judge_masks_and_silence_is_worst():
    group = [spoken("anna met peter in rome"), spoken(None), spoken(""), spoken("anna met peter in paris")]
    total, parts, judged = tts_reward(group, 4)
    assert judged.tolist() == [[True, False, True, True]]
    assert parts["R1"][0, 2] == 0 and parts["R1"][0, 1].isnan()
    advantage = judged_advantages(total, judged)
    assert abs(advantage[0, 1]) < 1e-6 and advantage[0, 2] < 0 < advantage[0, 0] and not advantage.isnan().any()
    alone = total[judged][None]                              # what the others would have got without it
    assert torch.allclose(advantage[judged], judged_advantages(alone, alone > -1)[0], atol=1e-3)
    total, _, judged = tts_reward([spoken(None)] * 4, 4)
    assert not judged.any() and (judged_advantages(total, judged) == 0).all()


def test_an_unknown_reward_is_refused():
    with pytest.raises(ValueError, match="R1, R2, R3"):
        tts_reward([spoken("")], 1, ["R4"])


@pytest.mark.parametrize("codes, loop", [
    (np.arange(60), False), (np.full(30, 7), True), (np.full(20, 7), False), (np.tile([1, 2, 3], 12), True),
    (np.concatenate([np.arange(40), np.tile([5, 6], 15)]), True), (np.zeros(0, dtype=int), False)])
def test_pitfall_17_loops_are_counted(codes, loop):
    assert repeats(codes, 25) is loop


# ---- the frozen models -------------------------------------------------------------------------------------

def test_codec_round_trip_is_intelligible_and_uses_its_codes(speaking):
    studio, recordings, codes = speaking
    waves = studio.codec.decode(codes)
    assert all(0 <= len(w) - len(r) <= studio.codec.hop for w, r in zip(waves, recordings))   # to a whole token
    texts, heard = [s.text for s in load_sentences("data/tts/test/plain")[:10]], studio.judge.transcribe
    assert jiwer.wer(texts, heard(waves)) <= jiwer.wer(texts, heard(recordings)) + 0.2      # 79 words
    assert len(np.unique(np.concatenate(codes))) > 200


def test_pitfall_15_decoding_in_a_batch_is_decoding_alone(speaking):
    """The decoder has no mask: rows are padded with themselves, and stay within an eighth of what they are alone."""
    codec, codes = speaking[0].codec, speaking[2]
    for together, row in zip(codec.decode(codes), codes):
        alone = codec.decode([row])[0]
        assert np.linalg.norm(together - alone) < 0.125 * np.linalg.norm(alone)
    assert [len(w) for w in codec.decode([codes[0][:0], codes[0][:3]])] == [0, 3 * codec.hop]


def test_pitfall_22_every_transcript_goes_with_its_own_waveform(speaking):
    """Waveforms of mixed lengths, one broken, two of silence: each gets what it gets alone, in the given order."""
    judge, recordings = speaking[0].judge, speaking[1]
    broken, silence = np.full(RATE, np.nan, np.float32), np.zeros(500, np.float32)
    waves = [recordings[3], broken, recordings[0], silence[:0], recordings[5], silence]
    together = judge.transcribe(waves)
    assert together[1] is None and together[3] == together[5] == ""
    assert Speech(TEXTS[0], np.zeros(0), silence, together[5]).accuracy() == 0
    assert [together[i] for i in (0, 2, 4)] == [judge.transcribe([waves[i]])[0] for i in (0, 2, 4)]


def test_pitfall_9_a_sample_on_which_the_judge_fails_costs_only_itself(speaking, monkeypatch):
    judge, recordings = speaking[0].judge, speaking[1][:4]
    expected, ask = judge.transcribe(recordings), judge.processor.apply_transcription_request
    poison = len(recordings[2])

    def failing(waves, **options):
        if any(len(w) == poison for w in waves):
            raise ValueError("a judge that breaks on one sample")
        return ask(waves, **options)

    monkeypatch.setattr(judge.processor, "apply_transcription_request", failing)
    assert judge.transcribe(recordings) == expected[:2] + [None] + expected[3:]


def test_similarity_is_higher_for_the_same_voice(speaking):
    studio, recordings, _ = speaking
    names = [s.voice for s in load_sentences("data/tts/test/plain")[:10]]
    alike = studio.speaker.embed(recordings) @ torch.stack([v.vector for v in studio.voices]).T     # (10, voices)
    same = torch.tensor([[v.name == name for v in studio.voices] for name in names])
    assert alike[same].mean() > 0.85 and alike[same].min() > alike[~same].mean() + 0.4
    assert alike[same].mean() > alike[~same].mean() + 0.6
    assert (studio.speaker.embed([np.zeros(0, np.float32)]) @ studio.voices[0].vector).tolist() == [0]   # no sound


def test_offloaded_models_return_to_main_memory():
    judge = Judge("checkpoints/asr2", CPU, offload=True)
    with judge.at_work() as model:
        assert not torch.is_grad_enabled() and model.device == judge.device
    assert next(judge.model.parameters()).device == judge.home
    assert not any(p.requires_grad for p in judge.model.parameters()) and not judge.model.training


def test_encoding_needs_the_whole_codec(speaking):
    codec = Codec("checkpoints/codec", CPU)
    assert np.array_equal(codec.encode(speaking[1][:1])[0], speaking[2][0])
    assert codec.model.semantic_encoder is not None and codec.decoder_only().model.semantic_encoder is None


@pytest.mark.parametrize("count", [100, 65536])
def test_a_codec_of_another_model_is_refused(speaking, monkeypatch, count):
    monkeypatch.setattr(speaking[0].codec, "count", count)
    with pytest.raises(DataError, match=f"speaks 4096 codes, up to 4095, and --codec knows {count}"):
        speech_tokens(speaking[0].tokenizer, speaking[0].codec, 4361)


def test_weights_of_another_task_are_refused(tmp_path):
    from transformers import AutoModelForAudioXVector
    AutoModelForAudioXVector.from_pretrained("checkpoints/speaker").wavlm.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="has no weights for"):
        load_pretrained(AutoModelForAudioXVector, str(tmp_path), flag="--speaker")


# ---- the policy: its prompts and tokens; sampling and log-probs are those of chapter 1, see test_policy.py --------

def test_the_prompt_is_that_of_llasa(speaking):
    tokenizer, voices = speaking[0].tokenizer, speaking[0].voices
    asked = prompt_ids(tokenizer, TEXTS, voices[:2])
    said = tokenizer.decode(asked.input_ids[0][asked.attention_mask[0].bool()])
    assert said.startswith("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nConvert the text to speech:"
                           f"<|TEXT_UNDERSTANDING_START|>{voices[0].text} {TEXTS[0]}<|TEXT_UNDER")
    assert said.endswith(f"{START}" + "".join(f"<|s_{c}|>" for c in voices[0].codes))


def test_pitfall_2_3_and_6_log_probs_are_those_of_the_sampler_and_of_each_text_alone(speaking):
    """Padding, a group and a temperature change nothing, and of all tokens the stop token alone ends a sample."""
    studio, prompts = speaking[0], prompts_of(speaking[0])
    assert prompts.mask[0].sum() != prompts.mask[1].sum()                   # one of them is padded
    rollout = sample(studio.policy, prompts, G, 250, studio.end, 0.7, generator_for(0, 0, CPU))
    last = rollout.ids.gather(1, rollout.mask.sum(1, keepdim=True) - 1)[:, 0]
    assert ((last == studio.end) == ~rollout.truncated).all() and not rollout.truncated.all()
    with torch.no_grad():
        both = completion_logprobs(studio.policy, prompts, rollout.ids, rollout.mask, G, 0.7)
        assert (both - rollout.logp)[rollout.mask].abs().max() < 1e-3
        for i in (0, 1):
            rows, real = slice(i * G, i * G + G), prompts.mask[i].bool()
            alone = Prompts(prompts.embeds[i:i + 1, real], prompts.mask[i:i + 1, real])
            logp = completion_logprobs(studio.policy, alone, rollout.ids[rows], rollout.mask[rows], G, 0.7)
            assert (logp - rollout.logp[rows])[rollout.mask[rows]].abs().max() < 1e-3


def test_codes_are_the_speech_tokens_alone(speaking):
    ids = speaking[0].tokenizer.convert_tokens_to_ids(["<|s_5|>", "<|s_4095|>", "a", "<|s_0|>", END, "<|s_9|>"])
    rollout = Rollout(torch.tensor([ids]), torch.tensor([[True] * 5 + [False]]), None, None, None)
    assert [c.tolist() for c in codes_of(rollout, speaking[0].code)] == [[5, 4095, 0]]


def test_only_the_adapters_learn_and_in_fp32(speaking):
    trained = {n: p for n, p in speaking[0].policy.named_parameters() if p.requires_grad}
    assert trained and all("lora" in n and p.dtype == torch.float32 for n, p in trained.items())
    assert not any(m.training for m in speaking[0].policy.modules())


def test_every_linear_layer_is_quantised_but_not_the_head():
    """That such a policy trains is shown in test_measure.py."""
    policy = load(grpo_tts.parse_args(["--device", "cpu", "--quantize", "8bit"]), CPU)[1]
    assert sum(isinstance(m, Linear8bitLt) for m in policy.modules()) == 8 * 7


def test_pitfall_1_a_model_that_does_not_read_is_refused(speaking):
    studio, prompts = speaking[0], prompts_of(speaking[0])
    with untrained(studio.policy), pytest.raises(DataError, match="check failed: .* text moves log-probs by 0.00 nats"):
        self_check(studio.policy, prompts, prompts, studio.args, 30, studio.end, "another text")


def test_what_is_evaluated(speaking):
    """Each test sentence in its own voice, compared with its own recording; the same figures whenever it is asked."""
    studio, tests = speaking[0], speaking[0].dev
    names = [s.voice for s in load_sentences("data/tts/test/plain")[:4][::-1]]
    speech, metrics = evaluate(studio, tests)
    assert metrics == evaluate(studio, tests)[1] and [s.text for s in speech] == [s.text for s in tests]
    assert [s.voice.name for s in tests] == names
    due = sum(s.seconds * studio.codec.tokens_per_s for s in tests)
    assert metrics["length_ratio"] == pytest.approx(sum(len(s.codes) for s in speech) / due)
    words, codes = sum(len(s.text.split()) for s in tests), sum(len(s.codes) for s in speech)
    assert metrics["words_per_s"] == pytest.approx(words / codes * studio.codec.tokens_per_s)
    alike = [float(studio.speaker.embed([s.wave])[0] @ t.voice.vector) for s, t in zip(speech, tests)]
    assert metrics["similarity"] == pytest.approx(np.mean(alike), abs=1e-4)


# ---- data and mistakes -------------------------------------------------------------------------------------

def test_a_third_judge_hears_the_same_samples(speaking):
    """And the second judge's figure stays its own."""
    studio, tests = speaking[0], speaking[0].dev[:2]
    texts = [s.text for s in tests]
    speech, figures = evaluate(replace(studio, third=studio.judge), tests)
    third = [studio.judge.transcribe([s.wave])[0] for s in speech]
    assert [s.third for s in speech] == third != [s.heard for s in speech]
    assert figures["third_wer"] == asr_metrics(texts, third)["wer"]
    assert figures["wer"] == asr_metrics(texts, [s.heard for s in speech])["wer"] != figures["third_wer"]


def test_texts_from_a_plain_file_and_from_metadata(tmp_path):
    (tmp_path / "texts.txt").write_text("one  two\n\nthree\n")
    assert [s.text for s in load_sentences(tmp_path / "texts.txt")] == ["one two", "three"]
    (tmp_path / "metadata.jsonl").write_text('{"text": "four", "voice": "anna"}\n')
    for path in (tmp_path, tmp_path / "metadata.jsonl"):
        assert [(s.text, s.voice, s.seconds) for s in load_sentences(path)] == [("four", "anna", 0.0)]
    assert len(load_sentences("data/tts/train.jsonl")[0].codes) > 20
    recorded = load_sentences("data/tts/test/plain")[0]
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
    names = ("train.jsonl", "dev", "test/plain", "test/hard")
    parts = [{s.text for s in load_sentences(f"data/tts/{name}")} for name in names]
    assert list(map(len, parts)) == [511, 40, 100, 50] and len(set.union(*parts)) == 701
    train, _, test, _ = parts
    (tmp_path / "texts.txt").write_text("\n".join([*train, next(iter(test))]))
    args = grpo_tts.parse_args(["--data", str(tmp_path / "texts.txt"), "--test", "data/tts/test/plain"])
    texts, _, tests = split_texts(args)
    assert not {s.text for s in texts} & {s.text for s in tests["plain"]}
    assert "1 lines of --data" in capsys.readouterr().out


@pytest.mark.parametrize("chapter, flags, message", [*((grpo_tts, *case) for case in [
    (["--model", "checkpoints/token"], "--model checkpoints/token: no such folder"),
    (["--model", "checkpoints/asr"], "no speech tokens"), (["--codec", "checkpoints/tts"], "--codec checkpoints/tts"),
    (["--judge", "checkpoints/tts"], "--judge checkpoints/tts"), (["--data", "nowhere.txt"], "nowhere.txt: no such"),
    (["--speaker", "nowhere"], "--speaker nowhere"), (["--voices", "nowhere"], "nowhere: no such folder"),
    (["--batch", "1000"], "fewer than --batch"), (["--max-seconds", "0.1"], "a second of speech or more"),
    (["--max-seconds", "1000"], "positions"), (["--language", "klingon"], "--language klingon"),
    (["--second-judge", "checkpoints/asr"], "must not be --judge"),
    (["--third-judge", "checkpoints/asr2"], "it would say the same once more"),
    (["--third-judge", "nowhere"], "--third-judge nowhere: no such folder")]), *((diffro_tts, *case) for case in [
        (["--token2text", "nowhere"], "--token2text nowhere: no such folder"),
        (["--token2text", "checkpoints/tts"], "--token2text checkpoints/tts"),
        (["--teach", "recording", "--data", "data/tts/test/plain"], "--teach recording needs")])])
def test_a_users_mistake_gets_one_line(loaded_once, chapter, flags, message):
    with pytest.raises(SystemExit) as stopped:
        chapter.main(["--device", "cpu", "--steps", "1", *flags])
    assert str(stopped.value).startswith("error: ") and message in str(stopped.value)
    assert len(str(stopped.value).splitlines()) == 1


# ---- the script --------------------------------------------------------------------------------------------

def test_a_run_leaves_everything_behind(loaded_once, tmp_path):
    """Two samples of every test text are evaluated. That it can be resumed is shown in test_diffro.py."""
    (tmp_path / "test.txt").write_text("\n".join(s.text for s in load_sentences("data/tts/test/plain")[:3]))
    out = tmp_path / "run"
    grpo_tts.main(["--device", "cpu", "--batch", "2", "--group", "2", "--micro", "2", "--max-seconds", "1", "--steps",
                   "2", "--rewards", "R1,R2,R3", "--test", str(tmp_path / "test.txt"), "--dev",
                   str(tmp_path / "test.txt"), "--eval-samples", "2", "--out", str(out)])
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if "reward" in row]
    assert [r["step"] for r in rows] == [0, 1] and rows[0]["kl"] == 0 < rows[1]["kl"]
    assert set(rows[1]["seconds"]) >= {"rollout", "decode", "reward", "update"}
    for key in ("R1", "R2", "R3", "judge_failed", "tokens", "truncated", "repetition", "entropy", "grad_norm",
                "peak_by_phase_gib", "no_signal", "empty", "lr"):
        assert key in rows[0], key
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    for key in ("wer", "similarity", "length_ratio", "words_per_s", "f0_spread", "truncated", "repetition"):
        assert summary["test"]["test.txt"]["before"][key] is not None, key
    before = summary["test"]["test.txt"]["before"]
    assert before["length_ratio"] == 1 and summary["steps"] == 2                        # no recordings: its own
    assert before["utterances"] == 6
    page = (out / "samples" / "index.html").read_text(encoding="utf-8")
    assert page.count("<audio") == 12
    once, again = ((out / "samples" / f"0{i}-before.wav").read_bytes() for i in (1, 4))
    assert once != again                                                                # other samples of one text
    assert (out / "adapter" / "adapter_model.safetensors").exists()
