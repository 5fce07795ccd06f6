"""The recognisers and what they hear: the training corpus, both models, RL pools and test sets of chapter 1.

The stages, called by `python -m pretrain STAGE`:
    corpus       speak the training corpus, keep its features                      build/corpus.pt
    decoded      features of what the codec says                                   build/decoded.pt
    asr, asr2    the policy of chapter 1; a smaller one, of another seed           checkpoints/asr, checkpoints/asr2
    sets         RL pools D0-D3 and the test sets, from both                       data/
Everything here is our choice; the class is that of the published checkpoint.
"""
import copy
import json
import math
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import jiwer
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    FunAsrNanoConfig,
    FunAsrNanoFeatureExtractor,
    FunAsrNanoForConditionalGeneration,
    FunAsrNanoProcessor,
    GenerationConfig,
    Qwen2Tokenizer,
)

from engine.judges import Judge
from engine.models import mend_attention
from engine.run import pick_device
from pretrain import corpus, tts
from rewards import repeats_itself

BUILD, CHECKPOINTS, DATA = Path("build"), Path("checkpoints"), Path("data")
NOISY_SHARE, TARGET_SNR = 0.2, (5.0, 20.0)  # the target domain: how much of it is in noise, dB
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>"]
# The prompt that Fun-ASR-Nano was trained with, as a template for the same kinds of content.
CHAT_TEMPLATE = r"""{%- set nl = '\n' -%}
{%- for message in messages -%}
{%- if loop.first and message.role != 'system' -%}
{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
{%- endif -%}
{{ '<|im_start|>' + message.role + nl }}
{%- if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- set found = namespace(context='', keywords=[], language='') -%}
{%- for part in message.content -%}
{%- if part.type == 'text' -%}{%- set found.context = found.context + part.text + nl -%}
{%- elif part.type == 'keywords' -%}{%- set found.keywords = found.keywords + part.keywords -%}
{%- elif part.type == 'language' -%}{%- set found.language = '成' + part.language -%}
{%- endif -%}
{%- endfor -%}
{%- if found.context or found.keywords -%}
{{ '请结合上下文信息，更加准确地完成语音转写任务。如果没有相关信息，我们会留空。\n\n\n' }}
{{- '**上下文信息：**\n\n\n' + found.context }}
{%- if found.keywords -%}{{ '热词列表：[' + found.keywords | join(', ') + ']\n' }}{%- endif -%}
{%- endif -%}
{{ '语音转写' + found.language + '：<|object_ref_start|>' }}
{%- endif -%}
{{ '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""
SIZES = {  # encoder layers, width, FFN; LLM layers, width, FFN
    "asr": dict(encoder_layers=6, width=256, encoder_ffn=1024, llm_layers=4, llm_ffn=768, seed=1),
    "asr2": dict(encoder_layers=5, width=192, encoder_ffn=768, llm_layers=3, llm_ffn=576, seed=2),
}


# ---- tokenizer, processor, model ---------------------------------------------------------------------------

def build_processor(texts, vocab_size=640):
    """Byte-level BPE on `texts` and the prompt's own words, in the classes of the real checkpoint."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    prompt = ["请结合上下文信息，更加准确地完成语音转写任务。", "如果没有相关信息，我们会留空。",
              "**上下文信息：**", "热词列表：[", "语音转写成英文：", "语音转写：", "\n\n\n",
              "You are a helpful assistant.", "system\n", "user\n", "assistant\n"]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(SPECIAL), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(list(texts) + prompt * len(texts), trainer)
    bpe = json.loads(tokenizer.to_str())["model"]
    vocab = {**bpe["vocab"], **{token: len(bpe["vocab"]) + i for i, token in enumerate(SPECIAL)}}
    qwen = Qwen2Tokenizer(vocab=vocab, merges=[tuple(m) for m in bpe["merges"]], pad_token=SPECIAL[0],
                          eos_token=SPECIAL[2], additional_special_tokens=SPECIAL[1:], padding_side="left")
    return FunAsrNanoProcessor(FunAsrNanoFeatureExtractor(), qwen, chat_template=CHAT_TEMPLATE)


