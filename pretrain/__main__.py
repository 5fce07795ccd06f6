"""Builds the embedded models and data from nothing: sentences, voices, a recogniser, RL pools and test sets.

    python -m pretrain                  all stages below, in order (seeded)
    python -m pretrain speech           speak the corpus, with its features                build/seed1/
    python -m pretrain asr asr2         two recognisers, independent of each other         checkpoints/asr, asr2
    python -m pretrain codec tokens     the codec, and all recordings as its tokens        checkpoints/codec
    python -m pretrain asr_on asr2_on   both recognisers go on, what the codec says among their speech
    python -m pretrain tts token2text speaker    the models of chapters 2 and 3
    python -m pretrain texts            sentences, test recordings and voices of chapters 2 and 3     data/tts
    python -m pretrain sets             RL pools D0-D3 and the test sets, from both recognisers       data/
    python -m pretrain check            how well they read every voice, as spoken and after the codec
    python -m pretrain together --minutes 22 --seed 9    recognisers, LLM and Token2Text go on with other speech for so
                                        long, while it is spoken, on all GPUs that are there

How well the LLM speaks: `python grpo_tts.py --steps 0`.

Needs a GPU unless you have a day, and the programs, voices and texts that corpus.py lists. Running the chapters needs
none of this: what it makes is in the repository. The recipe is our choice throughout; the model classes are the
published ones. A stage reads what the ones before it left in build/ and checkpoints/, so a build that broke off goes on
with the stage that it was in.
"""
import argparse
import os
import sys

STAGES = ["speech", "asr", "asr2", "codec", "tokens", "asr_on", "asr2_on", "tts", "token2text", "speaker", "texts",
          "sets", "check"]
ENCODERS = 5        # processes of `together` that make tokens: a part takes one of them 60 s, voices 45


