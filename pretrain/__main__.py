"""Builds the embedded models and data from nothing: sentences, voices, a recogniser, RL pools and test sets.

    python -m pretrain                  all stages below, in order (seeded)
    python -m pretrain voices codec tokens                the codec of chapters 2 and 3 and what it makes of speech
    python -m pretrain corpus           speak the training corpus, keep its features       build/corpus.pt
    python -m pretrain decoded          features of what the codec says                    build/decoded.pt
    python -m pretrain asr              the recogniser, the policy of chapter 1            checkpoints/asr
    python -m pretrain asr2             a second one, independent: smaller, other seed     checkpoints/asr2
    python -m pretrain tts token2text speaker             the models of chapters 2 and 3
    python -m pretrain texts            sentences, test recordings and voices of chapters 2 and 3     data/tts
    python -m pretrain sets             RL pools D0-D3 and the test sets, from both        data/
    python -m pretrain check_codec check_tts              how good they are, by both recognisers

Needs espeak-ng and flite, and a GPU unless you have a day. Running the chapters needs none of this: what it
makes is in the repository. The recipe is our choice throughout; the model classes are the published ones.
"""
import argparse
import os

STAGES = ["voices", "codec", "tokens", "corpus", "decoded", "asr", "asr2", "tts", "token2text", "speaker", "texts",
          "sets", "check_codec", "check_tts"]


def parse_args(argv=None):
    """The stages to build and the sizes of the recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="which stages, in order (default: all)")
    parser.add_argument("--count", type=int, default=32_000, help="utterances in the training corpus (default: 32000)")
    parser.add_argument("--train-steps", type=int, default=3_000, help="of each recogniser (default: 3000)")
    parser.add_argument("--batch", type=int, default=128, help="utterances a step (default: 128)")
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate of AdamW (default: 1e-3)")
    parser.add_argument("--go-on", action="store_true",
                        help="asr, asr2, token2text: train on from what is in checkpoints/ (default: from nothing)")
    parser.add_argument("--ctc", type=float, default=0.5, help="weight of the CTC loss (default: 0.5)")
    parser.add_argument("--tts-count", type=int, default=40_000, help="utterances of the TTS corpus (default: 40000)")
    parser.add_argument("--decoded-count", type=int, default=8_000,
                        help="of those, how many the recognisers also hear after the codec (default: 8000)")
    parser.add_argument("--codec-steps", type=int, default=1_200, help="of the codec (default: 1200)")
    parser.add_argument("--tts-steps", type=int, default=1_200, help="of the LLM that speaks (default: 1200)")
    parser.add_argument("--token2text-steps", type=int, default=5_000, help="of Token2Text (default: 5000)")
    parser.add_argument("--speaker-steps", type=int, default=1_000, help="of the speaker model (default: 1000)")
    parser.add_argument("--tokens", metavar="DIR", help="token2text: a folder of your own with metadata.jsonl, lines "
                        'of {"text": ..., "tokens": [...]}')
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that speak (default: all cores)")
    parser.add_argument("--device", default="auto", help="auto = cuda where there is one, else cpu")
    args = parser.parse_args(argv)
    if set(args.stages) - set(STAGES):
        parser.error(f"no such stage: {' '.join(set(args.stages) - set(STAGES))}; one of {', '.join(STAGES)}")
    return args


if __name__ == "__main__":
    parse_args()  # --help and typing errors answer at once, before torch loads

from pretrain import asr, tts


def main(argv=None):
    args = parse_args(argv)
    made = {"corpus": asr.speak_corpus, "decoded": asr.hear_decoded, "sets": asr.build_sets, "voices": tts.speak_voices,
            "codec": tts.train_codec, "tokens": tts.encode_corpus, "tts": tts.train_tts,
            "token2text": tts.train_token2text, "speaker": tts.train_speaker,
            "texts": tts.build_texts,
            "check_codec": tts.check_codec, "check_tts": tts.check_tts}
    for stage in args.stages or STAGES:
        asr.train_recogniser(args, stage) if stage in asr.SIZES else made[stage](args)


if __name__ == "__main__":
    main()
