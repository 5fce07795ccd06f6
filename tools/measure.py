"""What fits on a card, and how long a step takes: each chapter's own script, timed by its own log.

    python -m tools.measure grpo_asr                                        the embedded models on this machine
    python -m tools.measure grpo_asr --size real --gib 8 --quantize 8bit --group 8 --micro 8 --max-tokens 48
    python -m tools.measure grpo_tts --size real --gib 8 --quantize 8bit --group 4 --micro 2 --offload

--size real builds models of the published checkpoints' size with random weights (build/real, once, 6 GB) and runs the
script on them: Fun-ASR-Nano (0.8B) on clips of --seconds (10); for speech Llasa-1B (1.4B), Xcodec2, WavLM-base and
Fun-ASR-Nano as both judges. Random weights cost what trained ones cost, except that nothing ends early: every sample
has all of --max-tokens, or of --max-seconds. --gib caps what torch may take to that of a smaller card, less 0.7 GiB
for CUDA's own context. A line is added to --log: seconds a step by phase (medians of the second half of the steps: in
the first a GPU still picks kernels and gets memory) and peak GiB by phase, or the script's last word where it ran out.
Other flags go to the script.
"""
import argparse
import functools
import importlib
import json
import shutil
from pathlib import Path
from statistics import median

REAL = Path("build/real")
CONTEXT = 0.7  # GiB that CUDA keeps for itself
CARDS = {"H100": (3.35e12, 989e12), "H200": (4.8e12, 989e12)}   # bytes and bf16 FLOPs a second, by their data sheets


def parse_args(argv=None):
    """What to time, at which size; what it does not know goes to the script."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("script", choices=["grpo_asr", "grpo_tts", "diffro_tts"])
    p.add_argument("--size", choices=["embedded", "real"], default="embedded")
    p.add_argument("--gib", type=float, help="pretend that the GPU has this much memory")
    p.add_argument("--seconds", type=int, default=10, help="length of the clips at real size (default: 10)")
    p.add_argument("--steps", type=int, default=12, help="half to warm up, the others timed (default: 12)")
    p.add_argument("--log", default="docs/runs/figure2.jsonl", metavar="FILE", help="(default: %(default)s)")
    args, args.flags = p.parse_known_args(argv)
    if args.script == "diffro_tts" and args.size == "real":
        p.error("--size real has no Token2Text: none of that size is published")
    if args.seconds != 10 and (args.script, args.size) != ("grpo_asr", "real"):
        p.error("--seconds is the length of the clips of grpo_asr --size real; speech has --max-seconds")
    if args.steps < 2:
        p.error("--steps must be 2 or more: half of them warm up")
    return args


if __name__ == "__main__":
    parse_args()  # --help and typing errors answer at once, before torch loads

import numpy as np
import soundfile as sf
import torch
import transformers as hf
from peft.tuners.lora import LoraLayer

from data import load_folder
from engine.log import read_rows


def shell(name, folder):
    """The files of checkpoints/NAME but for the model's own, in `folder`."""
    shutil.copytree(Path("checkpoints") / name, folder, ignore=shutil.ignore_patterns("config.json", "*.safetensors"))


def build_asr(folder, seed=0):
    """Fun-ASR-Nano at its published size, 0.83B, behind the embedded processor."""
    small = hf.AutoConfig.from_pretrained("checkpoints/asr")
    config = hf.FunAsrNanoConfig(audio_token_id=small.audio_token_id)
    shell("asr", folder)
    save(hf.FunAsrNanoForConditionalGeneration, config, folder, seed=seed)


def build_tts(folder):
    """Llasa-1B: Llama 3.2 1B with a vocabulary of 193,800, 65,536 of them speech; 1.4B."""
    shell("tts", folder)
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<|s_{i}|>" for i in range(65_536)])
    tokenizer.save_pretrained(folder)
    small = hf.AutoConfig.from_pretrained("checkpoints/tts")
    config = hf.LlamaConfig(vocab_size=193_800, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                            num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
                            max_position_embeddings=8192, rms_norm_eps=1e-5, eos_token_id=small.eos_token_id)
    speech = [i for token, i in tokenizer.get_vocab().items() if token.startswith("<|s_")]
    save(hf.LlamaForCausalLM, config, folder, speech)


def build_codec(folder):
    """Xcodec2 at its published size: 50 tokens a second."""
    shell("codec", folder)
    extractor = hf.AutoFeatureExtractor.from_pretrained(folder)
    extractor.hop_length = 320
    extractor.save_pretrained(folder)
    save(hf.Xcodec2Model, hf.Xcodec2Config(), folder)


def build_speaker(folder):
    """WavLM-base with an x-vector head, as microsoft/wavlm-base-plus-sv."""
    shell("speaker", folder)
    save(hf.WavLMForXVector, hf.WavLMConfig(), folder)


