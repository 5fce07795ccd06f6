"""The wiring of the three loops: one real step each, its gradient recomputed from the captured rollout by plain loops
written from the paper; and what surrounds the loops: seeds, evaluation, the best adapter, the split."""
import json

import jiwer
import pytest
import torch
from conftest import move_adapters

import diffro_tts
import engine.speech
import grpo_asr
import grpo_tts
from data import load_folder, load_sentences, split_clips, split_texts
from engine.recognisers import collate
from engine.sampling import sample
from engine.text import normalize_text

TEXTS = [s.text for s in load_sentences("data/tts/test/plain")[:3]]


class Spy:
    """Runs a chapter on few data and keeps what went by: set-up, rollouts, generators, gradients at the optimiser."""

    def __init__(self, monkeypatch, chapter, judged=None):
        self.rollouts, self.seeds, self.gradients, self.chapter = [], [], [], chapter
        set_up = chapter.set_up

        def prepared(*given):
            self.made = set_up(*given)
            run = self.made[0]
            self.move()
            run.optimizer.register_step_pre_hook(self.capture)
            if judged:
                self.made[1].judge.transcribe = lambda waves: judged[:len(waves)]
            return self.made

        def kept(*given, **named):
            if named:                                       # an evaluation
                return sample(*given, **named)
            self.seeds.append(given[-1].initial_seed())
            rollout = sample(*given)
            noise = torch.randn(rollout.logp.shape, generator=torch.Generator().manual_seed(0))
            if chapter is not grpo_asr:                     # one sample ends, with the token that has no sound
                rollout.ids[0, 20], rollout.mask[0, 21:], rollout.truncated[0] = self.made[1].end, False, False
            rollout.logp += 0.3 * noise                      # a sampler that differs, so that ratio and clip matter
            self.rollouts.append(rollout)
            return rollout

        monkeypatch.setattr(chapter, "set_up", prepared)
        monkeypatch.setattr(chapter, "sample", kept)

    def move(self):
        """Policy and reference differ, always by the same; at the end of a run its best adapter, zero, is loaded."""
        move_adapters(self.made[0].policy, 0.02)

    def capture(self, *_):
        """The gradients that reach the optimiser; the step itself then moves nothing."""
        self.gradients.append([w.grad.clone() for w in self.made[0].weights])
        for weight in self.made[0].weights:
            weight.grad.zero_()


def token_rows(policy, start, ids, temperature):
    """Logits (T, V) of one sample read after its own prompt alone, embedded (L, D): no cache, no padding, no group."""
    tokens = policy.get_input_embeddings()(ids)
    embeds = torch.cat([start, tokens])[None]
    logits = policy(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]).long()).logits
    return logits[0, len(start) - 1:-1] / temperature


def advantages_by_the_paper(reward):
    """Eq. 1 of one group, those samples left out whose reward is None."""
    known = [r for r in reward if r is not None]
    mean = sum(known) / len(known)
    spread = (sum((r - mean) ** 2 for r in known) / len(known)) ** 0.5
    return [0.0 if r is None or spread == 0 else (r - mean) / (spread + 1e-4) for r in reward]


def grpo_term(logp, old_logp, ref_logp, advantage, clip, beta, kl="k2"):
    """One sample's part of Eq. 3, token by token."""
    total = 0.0
    for now, old, ref in zip(logp, old_logp, ref_logp):
        ratio = torch.exp(now - old)
        clipped = min(max(float(ratio.detach()), 1 - clip), 1 + clip)
        kept = ratio if float(ratio.detach()) * advantage <= clipped * advantage else torch.tensor(clipped)
        d = ref - now
        total = total + kept * advantage - beta * (d * d / 2 if kl == "k2" else torch.exp(d) - d - 1)
    return total / len(logp)


