"""The base model and its chat template, as training and evaluation both use them.

Knows transformers; knows no adapter and no task. Answers are trained and read as
plain text that ends with the token that ends a turn in the chat template.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def load_base(model: str) -> tuple[Any, Any]:
    """Load the frozen base model in bfloat16 and its tokenizer, from a folder or the hub."""
    if model != HUB_NAME and not (Path(model) / "config.json").is_file():
        raise FileNotFoundError(
            f"--model {model}: no config.json there; name the folder of a downloaded "
            f"{HUB_NAME}, or that name itself to download it"
        )
    # transformers leaves `eval` and its tokenizers untyped.
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    return loaded.requires_grad_(False).eval(), AutoTokenizer.from_pretrained(model)


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Return the tokens of a chat with this one user message, up to the assistant's turn."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return tokens


def encode_answer(tokenizer: Any, answer: str) -> list[int]:
    """Return the tokens of an assistant's turn, ending with the end-of-turn token."""
    tokens: list[int] = tokenizer.encode(answer, add_special_tokens=False)
    return [*tokens, int(tokenizer.eos_token_id)]


def reply_all(model: Any, tokenizer: Any, prompts: list[str], max_new_tokens: int, batch_size: int = 30) -> list[str]:
    """Answer every prompt greedily, in batches of prompts of like length."""
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    by_length = sorted(range(len(prompts)), key=lambda index: len(encoded[index]))
    replies = [""] * len(prompts)
    for start in range(0, len(prompts), batch_size):
        chosen = by_length[start : start + batch_size]
        batch = _reply_batch(model, tokenizer, [encoded[i] for i in chosen], max_new_tokens)
        for index, reply in zip(chosen, batch, strict=True):
            replies[index] = reply
    return replies


def _reply_batch(model: Any, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
    width = max(map(len, prompts))
    pad = int(tokenizer.eos_token_id)
    tokens = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    with torch.inference_mode():
        output = model.generate(
            input_ids=tokens,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=pad,
            pad_token_id=pad,
        )
    replies: list[str] = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    return [reply.strip() for reply in replies]
