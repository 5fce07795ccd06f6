"""Shared by all tests: the embedded recogniser, loaded once, and a batch of its data."""
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)

import pytest
import torch

import data
import grpo_asr


def load_policy(*flags):
    """(args, processor, policy) of the embedded recogniser on the CPU, its adapters no longer zero."""
    args = grpo_asr.parse_args(["--device", "cpu", *flags])
    data.quiet()
    processor, policy = grpo_asr.load(args, torch.device("cpu"))
    return args, processor, policy


def move_adapters(policy, size):
    """Takes the adapters off zero, so that policy and reference differ."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, size, generator=generator)


@pytest.fixture(scope="session")
def recogniser():
    """(args, processor, policy) with adapters moved off zero."""
    args, processor, policy = load_policy()
    move_adapters(policy, 0.02)
    return args, processor, policy


@pytest.fixture(scope="session")
def clips():
    """Utterances of d0 with words in them."""
    return [u for u in data.load_folder("data/d0") if u.text][:16]