def pulled(policy, rollout, starts, group, temperature):
    """For every sample its logits now and under the reference, and log-probs: plain, one row at a time."""
    for i, (ids, mask) in enumerate(zip(rollout.ids, rollout.mask)):
        ids = ids[mask]
        logits = token_rows(policy, starts[i // group], ids, temperature)
        with torch.no_grad(), policy.disable_adapter():
            ref_logits = token_rows(policy, starts[i // group], ids, temperature)
        logp, ref_logp = (torch.log_softmax(x, -1).gather(1, ids[:, None])[:, 0] for x in (logits, ref_logits))
        yield i, ids, logits, ref_logits, logp, ref_logp


def agree(found, weights, loss):
    """The captured gradient is that of `loss`, clipped at norm 0.5."""
    expected = torch.autograd.grad(loss, weights)
    norm = torch.nn.utils.get_total_norm(expected)
    expected = torch.cat([(g * min(1.0, 0.5 / float(norm))).flatten() for g in expected])
    found = torch.cat([g.flatten() for g in found])
    assert (found - expected).norm() < 2e-2 * expected.norm(), (found.norm(), expected.norm())
    return float(norm)


SMALL = ["--device", "cpu", "--steps", "2", "--batch", "2", "--seed", "3", "--eval-every", "0"]


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Folders: a test set of two clips; texts to test on."""
    root = tmp_path_factory.mktemp("few")
    clips = load_folder("data/test/short")[:2]
    (root / "clips").mkdir()
    (root / "clips/metadata.jsonl").write_text("\n".join(
        json.dumps({"file_name": str(u.path.resolve()), "text": u.text}) for u in clips))
    (root / "texts.txt").write_text("\n".join(TEXTS))
    return root


# ---- chapter 1 ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("beta, kl", [(0.3, "k3"), (0.3, "k2"), (60.0, "k2")])  # with the last the gradient is clipped
def test_the_step_of_chapter_1_is_that_of_the_paper(few, tmp_path, monkeypatch, beta, kl):
    spy = Spy(monkeypatch, grpo_asr)
    grpo_asr.main([*SMALL, "--group", "4", "--micro", "2", "--beta", str(beta), "--clip", "0.1", "--temperature", "1.6",
                   "--kl", kl, "--dev", str(few / "clips"), "--test", str(few / "clips"), "--out",
                   str(tmp_path / "run")])
    spy.move()
    run, processor, clips, *_ = spy.made
    assert spy.seeds == [1_000_003 * 3, 1_000_003 * 3 + 1]                          # new noise every step
    logged = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text(encoding="utf-8").splitlines()]
    for step in (0, 1):
        batch = [clips[i] for i in grpo_asr.batch_indices(step, len(clips), 2, 3)]
        rollout, loss, k3 = spy.rollouts[step], 0.0, []
        starts = [grpo_asr.encode(run.policy, collate(processor, [u], "en")).embeds[0] for u in batch]
        texts = grpo_asr.decode(processor, rollout)
        pairs = [(normalize_text(batch[i // 4].text), normalize_text(text)) for i, text in enumerate(texts)]
        reward = [max(0, 1 - jiwer.wer(*pair)) for pair in pairs]
        assert max(reward[:4]) > min(reward[:4]) or max(reward[4:]) > min(reward[4:])
        advantage = advantages_by_the_paper(reward[:4]) + advantages_by_the_paper(reward[4:])
        for i, _, _, _, logp, ref_logp in pulled(run.policy, rollout, starts, 4, 1.6):
            loss = loss - grpo_term(logp, rollout.logp[i], ref_logp, advantage[i], 0.1, beta, kl) / 8
            k3 += (torch.exp(ref_logp - logp) - (ref_logp - logp) - 1).tolist()
        norm = agree(spy.gradients[step], run.weights, loss)
        row = next(r for r in logged if r.get("step") == step and "reward" in r)
        assert row["reward"] == pytest.approx(sum(reward) / 8, abs=1e-4)
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-2)
        assert row["kl"] == pytest.approx(sum(k3) / len(k3), rel=1e-2)
        assert norm > 0.5 or beta < 1


# ---- chapters 2 and 3 --------------------------------------------------------------------------------------------

HEARD = [TEXTS[0], None, "a horse in rome", TEXTS[1], "so", "so", "so", "so"]         # the second group is all alike


def speech_step(few, out, monkeypatch, chapter, *flags):
    """One step of a chapter whose judge hears HEARD; (spy, prompts of both texts alone, the texts)."""
    spy = Spy(monkeypatch, chapter, None if "diffro" in flags else HEARD)              # alone it has no judge
    chapter.main([*SMALL, "--steps", "1", "--group", "4", "--micro", "2", "--max-seconds", "1", "--clip", "0.1",
                  "--temperature", "1.3", "--dev", str(few / "texts.txt"), "--test", str(few / "texts.txt"), "--out",
                  str(out), *flags])
    spy.move()
    run, studio, texts = spy.made
    batch = [texts[i] for i in grpo_asr.batch_indices(0, len(texts), 2, 3)]
    alone = [studio.prompts([s]) for s in batch]
    return spy, [p.embeds[0] for p in alone], [s.text for s in batch]


def heard_advantages(texts):
    reward = [None if heard is None else max(0, 1 - jiwer.wer(texts[i // 4], heard)) for i, heard in enumerate(HEARD)]
    return advantages_by_the_paper(reward[:4]) + advantages_by_the_paper(reward[4:])


@pytest.fixture
def heard_well(monkeypatch):
    """Chapter 2's judge hears the first group's own text once, so that its rewards differ."""
    first = [s.text for s in load_sentences("data/tts/train.jsonl")]
    index = grpo_asr.batch_indices(0, len(first), 2, 3)[0]
    monkeypatch.setitem(globals(), "HEARD", [first[index], None, "a horse in rome", first[index] + " so", *HEARD[4:]])


def test_the_step_of_chapter_2_is_that_of_the_paper(few, tmp_path, monkeypatch, heard_well):
    """Also for a sample that the judge failed on: it teaches nothing, and the others as if it were not there."""
    spy, starts, texts = speech_step(few, tmp_path / "run", monkeypatch, grpo_tts, "--beta", "0.3")
    run, rollout, loss, advantage = spy.made[0], spy.rollouts[0], 0.0, heard_advantages(texts)
    assert spy.seeds == [1_000_003 * 3] and advantage[0] > 0 > advantage[2] and advantage[4:] == [0] * 4
    for i, _, _, _, logp, ref_logp in pulled(run.policy, rollout, starts, 4, 1.3):
        if HEARD[i] is not None:
            loss = loss - grpo_term(logp, rollout.logp[i], ref_logp, advantage[i], 0.1, 0.3) / 8
    agree(spy.gradients[0], run.weights, loss)


@pytest.mark.parametrize("method, beta", [("diffro", 3.0), ("grpo+diffro", 0.3)])
def test_the_step_of_chapter_3_is_that_of_the_paper(few, tmp_path, monkeypatch, heard_well, method, beta):
    """The Gumbel noise is drawn behind the rollout's, micro-batch by micro-batch; DiffRO learns where A > 0 alone."""
    grpo = method != "diffro"
    flags = ["--method", method, "--tau", "0.7", "--weight", "0.5", "--beta", str(beta)]
    noises, exponential = [], torch.Tensor.exponential_

    def drawn(tensor, *given, **named):
        noises.append(exponential(tensor, *given, **named).clone())
        return tensor.copy_(noises[-1])

    monkeypatch.setattr(torch.Tensor, "exponential_", drawn)
    spy, starts, texts = speech_step(few, tmp_path / "run", monkeypatch, diffro_tts, *flags)
    run, studio, _ = spy.made
    rollout, reader, loss = spy.rollouts[0], studio.token2text, 0.0
    noises = [n for n in noises if n.ndim == 3][-4:]                                # of four micro-batches of two
    ids_of = {c: studio.tokenizer.convert_tokens_to_ids(f"<|s_{c}|>") for c in range(studio.codec.count)}
    first, table = reader.model.config.first_speech_token, reader.model.get_input_embeddings().weight
    advantage, code_of = heard_advantages(texts), {v: k for k, v in ids_of.items()}
    for i, ids, logits, ref_logits, logp, ref_logp in pulled(run.policy, rollout, starts, 4, 1.3):
        logits_of_codes = logits[:, [ids_of[c] for c in range(len(ids_of))]]
        gumbel = -torch.log(noises[i // 2][i % 2, :len(ids)])
        soft = torch.softmax((logits_of_codes + gumbel) / 0.7, -1)
        hard = torch.nn.functional.one_hot(soft.argmax(-1), soft.shape[-1])
        soft = hard + soft - soft.detach()                                          # straight-through
        said = torch.tensor([int(t) in code_of for t in ids])           # the end token and stray letters have no sound
        labels, _ = reader.text_ids([texts[i // 4]])
        out = reader.model(inputs_embeds=(soft @ table[first:first + len(ids_of)])[None], labels=labels,
                           attention_mask=said[None].long())
        p, q = torch.softmax(logits, -1), torch.softmax(ref_logits, -1)
        kl = (p * (p.log() - q.log())).sum(-1).mean()
        if not grpo or advantage[i] > 0:
            loss = loss - (0.5 if grpo else 1) * (-out.loss - beta * kl) / 8        # a mean over text tokens
        if grpo and HEARD[i] is not None:
            loss = loss - grpo_term(logp, rollout.logp[i], ref_logp, advantage[i], 0.1, beta) / 8
    agree(spy.gradients[0], run.weights, loss)


# ---- what surrounds the loops ------------------------------------------------------------------------------------

@pytest.mark.parametrize("chapter, flags", [(grpo_asr, []), (grpo_tts, ["--max-seconds", "1.5"])])
def test_the_best_adapter_is_what_is_evaluated_in_the_end(few, tmp_path, monkeypatch, chapter, flags):
    """WER 0.5 before, 0.2 after one step, 0.4 after two: an evaluation looks up whose weights it is given."""
    script, known = [0.5, 0.2, 0.4], []

    def figures(policy):
        weights = torch.cat([w.detach().flatten().clone() for n, w in policy.named_parameters() if "lora_B" in n])
        same = [wer for w, wer in known if torch.equal(w, weights)]
        if not same:
            known.append((weights, script[len(known)]))
        return same[0] if same else known[-1][1]

    if chapter is grpo_asr:
        evaluate = grpo_asr.evaluate
        monkeypatch.setattr(grpo_asr, "evaluate", lambda policy, *given: (
            lambda texts, metrics: (texts, metrics | {"wer": figures(policy)}))(*evaluate(policy, *given)))
        test, rewards = few / "clips", ["--temperature", "1.6"]
    else:
        evaluate = engine.speech.evaluate
        monkeypatch.setattr(engine.speech, "evaluate", lambda studio, *given: (
            lambda speech, metrics: (speech, metrics | {"wer": figures(studio.policy)}))(*evaluate(studio, *given)))
        test, rewards = few / "texts.txt", ["--rewards", "R1,R2"]
    out = tmp_path / "run"
    chapter.main([*SMALL, "--eval-every", "1", "--group", "4", "--micro", "8", "--dev", str(test), "--test", str(test),
                  "--out", str(out), *flags, *rewards])
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    found = {name: summary[name] for name in ("before", "after", "best", "best_step", "last", "steps")}
    assert found == {"before": 0.5, "after": 0.2, "best": 0.2, "best_step": 1, "last": 0.4, "steps": 2}


@pytest.mark.parametrize("chapter", [grpo_asr, grpo_tts, diffro_tts])
def test_dev_chooses_the_adapter_and_is_in_no_table(few, tmp_path, monkeypatch, chapter):
    """WER 0.5, 0.2 and 0.4 on dev, one sentence; 0.9 and 0.8 on the test set, two: the sets' sizes tell them apart."""
    dev, test, module = iter([0.5, 0.2, 0.4]), iter([0.9, 0.8]), grpo_asr if chapter is grpo_asr else engine.speech
    evaluate, which = module.evaluate, 2 if chapter is grpo_asr else 1
    monkeypatch.setattr(module, "evaluate", lambda *given: (lambda told, metrics: (told, metrics | {
        "wer": next(dev if len(given[which]) == 1 else test)}))(*evaluate(*given)))
    if chapter is grpo_asr:
        rows = (few / "clips/metadata.jsonl").read_text().splitlines()
        (tmp_path / "one").mkdir()
        (tmp_path / "one/metadata.jsonl").write_text(rows[0] + "\n")
        sets = ["--dev", str(tmp_path / "one"), "--test", str(few / "clips")]
    else:
        for name, texts in (("one.txt", TEXTS[:1]), ("two.txt", TEXTS[1:])):
            (tmp_path / name).write_text("\n".join(texts))
        sets = ["--dev", str(tmp_path / "one.txt"), "--test", str(tmp_path / "two.txt"), "--max-seconds", "1"]
    chapter.main([*SMALL, "--eval-every", "1", "--group", "2", *sets, "--out", str(tmp_path / "run")])
    summary = json.loads((tmp_path / "run/summary.json").read_text(encoding="utf-8"))
    found = {name: summary[name] for name in ("before", "after", "best", "best_step", "last")}
    assert found == {"before": 0.9, "after": 0.8, "best": 0.2, "best_step": 1, "last": 0.4}
    assert list(summary["test"]) == ["clips" if chapter is grpo_asr else "two.txt"]


def test_what_is_reported_is_what_the_second_judge_hears(few, tmp_path, monkeypatch):
    """The judge that rewards hears every text perfectly here, the second one always the same sentence."""
    load_judges, asked = engine.speech.load_judges, []

    def scripted(*given, **named):
        codec, judge, second, speaker = load_judges(*given, **named)
        judge.transcribe = lambda waves: TEXTS[:len(waves)]
        second.transcribe = lambda waves: asked.append(len(waves)) or [TEXTS[0]] * len(waves)
        return codec, judge, second, speaker

    monkeypatch.setattr(engine.speech, "load_judges", scripted)
    grpo_tts.main([*SMALL, "--steps", "0", "--max-seconds", "1", "--dev", str(few / "texts.txt"), "--test",
                   str(few / "texts.txt"), "--out", str(tmp_path / "run")])
    summary = json.loads((tmp_path / "run/summary.json").read_text(encoding="utf-8"))
    assert summary["before"] == summary["after"] == pytest.approx(jiwer.wer(TEXTS, [TEXTS[0]] * 3), abs=1e-5)
    assert summary["before"] > 0.3 and asked == [3, 3]              # dev and test, once: no step, no other adapter


def test_what_no_step_made_better_is_evaluated_once(few, tmp_path, monkeypatch):
    evaluate, asked = grpo_asr.evaluate, []
    monkeypatch.setattr(grpo_asr, "evaluate", lambda *given: asked.append(1) or evaluate(*given))
    clips = str(few / "clips")
    grpo_asr.main([*SMALL, "--steps", "0", "--dev", clips, "--test", clips, "--out", str(tmp_path / "run")])
    summary = json.loads((tmp_path / "run/summary.json").read_text(encoding="utf-8"))
    assert len(asked) == 2 and summary["before"] == summary["after"]


def test_what_is_held_out_is_not_trained_on(tmp_path, capsys):
    clips = load_folder("data/d0")[:30]
    (tmp_path / "metadata.jsonl").write_text("\n".join(
        json.dumps({"file_name": str(u.path.resolve()), "text": u.text}) for u in clips))
    train, dev, tests = split_clips(grpo_asr.parse_args(["--data", str(tmp_path)]), 16_000)
    parts = [{u.path for u in part} for part in (train, dev, tests["held-out"])]
    assert list(map(len, parts)) == [25, 2, 3] and len(set.union(*parts)) == 30
    (tmp_path / "texts.txt").write_text("\n".join(f"text number {i}" for i in range(40)))
    texts, dev, tests = split_texts(grpo_tts.parse_args(["--data", str(tmp_path / "texts.txt")]))
    parts = [{s.text for s in part} for part in (texts, dev, tests["held-out"])]
    assert list(map(len, parts)) == [33, 3, 4] and len(set.union(*parts)) == 40
    assert capsys.readouterr().out.count("held out") == 4
