"""What the paper's full text corrected: each formula and setting where it was not the paper's, by hand and in use."""
import json
import math
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import ROOT, first, move_adapters

import diffro_tts
import grpo_asr
import grpo_tts
from data import with_lists
from engine.recognisers import collate
from engine.sampling import completion_logprobs, generator_for, reference, sample
from grpo_asr import encode, end_tokens, grpo_loss, kl_k2, kl_k3, mwer_loss
from rewards import Speech, asr_metrics, asr_reward, diversity_reward, token_diversity, tts_reward, voiced_pitch
from tools import prepare, reproduce

RATE = 16_000


# ---- rewards -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("heard", ["anna met peter in rome and then he said to her", "анна встретила петра в риме",
                                   "anna anna anna anna met peter in rome"])
def test_a_hallucination_of_any_kind_makes_the_whole_reward_minus_one(heard):
    """However much of the rest is right: with R1 and R3 beside it, and silence is dearer only than an invention."""
    text, names = "anna met peter in rome", ("anna", "peter", "rome")
    assert asr_reward(text, heard, names, rewards=("R1", "R2", "R3")).total == -1
    assert asr_reward(text, "", names, rewards=("R1", "R2", "R3")).total == 0
    assert asr_reward(text, heard, names, rewards=("R1", "R3")).total > -1
    milder = asr_reward(text, heard, names, rewards=("R1", "R2", "R3"), proportional=True)        # [FA]
    assert milder.total == -1 if milder.hallucination.kind == "language" else milder.total > -1


def test_r3_of_speech_is_the_sum_over_all_of_the_group():
    """1/G sum_j dist(o_i, o_j) / |o_i|, itself among the j, + the deviation of F0 over its mean."""
    a, b = np.array([1, 2, 3, 4]), np.array([1, 2])
    assert token_diversity([a, a, b]).tolist() == pytest.approx([2 / 3 / 4, 2 / 3 / 4, 4 / 3 / 2])
    assert token_diversity([a, a[:0]]).tolist() == pytest.approx([4 / 2 / 4, 4 / 2 / 1])
    hertz = np.where(np.arange(2 * RATE) < RATE, 100.0, 200.0)
    wave = (0.2 * np.sin(np.cumsum(hertz) / RATE * 2 * np.pi)).astype(np.float32)
    f0 = voiced_pitch([wave], RATE)[0]
    reward = diversity_reward([a, b], [wave, wave[:100]], 2, RATE)
    assert reward[0, 0] == pytest.approx(2 / 2 / 4 + float(f0.std(correction=0) / f0.mean()), abs=1e-5)
    assert 0.28 < reward[0, 0] - 0.25 < 0.36 and reward[0, 1] == pytest.approx(0.5)       # half an octave each way: 1/3


def test_pitfall_31_a_failed_sample_has_no_say_in_the_mean_that_replaces_it():
    heard = ((10, "a b"), (10, "a b"), (90, None), (30, "a"))
    speech = [Speech("a b", np.arange(n), None, text) for n, text in heard]
    total, parts, judged = tts_reward(speech, 4, ["R2"])
    assert judged.tolist() == [[True, True, False, True]]
    assert total[0, 2] == pytest.approx(float(parts["R2"][judged].mean()))


# ---- the KL's gradient -------------------------------------------------------------------------------------------

def test_pitfall_26_the_gradient_of_k2_is_that_of_the_kl_and_k3s_is_another():
    g = torch.Generator().manual_seed(3)
    logits, ref = (torch.randn(5, generator=g, dtype=torch.float64) for _ in range(2))
    logits.requires_grad_()
    ref_logp, found = torch.log_softmax(ref, 0), {}

    def gradient(loss):
        return torch.autograd.grad(loss, logits)[0]

    logp = torch.log_softmax(logits, 0)
    exact = gradient((logp.exp() * (logp - ref_logp)).sum())                        # KL(pi | ref)
    for name, kl in (("k2", kl_k2), ("k3", kl_k3)):
        logp = torch.log_softmax(logits, 0)
        found[name] = gradient((logp.exp().detach() * kl(logp, ref_logp)).sum())    # expected over the policy's samples
    assert torch.allclose(found["k2"], exact) and not torch.allclose(found["k3"], exact, rtol=0.1)
    logp = torch.log_softmax(logits, 0)
    assert torch.allclose(found["k3"], gradient((ref_logp.exp() * (ref_logp - logp)).sum()))       # KL(ref | pi)