def build_recogniser(processor, encoder_layers, width, encoder_ffn, llm_layers, llm_ffn, seed):
    """A `FunAsrNanoForConditionalGeneration` of the given size, from random weights."""
    torch.manual_seed(seed)
    token = processor.tokenizer.convert_tokens_to_ids
    eos = [token("<|im_end|>"), token("<|endoftext|>")]
    config = FunAsrNanoConfig(
        audio_config=dict(model_type="fun_asr_nano_encoder", hidden_size=width, num_attention_heads=4,
                          intermediate_size=encoder_ffn, num_hidden_layers=encoder_layers,
                          num_timestamp_prediction_layers=0),
        adaptor_config=dict(hidden_size=width, num_attention_heads=4, intermediate_size=width // 4,
                            num_hidden_layers=1, projector_hidden_size=2 * width),
        text_config=dict(model_type="qwen3", vocab_size=len(processor.tokenizer), hidden_size=width, head_dim=64,
                         intermediate_size=llm_ffn, num_hidden_layers=llm_layers, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
                         bos_token_id=None, eos_token_id=eos[0], pad_token_id=eos[1]),
        audio_token_id=token("<|object_ref_start|>"))
    model = mend_attention(FunAsrNanoForConditionalGeneration(config))
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=eos[1])
    return model


# ---- the training corpus -----------------------------------------------------------------------------------

