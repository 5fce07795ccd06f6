"""Models: loaded with clear words for a user's mistake, mended, in 8 bits, with adapters.

    load_pretrained(class, name)     transformers' loaders; safetensors only, no remote code
    load_recogniser(name)            processor and model of any class in recognisers.py
    fuse_norms(model)                one kernel for a norm, in bf16
    quantization(name, device, ...)  what from_pretrained needs for --quantize
    add_adapters(base, ...)          fp32 LoRA on the frozen base
    refresh_adapters(policy)         its adapters' bf16 copies, where there are some, filled anew

Why not LLM.int8 as it comes: it quantises the activations too, looks for outliers among them, and waits for the CPU
with each product, so that a decoding step can't be captured: at the size of Fun-ASR-Nano a prototype took 166 ms a
token on an H200, the product below takes 25 on an H100 (96 rows). In RL the frozen weights are all that memory has to
be saved on. So the int8 matrix stays as bitsandbytes made it, and each product turns it into the activations' own
precision on the fly: 8-bit memory, kernels that a CUDA graph can hold, and no second rounding between the sampler and
the trainer. Our choice; the paper does not quantise.

Why not PEFT's own LoRA on a base in bf16: it takes every activation to fp32 and back for two thin products, a fifth of
a decoding step at the size of Fun-ASR-Nano. Here the products are in bf16, from copies of the adapters; what learns, is
saved and is loaded are PEFT's adapters in fp32. Our choice too.
"""
import functools
import re
from pathlib import Path

import bitsandbytes as bnb
import safetensors
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import BitsAndBytesConfig

from engine.audio import DataError, is_pointer, reason
from engine.recognisers import RECOGNISERS, end_tokens, recogniser, settle

LINEAR = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)      # 8-bit layers are Linear too

# ---- loading -------------------------------------------------------------------------------------------------


def load_pretrained(auto_class, name, flag="--model", **options):
    """`auto_class.from_pretrained(name)`, safetensors only and no remote code; DataError when it can't be had."""
    if not Path(name).is_dir() and (name.count("/") != 1 or name.startswith((".", "/", "checkpoints/"))):
        ours = name.startswith("checkpoints/")
        made = f" in {Path.cwd()}; python -m pretrain {Path(name).name} makes the embedded one" if ours else ""
        raise DataError(f"{flag} {name}: no such folder, and not of the form OWNER/NAME of a hub id{made}")
    options["trust_remote_code"] = False        # left unset, transformers asks, and runs the folder's code on a "y"
    try:
        if not hasattr(auto_class, "_model_mapping"):
            return auto_class.from_pretrained(name, **options)
        model, found = auto_class.from_pretrained(name, use_safetensors=True, output_loading_info=True, **options)
    except torch.cuda.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError,
            safetensors.SafetensorError) as error:
        files = [file for file in Path(name).glob("*") if file.is_file()]
        why = next((f"{file.name} is {is_pointer(file)}" for file in files if is_pointer(file)), reason(error))
        raise DataError(f"{flag} {name}: cannot be loaded ({why})") from None
    if found["missing_keys"]:       # transformers would fill them with random numbers
        raise DataError(f"{flag} {name}: has no weights for {sorted(found['missing_keys'])[0]} of "
                        f"{type(model).__name__}: made for another task?")
    return fuse_norms(model)


def load_recogniser(name, flag="--model", **options):
    """(processor, model) of any class in recognisers.py, put right; DataError for any other, before it is loaded."""
    processor = load_pretrained(transformers.AutoProcessor, name, flag)
    known = {kind: row for kind, row in RECOGNISERS.items() if row.hear or flag != "--model"}    # Whisper only judges
    row = recogniser(processor)
    if row not in known.values():
        raise DataError(f"{flag} {name}: comes with a {type(processor).__name__}; known are {', '.join(known)}")
    model = load_pretrained(row.loader, name, flag, **options)
    if recogniser(model) is not row:
        raise DataError(f"{flag} {name}: is a {type(model).__name__}; known are {', '.join(known)}")
    processor.tokenizer.padding_side = "left"
    if row.hear:
        model.generation_config.eos_token_id = end_tokens(model, processor, f"{flag} {name}")
    return processor, settle(mend_attention(model))


def mend_attention(model):
    """Gives every part of `model` the attention of the whole, and returns the model.

    transformers 5.23 leaves it unset for the adaptor of Fun-ASR-Nano, whose attention then adds the padding mask as
    a number instead of applying it: a clip's transcript depended on the clips beside it in the batch.
    """
    for name in model.config.sub_configs:
        part = getattr(model.config, name)
        if part is not None and part._attn_implementation is None:
            part._attn_implementation = model.config._attn_implementation
    return model


@torch.no_grad()
def fuse_norms(model):
    """Gives every RMSNorm of a model in bf16 torch's kernel, one for seven of transformers' (and two for its gradient),
    and returns the model. Where a class computes something else (Gemma's adds one to its weight) it stays as it is.
    """
    for norm in model.modules() if model.dtype == torch.bfloat16 else ():
        eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        if not type(norm).__name__.endswith("RMSNorm") or eps is None or getattr(norm, "weight", None) is None:
            continue
        fused = functools.partial(torch.nn.functional.rms_norm, normalized_shape=norm.weight.shape, weight=norm.weight,
                                  eps=eps)
        x = torch.linspace(-2, 3, norm.weight.numel()).to(norm.weight)
        if torch.allclose(fused(x), norm(x), rtol=0.02, atol=1e-3):                # bf16's rounding is 0.004
            norm.forward = fused
    return model