def test_pitfall_26_a_rare_token_moves_a_step_no_more_than_its_advantage():
    """p_ref 0.983 and p 0.002, A = -2.64: with k3 the KL teaches back 17 times what RL unlearns."""
    ref_logp, advantage = torch.tensor([[math.log(0.983)]]), torch.tensor([-2.64])
    pull = {}
    for kl in ("k2", "k3"):
        for beta in (0.0, 0.1):
            logp = torch.tensor([[math.log(0.002)]], requires_grad=True)
            grpo_loss(logp, logp.detach(), ref_logp, advantage, torch.ones(1, 1), beta=beta, kl=kl).backward()
            pull[kl, beta] = float(logp.grad)
    assert pull["k2", 0.0] == pull["k3", 0.0] == pytest.approx(2.64)                # down, by its advantage
    assert 0 < pull["k2", 0.1] < 2.64 and pull["k3", 0.1] < -15 * 2.64


# ---- MWER --------------------------------------------------------------------------------------------------------

def mwer_case():
    g = torch.Generator().manual_seed(1)
    logp = -torch.rand(6, 4, generator=g, dtype=torch.float64)
    mask = torch.arange(4) < torch.tensor([4, 2, 3, 1, 4, 2])[:, None]
    errors = torch.tensor([[0.0, 2.0, 1.0], [3.0, 3.0, 0.0]], dtype=torch.float64)
    told = -torch.rand(2, 5, generator=g, dtype=torch.float64)
    told_mask = torch.arange(5) < torch.tensor([5, 3])[:, None]
    return logp, mask, errors, told, told_mask


def test_mwer_against_loops():
    logp, mask, errors, told, told_mask = mwer_case()
    total = 0.0
    for b in (0, 1):
        p = [math.exp(sum(float(x) for x, m in zip(logp[3 * b + i], mask[3 * b + i]) if m)) for i in range(3)]
        mean = sum(errors[b].tolist()) / 3
        total += sum(x / sum(p) * (float(w) - mean) for x, w in zip(p, errors[b]))
        total -= 0.01 * sum(float(x) for x, m in zip(told[b], told_mask[b]) if m)
    assert float(mwer_loss(logp, mask, errors, told, told_mask)) == pytest.approx(total / 2, abs=1e-12)


def test_mwer_gradient_against_finite_differences():
    logp, mask, errors, told, told_mask = mwer_case()
    assert torch.autograd.gradcheck(lambda x, y: mwer_loss(x, mask, errors, y, told_mask),
                                    (logp.requires_grad_(), told.requires_grad_()))


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """A folder of four clips with keywords."""
    folder = tmp_path_factory.mktemp("names")
    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as out:
        for u in first(4, "data/test/keywords"):
            out.write(json.dumps({"file_name": str((ROOT / u.path).resolve()), "text": u.text,
                                  "keywords": u.keywords}) + "\n")
    return str(folder)