def parse_args(argv=None):
    """The stages to build and the sizes of the recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="which stages, in order (default: all)")
    parser.add_argument("--count", type=int, default=240_000, help="utterances of the corpus (default: 240000)")
    parser.add_argument("--part", type=int, default=12_000, help="of them a part of it (default: 12000)")
    parser.add_argument("--minutes", type=float, help="a training ends by the clock, not by its steps")
    parser.add_argument("--nth", type=int, nargs=2, default=(0, 1), metavar=("K", "N"),
                        help="speech, tokens: of the parts every N-th from K on (default: 0 1, all)")
    parser.add_argument("--train-steps", type=int, default=8_000, help="of each recogniser (default: 8000)")
    parser.add_argument("--on-steps", type=int, default=15_000, help="of each when it goes on (default: 15000)")
    parser.add_argument("--batch", type=int, default=256, help="utterances a step (default: 256)")
    parser.add_argument("--lr", type=float, default=1.8e-3, help="highest learning rate of AdamW (default: 1.8e-3)")
    parser.add_argument("--go-on", action="store_true",
                        help="codec, tts, token2text, speaker: from what is in checkpoints/ (default: from nothing)")
    parser.add_argument("--ctc", type=float, default=0.5, help="weight of the CTC loss (default: 0.5)")
    parser.add_argument("--decoded-count", type=int, default=24_000,
                        help="recordings that the recognisers also hear after the codec (default: 24000)")
    parser.add_argument("--codec-steps", type=int, default=12_000, help="of the codec (default: 12000)")
    parser.add_argument("--codec-joint", type=float, default=0.42, metavar="SHARE",
                        help="of the codec's training with its acoustic branch (default: 0.42)")
    parser.add_argument("--codec-judged", type=float, default=0.75, metavar="SHARE",
                        help="of it after which a discriminator has a word (default: 0.75)")
    parser.add_argument("--codec-batch", type=int, default=32,
                        help="its cuts of two seconds a step, twice as many later (default: 32)")
    parser.add_argument("--codec-lr", type=float, default=5e-4, help="of the codec (default: 5e-4)")
    parser.add_argument("--own", action="store_true", help="check: on the sentences written for this project")
    parser.add_argument("--tts-steps", type=int, default=36_000, help="of the LLM that speaks (default: 36000)")
    parser.add_argument("--tts-batch", type=int, default=96, help="its utterances a step (default: 96)")
    parser.add_argument("--tts-lr", type=float, default=1.5e-3, help="of the LLM (default: 1.5e-3)")
    parser.add_argument("--token2text-steps", type=int, default=52_000, help="of Token2Text (default: 52000)")
    parser.add_argument("--token2text-batch", type=int, default=256, help="its utterances a step (default: 256)")
    parser.add_argument("--speaker-steps", type=int, default=6_000, help="of the speaker model (default: 6000)")
    parser.add_argument("--tokens", metavar="DIR", help="token2text: a folder of your own with metadata.jsonl, lines "
                        'of {"text": ..., "tokens": [...]}')
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that speak (default: all cores)")
    parser.add_argument("--device", default="auto", help="auto = cuda where there is one, else cpu")
    args = parser.parse_args(argv)
    if set(args.stages) - {*STAGES, "together"}:
        parser.error(f"no such stage: {' '.join(set(args.stages) - set(STAGES))}; one of {', '.join(STAGES)}")
    args.flags = [word for word in sys.argv[1:] if word != "together"] if argv is None else []
    return args


if __name__ == "__main__":
    parse_args()  # --help and typing errors answer at once, before torch loads

import subprocess
import time
from pathlib import Path

import torch

from pretrain import asr, codec, parts, tts


def together(args):
    """All that goes on, side by side, each in build/logs: voices, tokens of what they said, four trainings."""
    if not args.minutes:
        sys.exit("error: together needs --minutes: all of it ends by the clock")
    jobs = {"asr_on": 0, "asr2_on": 1, "tts": 2, "token2text": 3,                  # and the card of each
            **{f"tokens {k}": k for k in range(ENCODERS)}, "speech": 0}
    started, logs = {}, Path("build/logs")
    logs.mkdir(parents=True, exist_ok=True)
    for job, card in jobs.items():
        stage, *nth = job.split()
        workers = args.workers - len(jobs) - ENCODERS if stage == "speech" else 2
        command = [sys.executable, "-m", "pretrain", stage, *args.flags, "--go-on", f"--workers={max(1, workers)}",
                   *(["--nth", *nth, str(ENCODERS)] if nth else [])]
        cards = {"CUDA_VISIBLE_DEVICES": str(card % torch.cuda.device_count())} if torch.cuda.is_available() else {}
        with open(logs / f"{job.replace(' ', '-')}.txt", "w", encoding="utf-8") as log:
            started[job] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT,
                                            env={"OMP_NUM_THREADS": "2", **os.environ, **cards})
    failed = [job for job, process in started.items() if process.wait()]
    for job in started:
        last = (logs / f"{job.replace(' ', '-')}.txt").read_text(encoding="utf-8").strip().splitlines()[-1:]
        print(f"{job}: {''.join(last)}")
    if failed:
        sys.exit(f"error: {', '.join(failed)}: their last words are in {logs}")


def main(argv=None):
    args = parse_args(argv)
    parts.BUILD = Path("build") / f"seed{args.seed}"
    made = {"together": together, "speech": asr.speak_corpus, "codec": codec.train_codec, "tokens": asr.encode_corpus,
            "tts": tts.train_tts, "token2text": tts.train_token2text,
            "speaker": tts.train_speaker, "texts": tts.build_texts, "sets": asr.build_sets, "check": asr.check}
    for stage in args.stages or STAGES:
        parts.STARTED, (name, _, on) = time.time(), stage.partition("_")
        asr.train_recogniser(args, name, bool(on)) if name in asr.SIZES else made[stage](args)


if __name__ == "__main__":
    main()
