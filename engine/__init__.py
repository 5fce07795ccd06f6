"""What the chapters run on. Nothing here knows a chapter; arrows point down: speech -> judges -> models -> recognisers.

    settings     the flags of the chapters, without torch
    sampling     prompts, rollouts, log-probs of what was sampled
    graphs       a decoding step as a CUDA graph
    recognisers  how each class of recogniser is asked, hears and answers
    models       loading, adapters, 8-bit weights
    judges       codec, judge, speaker model, Token2Text
    speech       what chapters 2 and 3 share
    run          a run's folder, log, clock, optimiser, interruption and resumption
    report       tables, transcripts and samples to read; listen: a page to hear
"""
import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # as it loads it misses an optional kernel, aloud