# ---- adapters and 8-bit weights ------------------------------------------------------------------------------

def add_adapters(base, within, rank, seed):
    """`base`, frozen and in eval mode (no dropout anywhere), with fp32 LoRA on every linear layer of the modules whose
    names hold `within` ("language_model"; "" is all), however they are called or fused, but not on the output layer.

    Raises DataError where over a tenth of those modules' matrices are in layers that take no adapter.
    """
    inside = {name: module for name, module in base.named_modules() if within in name}
    heads = {id(base.get_output_embeddings()), id(base.get_input_embeddings())}
    linear = {name: m for name, m in inside.items() if isinstance(m, LINEAR) and id(m) not in heads}
    total = sum(p.numel() for m in inside.values() if id(m) not in heads for p in m.parameters(recurse=False)
                if p.dim() > 1)
    reached = sum(m.weight.numel() for m in linear.values())
    if reached < 0.9 * total:
        raise DataError(f"--model: only {reached / max(1, total):.0%} of the weights of a {type(base).__name__} are in "
                        f"layers that adapters can go on ({len(linear)} layers)")
    kinds = "|".join(sorted({re.escape(name.rsplit(".", 1)[-1]) for name in linear}))
    torch.manual_seed(seed)
    return low_precision(get_peft_model(weight_only(base), LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=rf".*{within}.*\.({kinds})")).eval())


class _LowRank(torch.autograd.Function):
    """x (..., I), y (..., O), A (r, I), B (O, r) -> y + scale (x A^T) B^T, computed with a and b, copies of A and B in
    the precision of x. A and B get the gradients.

    The copies are kept as they are, not saved: `refresh_adapters` may write the same numbers to them before the
    backward pass.
    """

    @staticmethod
    def forward(ctx, x, y, A, B, a, b, scale):
        h = x.flatten(0, -2) @ a.T                                                  # (M, r)
        ctx.save_for_backward(x, h)
        ctx.given = a, b, scale
        return torch.addmm(y.flatten(0, -2), h, b.T, alpha=scale).view_as(y)

    @staticmethod
    def backward(ctx, grad):
        (x, h), (a, b, scale) = ctx.saved_tensors, ctx.given
        flat = grad.flatten(0, -2) * scale                                          # (M, O)
        back = flat @ b                                                             # (M, r)
        return (back @ a).view_as(x), grad, back.T @ x.flatten(0, -2), flat.T @ h, None, None, None


def low_precision(policy):
    """Gives every adapter of a policy that is not in fp32 the product above, and returns the policy."""
    def forward(layer, scale, A, B, a, b, x):
        y = layer.base_layer(x)
        return y if layer.disable_adapters else _LowRank.apply(x, y, A, B, a, b, scale)

    dtype, layers = policy.get_base_model().dtype, [m for m in policy.modules() if isinstance(m, LoraLayer)]
    if dtype != torch.float32:
        policy.masters = [getattr(layer, part)["default"].weight for layer in layers for part in ("lora_A", "lora_B")]
        policy.copies = [weight.detach().to(dtype) for weight in policy.masters]
        for i, layer in enumerate(layers):
            pair = slice(2 * i, 2 * i + 2)
            layer.forward = functools.partial(forward, layer, layer.scaling["default"], *policy.masters[pair],
                                              *policy.copies[pair])
    return policy


@torch.no_grad()
def refresh_adapters(policy):
    """Fills the copies of a policy's adapters from the adapters."""
    if copies := getattr(policy, "copies", None):
        torch._foreach_copy_(copies, policy.masters)


def precision(device):
    """What frozen weights are kept in: bf16 on CUDA, fp32 on the CPU."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def quantization(name, skip=()):
    """BitsAndBytesConfig for `name` ("none" gives None); modules that match a pattern in `skip` stay as they are."""
    return None if name == "none" else BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(skip) or None)


class _Int8Product(torch.autograd.Function):
    """x (..., I), codes (O, I) int8, scale (O,) -> (..., O): x @ (codes * scale[:, None]).T.

    Keeps the codes for the backward pass, not the matrix they stand for, which would be the whole model in `x.dtype`.
    Whole numbers up to 127 are exact in bf16.
    """

    @staticmethod
    def forward(ctx, x, codes, scale):
        ctx.save_for_backward(codes, scale)
        return (x @ codes.to(x.dtype).T).mul_(scale)

    @staticmethod
    def backward(ctx, grad):
        codes, scale = ctx.saved_tensors
        return (grad * scale) @ codes.to(grad.dtype), None, None


def weight_only(model):
    """Gives every 8-bit linear layer of `model` the product above, and returns the model."""
    def forward(layer, x):
        weight = layer.weight
        y = _Int8Product.apply(x, weight.data, (weight.SCB / 127).to(x.dtype))
        return y if layer.bias is None else y + layer.bias

    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear8bitLt):
            layer.forward = functools.partial(forward, layer)
    return model