def save(model_class, config, folder, speech=(), seed=0):
    """Random weights in bf16; `speech` rows of the embedding are large, so that speech is what is sampled."""
    torch.manual_seed(seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = model_class(config)
    if speech:
        with torch.no_grad():
            model.get_input_embeddings().weight[speech] *= 3
    if (folder / "generation_config.json").exists():
        model.generation_config = hf.GenerationConfig.from_pretrained(folder)
    model.to(torch.bfloat16).save_pretrained(folder)


def build_clips(folder, count, seconds, test=False, rate=16_000):
    """`count` clips of `seconds`, each made of several of d0, with what is said in them; to test on, from its start."""
    (folder / "audio").mkdir(parents=True)
    clips = sorted((u for u in load_folder("data/d0") if u.text), key=lambda u: u.path, reverse=test)
    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as table:
        for i in range(count):
            wave, text = np.zeros(0, dtype=np.float32), []
            while len(wave) < seconds * rate:
                clip = clips.pop()
                wave, text = np.concatenate([wave, clip.waveform(rate)]), [*text, clip.text]
            sf.write(folder / "audio" / f"{i:02}.wav", wave[:seconds * rate], rate)
            table.write(json.dumps({"file_name": f"audio/{i:02}.wav", "text": " ".join(text)}) + "\n")


def real(script, seconds):
    """The flags that put a script on models of real size, which are built where they are missing."""
    clips, test = f"clips{seconds}", f"test{seconds}"
    makers = {"asr": build_asr, clips: functools.partial(build_clips, count=32, seconds=seconds),
              test: functools.partial(build_clips, count=32, seconds=seconds, test=True)}
    if script != "grpo_asr":
        makers |= {"asr2": functools.partial(build_asr, seed=1), "tts": build_tts, "codec": build_codec,
                   "speaker": build_speaker}
    for name, make in makers.items():
        if not (REAL / name).exists():
            print(f"build {REAL / name}", flush=True)
            shutil.rmtree(REAL / "half", ignore_errors=True)
            make(REAL / "half")
            (REAL / "half").rename(REAL / name)
    if script == "grpo_asr":
        return ["--model", REAL / "asr", "--data", REAL / clips, "--dev", REAL / test, "--test", REAL / test]
    texts = REAL / "texts.txt"
    lines = Path("data/tts/test/plain/metadata.jsonl").read_text(encoding="utf-8").splitlines()[:4]
    texts.write_text("".join(json.loads(line)["text"] + "\n" for line in lines), encoding="utf-8")
    return ["--model", REAL / "tts", "--codec", REAL / "codec", "--judge", REAL / "asr", "--second-judge",
            REAL / "asr2", "--speaker", REAL / "speaker", "--dev", texts, "--test", texts]


def limit(policy, prompts, samples, bandwidth, flops):
    """Seconds that a step's LLM takes where a card does nothing but the LLM's own products, and reads what they need:
    {"rollout", "update"}. `prompts` (B, L) and `samples` (N, T) are sizes.

    A token of a rollout reads all weights, and the keys and values of all rows, half of the samples' on average. An
    update is the reference's pass, the policy's, and the gradient of its activations, 2 FLOPs a weight and token each;
    attention's and the adapters' own are left out, and so are encoder, codec, judges and the optimiser.
    """
    (batch, length), (rows, tokens) = prompts, samples
    body = [m.base_layer.weight for m in policy.modules() if isinstance(m, LoraLayer)]
    head = policy.get_base_model().get_output_embeddings().weight
    inner, outer = sum(w.numel() for w in body), head.numel()
    llm = policy.config.get_text_config()
    width = getattr(llm, "head_dim", None) or llm.hidden_size // llm.num_attention_heads
    cache = 2 * llm.num_hidden_layers * llm.num_key_value_heads * width * head.element_size()   # bytes of a position
    read = sum(w.nbytes for w in body) + head.nbytes + rows * (length + tokens / 2) * cache
    token = max(read / bandwidth, 2 * rows * (inner + outer) / flops)
    return {"rollout": 2 * batch * length * inner / flops + tokens * token,
            "update": 6 * ((batch * length + rows * tokens) * inner + rows * tokens * outer) / flops}


def watched(sample, seen):
    """`sample` that leaves in `seen` the limit of the last rollout of groups, on a card that is known."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    rates = next((rates for name, rates in CARDS.items() if name in card), None)

    def inner(policy, prompts, group, *given, **named):
        rollout = sample(policy, prompts, group, *given, **named)
        if rates and group > 1 and policy.device.type == "cuda":
            seen.update(limit(policy, prompts.mask.shape, rollout.ids.shape, *rates))
        return rollout
    return inner


def leave(row, log):
    """Prints a measurement and adds it to the file `log`."""
    print(json.dumps(row))
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as out:
        out.write(json.dumps(row) + "\n")


def main(argv=None):
    args = parse_args(argv)
    models = real(args.script, args.seconds) if args.size == "real" else []
    flags = [*models, "--steps", args.steps, "--eval-every", 0, *args.flags]
    if args.gib:
        total = torch.cuda.get_device_properties(0).total_memory / 2 ** 30
        torch.cuda.set_per_process_memory_fraction(min(1.0, (args.gib - CONTEXT) / total))
    out = Path("runs/measure")
    shutil.rmtree(out, ignore_errors=True)
    named = [*args.flags, *(["--seconds", str(args.seconds)] if args.seconds != 10 else [])]
    row = {"script": args.script, "size": args.size, "gib": args.gib, "flags": " ".join(named)}
    script, bound = importlib.import_module(args.script), {}
    script.sample, sample = watched(script.sample, bound), script.sample
    try:
        script.main([*map(str, flags), "--out", str(out)])
    except SystemExit as stop:
        if not stop.code:
            raise
        row["failed"] = str(stop.code)
    finally:
        script.sample = sample
    if (out / "log.jsonl").exists():
        header, *rows = read_rows(out / "log.jsonl")
        row |= {"device": header["device"], "dtype": header["dtype"], "commit": header["commit"]}
        steps = [r for r in rows if "seconds" in r and "kl" in r and r["step"] >= args.steps // 2]
        if steps:
            row["steps"] = args.steps
            row["seconds"] = {k: round(median(r["seconds"][k] for r in steps), 4) for k in steps[0]["seconds"]}
            row |= {"limit": {phase: round(seconds, 4) for phase, seconds in bound.items()}} if bound else {}
            row["peak_gib"] = round(steps[-1]["peak_memory_gib"], 2)
            row["peak_by_phase_gib"] = {k: round(v, 2) for k, v in steps[-1]["peak_by_phase_gib"].items()}
    leave(row, args.log)


if __name__ == "__main__":
    main()
