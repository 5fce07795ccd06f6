"""The same LLM, texts, samples and tokens in TRL's GRPOTrainer: what its step takes beside ours.

    pip install trl
    python -m tools.measure grpo_tts --size real --offload --batch 8 --group 12 --micro 96 --max-seconds 2
    python -m tools.peer --size real --batch 8 --group 12 --micro 96 --max-seconds 2

Of our step rollout and update are what TRL does too: the reward here is a constant, TRL takes no speech. Both sample
with plain transformers (no vLLM), from the whole distribution, in bf16 on a GPU, with LoRA of the same rank on every
linear layer, beta 0.1 and one update a step. A line as that of measure.py is added to --log. Flags that are not
known here are grpo_tts.py's.
"""
import argparse
import sys
import time
from statistics import median

from engine.settings import parse_speech


def parse_args(argv=None):
    """What measure.py understands; `flags`, the rest, is for grpo_tts.py."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", choices=["embedded", "real"], default="embedded")
    p.add_argument("--steps", type=int, default=12, help="half to warm up, the others timed (default: 12)")
    p.add_argument("--log", default="runs/peer.jsonl", metavar="FILE", help="(default: %(default)s)")
    args, args.flags = p.parse_known_args(argv)
    given = parse_speech(args.flags)
    if given.quantize != "none":
        p.error("--quantize is ours alone: TRL is measured in bf16")
    if given.batch * given.group % given.micro:
        p.error(f"--micro {given.micro} must divide --batch x --group, {given.batch * given.group}")
    return args


if __name__ == "__main__":
    parse_args()  # --help and typing errors answer at once, before torch loads

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from engine.judges import Codec, Speaker
from engine.models import precision
from engine.run import pick_device
from engine.speech import cast, load_voices, prompt_ids, split_texts
from tools import measure


class Clock(TrainerCallback):
    """Seconds of every step, from before its rollout to behind its update."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *_, **__):
        self.began = time.time()

    def on_step_end(self, *_, **__):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.time() - self.began)


def prompts_of(args, device, tokenizer):
    """The prompts of grpo_tts.py as strings, and the tokens of the longest speech."""
    codec = Codec(args.codec, device)
    voices = load_voices(args, codec, Speaker(args.speaker, device))
    texts = cast(split_texts(args)[0], voices)
    given = prompt_ids(tokenizer, [s.text for s in texts], [s.voice for s in texts])
    return [tokenizer.decode(ids[mask.bool()]) for ids, mask in zip(given.input_ids, given.attention_mask)], int(
        args.max_seconds * codec.tokens_per_s)


def main(argv=None):
    ours = parse_args(argv)
    try:
        import pyarrow
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer
    except ImportError as error:
        sys.exit(f"error: {error.name} is not installed: pip install trl")
    models = measure.real("grpo_tts", 10) if ours.size == "real" else []
    args = parse_speech([*map(str, models), "--steps", str(ours.steps), *ours.flags])
    device, clock = pick_device(args.device), Clock()
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    prompts, limit = prompts_of(args, device, tokenizer)
    dtype = precision(device)
    config = GRPOConfig(
        output_dir="runs/peer", report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
        use_cpu=device.type == "cpu", bf16=dtype == torch.bfloat16, gradient_checkpointing=False, seed=args.seed,
        per_device_train_batch_size=args.micro, gradient_accumulation_steps=args.batch * args.group // args.micro,
        num_generations=args.group, max_completion_length=limit, temperature=args.temperature, top_k=0, top_p=1.0,
        max_steps=args.steps, learning_rate=args.lr, lr_scheduler_type="constant", max_grad_norm=1.0,
        beta=args.beta, epsilon=args.clip, loss_type="grpo", num_iterations=1)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    trainer = GRPOTrainer(
        model, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=config, callbacks=[clock],
        train_dataset=Dataset(pyarrow.table({"prompt": prompts}), fingerprint="prompts"), processing_class=tokenizer,
        peft_config=LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules="all-linear"))
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    last = next(row for row in reversed(trainer.state.log_history) if "completions/mean_length" in row)
    row = {"script": "trl", "size": ours.size, "gib": None, "flags": " ".join(ours.flags), "dtype": str(dtype),
           "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "steps": args.steps,
           "seconds": {"step": round(median(clock.seconds[args.steps // 2:]), 4)},
           "tokens": last["completions/mean_length"]}
    if device.type == "cuda":
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2 ** 30, 2)
    measure.leave(row, ours.log)


if __name__ == "__main__":
    main()