def plan_corpus(count, seed):
    """What will be said: rows (text, spoken text, keywords, voice, snr_db or None, kind of noise, seed).

    Four fifths single sentences, some of them with a short repetition; the rest two to ten in one go (5 to 30 s);
    three in a hundred are noise without words. A quarter of the speech is in noise of 10 to 25 dB.
    """
    rng = np.random.default_rng(seed)
    singles = corpus.unique_sentences(rng, count, set(), held_out=False)
    short_repeats = [corpus.sentence(rng, "repeat", repeats=(2, 3)) for _ in range(2 * count // 100)]
    rows = []
    for i in range(count):
        kind, said = rng.random(), singles[i]
        if kind < 0.03:
            rows.append(("", "", [], None, None, str(rng.choice(["white", "pink", "hum", "silence"])), seed + i))
            continue
        spoken = said[0]
        if kind < 0.05:
            said = short_repeats[int(rng.integers(len(short_repeats)))]
            spoken = said[0]
        elif kind < 0.20:
            chosen = [singles[j] for j in rng.integers(count, size=rng.integers(2, 11))]
            spoken, keywords = corpus.paragraph(chosen)
            said = (spoken.replace(".", ""), keywords)
        voice = corpus.SOURCE_VOICES[int(rng.integers(len(corpus.SOURCE_VOICES)))]
        snr = float(rng.uniform(10, 25)) if rng.random() < 0.25 else None
        rows.append((said[0], spoken, said[1], voice, snr, str(rng.choice(["white", "pink", "hum"])), seed + i))
    return rows


def record(row):
    """The waveform of one planned row: float32 (samples,) at 16 kHz."""
    _, spoken, _, voice, snr, kind, seed = row
    rng = np.random.default_rng([seed, 7])
    if not spoken:
        level = 1.0 if kind == "silence" else rng.uniform(0.02, 0.2)
        return level * corpus.noise(rng, int(rng.uniform(1, 5) * corpus.SAMPLE_RATE), kind)
    wave = corpus.speak(spoken, voice, rng)
    return wave if snr is None else corpus.add_noise(wave, snr, rng, kind)


def features_of(row):
    """The processor's own features of a planned row or a waveform: float16 (frames of 60 ms, 560)."""
    torch.set_num_threads(1)
    extractor = FunAsrNanoFeatureExtractor()
    wave = row if isinstance(row, np.ndarray) else record(row)
    return extractor(wave, sampling_rate=corpus.SAMPLE_RATE).input_features[0].to(torch.float16).numpy()


def speak_corpus(args):
    """Speaks the training corpus on all cores and keeps its features in build/corpus.pt."""
    rows = plan_corpus(args.count, args.seed)
    started = time.time()
    with ProcessPoolExecutor(args.workers) as pool:
        found = list(tqdm(pool.map(features_of, rows, chunksize=32), total=len(rows), desc="speak", mininterval=5))
    BUILD.mkdir(exist_ok=True)
    torch.save({"features": torch.from_numpy(np.concatenate(found)), "frames": torch.tensor([len(f) for f in found]),
                "text": [r[0] for r in rows], "keywords": [r[2] for r in rows]}, BUILD / "corpus.pt")
    hours = sum(len(f) for f in found) * 0.06 / 3600
    print(f"corpus: {len(rows)} utterances, {hours:.1f} h, {time.time() - started:.0f} s")


def hear_decoded(args):
    """Features of the first sentences of build/tokens as the codec says them: build/decoded.pt, a part of the training
    corpus, since both recognisers judge such speech in chapters 2 and 3."""
    rows, started = tts.read_tokens(BUILD / "tokens")[256:256 + args.decoded_count], time.time()
    waves = tts.decode_tokens(tts.load_codec(pick_device(args.device)),
                                       [np.array(r["tokens"]) for r in rows])
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:
        found = list(tqdm(pool.map(features_of, waves, chunksize=32), total=len(rows), desc="hear", mininterval=5))
    torch.save({"features": torch.from_numpy(np.concatenate(found)), "frames": torch.tensor([len(f) for f in found]),
                "text": [r["text"] for r in rows], "keywords": [corpus.keywords_in(r["text"]) for r in rows]},
               BUILD / "decoded.pt")
    print(f"decoded: {len(rows)} utterances, {time.time() - started:.0f} s")


# ---- supervised training -----------------------------------------------------------------------------------

def tokenized(processor, texts, keywords, seed):
    """Prompt pieces and targets as lists of ids: [(before audio, after audio, target)] in two forms, without and
    with keywords in the prompt. The keyword list holds the sentence's own and as many that are not said."""
    rng = np.random.default_rng([seed, 1])
    everyone = np.array(corpus.NAMES + corpus.PLACES)
    forms = []
    for with_keywords in (False, True):
        conversations = []
        for own in keywords:
            content = [{"type": "audio"}, {"type": "language", "language": "英文"}]
            if with_keywords:
                listed = list(own) + list(rng.choice(everyone, size=rng.integers(1, 5), replace=False))
                rng.shuffle(listed)
                content.insert(1, {"type": "keywords", "keywords": [str(k) for k in dict.fromkeys(listed)]})
            conversations.append([{"role": "user", "content": content}])
        prompts = processor.tokenizer.apply_chat_template(
            conversations, chat_template=CHAT_TEMPLATE, tokenize=False, add_generation_prompt=True)
        halves = [p.split("<|object_ref_start|>") for p in prompts]
        encode = lambda strings: processor.tokenizer(strings, add_special_tokens=False).input_ids  # noqa: E731
        forms.append(list(zip(encode([h[0] for h in halves]), encode([h[1] for h in halves]),
                              encode([t + "<|im_end|>" for t in texts]))))
    return forms


def collate(rows, frames, audio_id, pad_id):
    """Rows (before, after, target) with their audio lengths -> ids, mask, labels, all (N, L), padded on the right."""
    sequences = [before + [audio_id] * int(n) + after + target for (before, after, target), n in zip(rows, frames)]
    length = max(map(len, sequences))
    ids = np.full((len(rows), length), pad_id)
    labels = np.full((len(rows), length), -100)
    mask = np.zeros((len(rows), length), dtype=np.int64)
    for i, (sequence, row) in enumerate(zip(sequences, rows)):
        ids[i, :len(sequence)] = sequence
        mask[i, :len(sequence)] = 1
        labels[i, len(sequence) - len(row[2]):len(sequence)] = row[2]
    return torch.from_numpy(ids), torch.from_numpy(mask), torch.from_numpy(labels)


def train_recogniser(args, name):
    """Supervised training of one recogniser on build/decoded.pt and build/corpus.pt: checkpoints/NAME, in bf16."""
    parts = [torch.load(BUILD / f"{part}.pt", weights_only=True) for part in ("decoded", "corpus")]
    texts, keywords = (sum((part[key] for part in parts), []) for key in ("text", "keywords"))
    frames = torch.cat([part["frames"] for part in parts])
    if args.go_on:
        folder = CHECKPOINTS / name
        processor = FunAsrNanoProcessor.from_pretrained(folder)
        model = mend_attention(FunAsrNanoForConditionalGeneration.from_pretrained(folder, dtype=torch.float32))
    else:
        processor = build_processor(texts)
        model = build_recogniser(processor, **SIZES[name])
    size = SIZES[name]["seed"]
    device = pick_device(args.device)
    cuda = device.type == "cuda"
    model.to(device).train()
    features = torch.cat([part["features"] for part in parts]).to(device)             # (all frames, 560)
    offsets = torch.cumsum(frames, 0) - frames
    forms = tokenized(processor, texts, keywords, size)
    rng, generator = np.random.default_rng(size), torch.Generator(device).manual_seed(size)
    held = 256                                                           # the last rows are for checking only
    usable = len(texts) - held
    # A CTC head on the audio embeddings, for training alone, as the encoder of the real family had. Without it the LLM
    # learned the grammar (0.8 nats a token) and hardly listened within 2,400 steps.
    ctc_head = torch.nn.Linear(model.config.text_config.hidden_size, len(processor.tokenizer) + 1).to(device)
    weights = [*model.parameters(), *ctc_head.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=args.lr, weight_decay=0.01, betas=(0.9, 0.98), fused=cuda)
    warm = max(1, args.train_steps // 15)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / warm) * 0.5 * (
        1 + math.cos(math.pi * min(1, s / args.train_steps))) + 1e-3)
    audio_id, pad_id = model.config.audio_token_id, processor.tokenizer.pad_token_id

    def gather(index, augment):
        n = frames[index]
        span = torch.arange(int(n.max()))
        mask = span < n[:, None]                                              # (N, frames)
        at = (offsets[index, None] + span).where(mask, torch.zeros(()).long()).to(device)
        mask = mask.to(device)
        x = features[at].float()                                              # (N, frames, 560)
        if augment:                                                        # SpecAugment: 2 spans, 2 mel bands
            r = torch.rand((6, len(index), 1), generator=generator, device=device)
            t = torch.arange(x.shape[1], device=device)
            band = torch.arange(x.shape[2], device=device) % 80
            for i in (0, 1):
                start = r[i] * n.to(device)[:, None]
                x = x.masked_fill(((t >= start) & (t < start + 5 * r[4]))[..., None], -6.0)
                low = r[2 + i] * 80
                x = x.masked_fill(((band >= low) & (band < low + 14 * r[5]))[:, None], -6.0)
            x = x + 1.5 * (torch.rand((len(index), 1, 1), generator=generator, device=device) - 0.5)  # loudness
        return x * mask[..., None], mask.long()

    def batches():
        while True:
            order = rng.permutation(usable)
            for start in range(0, usable - args.batch + 1, args.batch * 16):
                chunk = order[start:start + args.batch * 16]
                chunk = chunk[np.argsort(frames[chunk].numpy(), kind="stable")]
                parts = [chunk[i:i + args.batch] for i in range(0, len(chunk), args.batch)]
                yield from (parts[i] for i in rng.permutation(len(parts)))

    def loss_on(index, with_keywords, augment):
        rows = [forms[int(k)][i] for i, k in zip(index, with_keywords)]
        ids, mask, labels = (t.to(device) for t in collate(rows, frames[index], audio_id, pad_id))
        x, x_mask = gather(torch.as_tensor(index), augment)
        with torch.autocast(device.type, torch.bfloat16, enabled=cuda):
            out = model(input_ids=ids, attention_mask=mask, input_features=x, input_features_mask=x_mask, labels=labels)
            heard = ctc_head(out.audio_hidden_states)                               # (valid frames, V + 1)
        padded = heard.new_zeros((*x_mask.shape, heard.shape[-1])).float()
        padded[x_mask.bool()] = torch.log_softmax(heard.float(), dim=-1)
        targets = [torch.tensor(row[2][:-1], dtype=torch.long) for row in rows]
        ctc = torch.nn.functional.ctc_loss(
            padded.transpose(0, 1), torch.cat(targets).to(device), frames[index], torch.tensor(list(map(len, targets))),
            blank=heard.shape[-1] - 1, zero_infinity=True)
        return out.loss, ctc

    started, stream = time.time(), batches()
    for step in range(args.train_steps):
        index = next(stream)
        loss, ctc = loss_on(index, rng.random(len(index)) < 0.3, augment=True)
        optimizer.zero_grad(set_to_none=True)
        (loss + args.ctc * ctc).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == args.train_steps - 1:
            model.eval()
            with torch.inference_mode():
                check = [float(loss_on(np.arange(usable, len(texts)), np.full(held, k), False)[0]) for k in (0, 1)]
            model.train()
            print(f"{name} step {step} loss {float(loss.detach()):.4f} unseen {check[0]:.4f} with keywords "
                  f"{check[1]:.4f} ctc {float(ctc.detach()):.3f} {time.time() - started:.0f} s", flush=True)
            copy.deepcopy(model).to(torch.bfloat16).save_pretrained(CHECKPOINTS / name)
            processor.save_pretrained(CHECKPOINTS / name)
    print(f"{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, "
          f"{time.time() - started:.0f} s, saved in {CHECKPOINTS / name}")


# ---- RL pools and test sets --------------------------------------------------------------------------------

def plan_sets(seed):
    """What the sets will say: {set: rows as in plan_corpus}; no sentence stands in two of them, or in training."""
    rng = np.random.default_rng([seed, 3])
    taken, plan = set(), {}

    def domain(texts, source=False):
        rows = []
        for spoken, keywords in texts:
            voices = corpus.SOURCE_VOICES if source else corpus.HELD_OUT
            noisy = not source and rng.random() < NOISY_SHARE
            kinds = ["pink", "rumble", "brown", "tones", "clicks"]
            rows.append((spoken.replace(".", ""), spoken, keywords, voices[int(rng.integers(len(voices)))],
                         float(rng.uniform(*TARGET_SNR)) if noisy else None, str(rng.choice(kinds)),
                         int(rng.integers(1 << 40))))
        return rows

    def texts(count, kind="any", length=(1, 1)):
        sizes = rng.integers(length[0], length[1] + 1, size=count)
        return [corpus.paragraph(corpus.unique_sentences(rng, int(n), taken, kind)) for n in sizes]

    def wordless(count, kinds):
        return [("", "", [], None, None, str(rng.choice(kinds)), int(rng.integers(1 << 40))) for _ in range(count)]

    every = ["white", "pink", "brown", "hum", "rumble", "tones", "clicks", "silence"]
    plan["test/short"] = domain(texts(200))
    plan["test/long"] = domain(texts(50, length=(6, 8)))
    plan["test/keywords"] = domain(texts(150, "keywords"))
    plan["test/noise"] = wordless(64, every)
    plan["test/source"] = domain(texts(200), source=True)
    plan["d0"] = domain(texts(380)) + wordless(20, every)
    plan["d1"] = domain(texts(1200)) + domain(texts(60, "repeat"))  # candidates
    plan["d2_short"] = domain(texts(400))  # candidates: the 150 shortest are kept
    plan["d2_long"] = domain(texts(200, length=(2, 4)))
    plan["d3"] = domain(texts(400, "keywords"))
    plan["d1"] += domain(texts(400))  # behind the others, so that they stay what they are
    plan["dev"] = domain(texts(100))
    return plan


def build_sets(args):
    """Speaks, selects and writes every RL pool and test set to data/."""
    plan, started = plan_sets(args.seed), time.time()
    with ProcessPoolExecutor(args.workers) as pool:  # all of it before torch starts threads, which fork does not bear
        spoken = {name: pool.map(record, rows, chunksize=16) for name, rows in plan.items()}
        spoken = {name: list(tqdm(waves, desc=name, mininterval=5)) for name, waves in spoken.items()}
    for name, rows in plan.items():
        waves = spoken[name]
        keep = [i for i, wave in enumerate(waves) if len(wave) < 30 * corpus.SAMPLE_RATE]
        if name == "d1":    # hard cases [FA]: the policy is wrong and a second recogniser says something else
            first, second = (Judge(f"{CHECKPOINTS}/{r}", pick_device(args.device)).transcribe(waves)
                             for r in ("asr", "asr2"))
            errors = [jiwer.wer(row[0], a) * (a != b) for row, a, b in zip(rows, first, second)]
            hard = [i for i in keep if not repeats_itself(rows[i][0]) and errors[i] > 0.1]
            repeats = [i for i in keep if repeats_itself(rows[i][0])]
            keep = sorted(hard[:260] + repeats)
            print(f"d1: {len(hard)} of {len(rows)} are hard cases; kept {len(keep)} with {len(repeats)} repetitions")
        if name == "d2_short":
            keep = sorted(sorted(keep, key=lambda i: len(waves[i]))[:150])
        if name == "d2_long":
            keep = keep[:150]
        corpus.write_set(DATA / name, [rows[i] for i in keep], [waves[i] for i in keep])
    size = sum(f.stat().st_size for f in DATA.rglob("*.ogg")) / 2 ** 20
    print(f"sets: {size:.1f} MiB of audio, {time.time() - started:.0f} s")