def trained(names, out, *flags):
    grpo_asr.main(["--device", "cpu", "--steps", "1", "--batch", "2", "--group", "4", "--eval-every", "0", "--data",
                   "data/d1", "--dev", names, "--test", names, "--out", str(out), "--temperature", "1.6", *flags])
    return [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def test_mwer_takes_a_step_of_its_own(names, tmp_path, monkeypatch):
    """Its loss is what the optimiser sees, over word errors counted by hand."""
    seen = []
    monkeypatch.setattr(grpo_asr, "mwer_loss", lambda *given: seen.append(given) or mwer_loss(*given))
    rows = trained(names, tmp_path / "run", "--objective", "mwer", "--micro", "4")
    assert rows[2]["grad_norm"] > 0 and len(seen) == 2 and seen[0][2].shape == (1, 4)
    errors = torch.cat([given[2] for given in seen])
    assert (errors == errors.round()).all() and errors.sum() > 0
    with pytest.raises(SystemExit):
        grpo_asr.parse_args(["--objective", "mwer", "--micro", "4", "--group", "8"])      # a group in two passes
    with pytest.raises(SystemExit):
        grpo_asr.parse_args(["--objective", "mwer", "--rewards", "R1,R2"])


# ---- keyword lists with distractors ------------------------------------------------------------------------------

ONE = Namespace(seed=1, language="en")


def test_a_list_holds_the_clips_own_keywords_and_others_that_are_not_said():
    clips = [u for u in first(12, "data/test/keywords") if u.keywords]
    pool = {k for u in clips for k in u.keywords} | {clips[0].text.split()[0]}             # a word that is said, too
    listed = with_lists(clips, pool, 5, ONE)
    for u in listed:
        said = u.text.split()
        assert set(u.keywords) <= set(u.listed) and len(u.listed) == len(set(u.keywords)) + 5
        assert not any(word in said for word in set(u.listed) - set(u.keywords))
    assert listed == with_lists(clips, sorted(pool), 5, ONE)
    assert listed != with_lists(clips, pool, 5, Namespace(seed=2, language="en"))
    assert any(u.listed[:len(u.keywords)] != u.keywords for u in listed)                   # in random order
    assert [set(u.listed) for u in with_lists(clips, pool, 0, ONE)] == [set(u.keywords) for u in clips]


def test_the_list_is_what_the_prompt_holds_in_training_and_evaluation_alike(recogniser, names, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(grpo_asr, "collate", lambda processor, clips, language: asked.extend(
        (u.path.name, u.listed) for u in clips) or collate(processor, clips, language))
    rows = trained(names, tmp_path / "run", "--hotwords", "3")
    assert asked and all(len(words) >= 3 for _, words in asked) and len(set(asked)) == len({name for name, _ in asked})
    assert rows[0]["arguments"]["hotwords"] == 3
    processor, [clip] = recogniser[1], with_lists(first(1, "data/test/keywords"), ["zanzibar"], 1, ONE)
    prompt = processor.tokenizer.decode(collate(processor, [clip], "en")["input_ids"][0])
    assert all(word in prompt for word in clip.listed) and "zanzibar" in prompt
    test = json.loads((tmp_path / "run/summary.json").read_text(encoding="utf-8"))["test"]
    assert next(iter(test.values()))["after"]["listed_not_said"] is not None


def test_keyword_figures_apart():
    """Of two listed words that were not said one was transcribed; a name is missing, another is in its place."""
    found = asr_metrics(["anna met peter"], ["anna met paul"], {"anna", "peter", "paul"},
                        listed=[("anna", "peter", "paul", "rome")])
    assert found["keyword_precision"] == found["keyword_recall"] == found["keyword_f1"] == 0.5
    assert found["listed_not_said"] == 0.5


# ---- supervised, then GRPO ---------------------------------------------------------------------------------------

def test_the_reference_is_the_adapter_that_a_run_starts_from(names, tmp_path):
    start = tmp_path / "start"
    trained(names, start, "--objective", "supervised", "--lr", "1e-2", "--eval-every", "1")
    saved = json.loads((start / "log.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert saved["arguments"]["objective"] == "supervised"
    processor, policy = grpo_asr.load(grpo_asr.parse_args(["--device", "cpu"]), torch.device("cpu"))
    move_adapters(policy, 0.03)
    policy.save_pretrained(start / "adapter")                                       # far from the base
    rows = trained(names, tmp_path / "next", "--adapter", str(start), "--eval-every", "1")
    assert rows[2]["kl"] == pytest.approx(0, abs=1e-6) and rows[2]["max_d"] == pytest.approx(0, abs=1e-3)
    other = trained(names, tmp_path / "plain")
    assert rows[2]["entropy"] != other[2]["entropy"]                                # it begins where the other ended
    grpo_asr.main(["--resume", str(tmp_path / "next"), "--steps", "2"])
    resumed = [json.loads(line) for line in (tmp_path / "next/log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert 0 < next(r for r in resumed if r.get("step") == 1 and "kl" in r)["kl"] < 0.05   # still measured from there


def test_the_reference_changes_nothing_in_the_policy(recogniser, clips):
    _, processor, policy = recogniser
    prompts = encode(policy, collate(processor, clips[:1], "en"))
    rollout = sample(policy, prompts, 2, 20, end_tokens(policy), 1.0, generator_for(0, 0, torch.device("cpu")))
    logp = lambda: completion_logprobs(policy, prompts, rollout.ids, rollout.mask, 2, 1.0)  # noqa: E731
    with torch.no_grad():
        now = logp()
        policy.start = {n: w.detach() * 0.5 for n, w in policy.named_parameters() if w.requires_grad}
        try:
            with reference(policy):
                halved = logp()
            assert torch.equal(logp(), now) and not torch.allclose(halved, now)
            with reference(policy):
                assert torch.equal(logp(), halved)
        finally:
            policy.start = None
        with reference(policy):
            assert not torch.allclose(logp(), now) and not torch.allclose(logp(), halved)       # adapters off again
        assert torch.equal(logp(), now)


def test_an_adapter_of_another_model_is_refused(names, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/log.jsonl").write_text(json.dumps({"arguments": {"model": "x/y", "lora_rank": 16}}) + "\n")
    for run, message in (("other", "trained x/y"), ("nowhere", "no run there")):
        with pytest.raises(SystemExit) as stopped:
            trained(names, tmp_path / "run", "--adapter", str(tmp_path / run))
        assert message in str(stopped.value)


# ---- speech ------------------------------------------------------------------------------------------------------

def test_r1_by_tokens_makes_no_waveform_and_asks_no_judge(loaded_once, tmp_path, monkeypatch):
    (tmp_path / "texts.txt").write_text("the animal near the market belongs to walter")
    decoded, seconds = [], ["--max-seconds", "1", "--eval-every", "0"]
    from engine.judges import Codec
    decode = Codec.decode
    monkeypatch.setattr(Codec, "decode", lambda codec, codes: decoded.append(len(codes)) or decode(codec, codes))
    grpo_tts.main(["--device", "cpu", "--steps", "1", "--batch", "2", "--group", "4", "--judge", "token2text", *seconds,
                   "--dev", str(tmp_path / "texts.txt"), "--test", str(tmp_path / "texts.txt"), "--out",
                   str(tmp_path / "run")])
    assert set(decoded) == {1}                              # the evaluations' one text, never the samples of a step
    row = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text(encoding="utf-8").splitlines()][2]
    assert row["reward_std"] > 0 and row["grad_norm"] > 0 and row["judge_failed"] == 0


def test_diffro_is_hard_by_default_and_alone_takes_16_texts_once():
    alone, both = (diffro_tts.parse_args(flags) for flags in ([], ["--method", "grpo+diffro"]))
    assert (alone.soft, alone.batch, alone.group) == (False, 16, 1) and (both.batch, both.group) == (2, 8)
    assert diffro_tts.parse_args(["--batch", "2", "--group", "3", "--micro", "3"]).group == 3
    noise = torch.empty(2, 3, 5).exponential_(generator=torch.Generator().manual_seed(0))
    hard = diffro_tts.soft_tokens(torch.randn(2, 3, 5), noise)
    assert torch.allclose(hard.sort(dim=-1).values, torch.tensor([0.0, 0, 0, 0, 1]), atol=1e-6)


# ---- pools and rows ----------------------------------------------------------------------------------------------

def test_d1_is_what_recognisers_hear_differently_or_with_long_repetitions(tmp_path, monkeypatch, capsys):
    heard = {"one": ["a b", "c d", "e e e e", "g"], "two": ["a b", "c x", "e e e e", None]}
    with open(tmp_path / "metadata.jsonl", "w", encoding="utf-8") as out:
        for i, u in enumerate(first(4, "data/d0")):
            out.write(json.dumps({"file_name": str((ROOT / u.path).resolve()), "text": f"text {i}"}) + "\n")
    monkeypatch.setattr(prepare, "transcripts", lambda args, rows, name, flag: heard[name])
    prepare.main(["select", "disagreement", str(tmp_path), "--out", str(tmp_path / "d1"), "--model", "one",
                  "--second-model", "two"])
    rows = [json.loads(line) for line in (tmp_path / "d1/metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["text"] for row in rows] == ["text 1", "text 2"]                # differ; loop alike; one failed: not


def test_the_papers_rows_are_there_by_name_with_its_own_figures(capsys):
    reproduce.main(["--list"])
    lines = capsys.readouterr().out.splitlines()
    paper = [line for line in lines if "[paper]" in line]
    assert len([line for line in paper if line.startswith("table1 ")]) == 5
    assert len([line for line in paper if line.startswith("table2 ")]) == 6
    assert any("R1,2,3 x all" in line and "data/d0 data/d1 data/d2_long data/d3" in line for line in paper)
    assert all("--steps 2500" in line for line in paper if line.startswith("figure3"))
    assert any("MWER" in line and "[choice]" in line for line in lines)
    assert reproduce.PAPER["table1"]["R1,2,3 x all"][2:] == ("9.71 / 2.61 / 1.68", "6.03 / 0.86 / 0.75")
    for rows in reproduce.ROWS.values():                                            # every row's flags are a script's
        for script, flags in rows.values():
            module = {"grpo_asr.py": grpo_asr, "grpo_tts.py": grpo_tts, "diffro_tts.py": diffro_tts}[script]
            module.parse_args(flags.split())


def test_lists_without_keywords_in_the_data_are_refused(names, tmp_path):
    with pytest.raises(SystemExit, match="--hotwords needs keywords"):
        trained(names, tmp_path / "run", "--hotwords", "3", "--data", "data/test/noise")
