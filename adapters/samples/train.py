"""Train the sample adapters with PEFT: `python -m adapters.samples.train [--task sql]`.

Knows PEFT, the recipe of each adapter and the folder it is written to; it does not
score anything. Everything random comes from fixed seeds, so a second run on the same
kind of machine gives the same adapter up to floating point.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file

from adapters.samples.chat import HUB_NAME, encode_answer, encode_prompt, load_base
from adapters.samples.registry import TASKS
from adapters.samples.task import Task

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_ALL_LINEAR = (*_ATTENTION, "gate_proj", "up_proj", "down_proj")

# What one adapter may weigh on disk; the default model's samples stay inside a git checkout.
MAX_BYTES = 3 * 1024 * 1024


@dataclass(frozen=True)
class Recipe:
    """How one adapter is trained. Ranks and targets differ on purpose between the samples:
    served in one batch they exercise rows of unlike shape."""

    rank: int
    alpha: int
    targets: tuple[str, ...]
    steps: int
    learning_rate: float = 2e-3
    batch_size: int = 8
    seed: int = 20


RECIPES = {
    "sql": Recipe(rank=4, alpha=8, targets=_ALL_LINEAR, steps=140),
    "json": Recipe(rank=8, alpha=16, targets=_ATTENTION, steps=130),
    "pirate": Recipe(rank=8, alpha=16, targets=("q_proj", "v_proj", "down_proj"), steps=48),
}

Example = tuple[list[int], list[int]]


def batches(examples: list[Example], batch_size: int, seed: int) -> Iterator[list[Example]]:
    """Yield every example once, in batches of like length, so that little is padding."""
    pool = 8 * batch_size
    rng = random.Random(seed)
    for start in range(0, len(examples), pool):
        near = sorted(examples[start : start + pool], key=lambda e: len(e[0]) + len(e[1]))
        chunks = [near[i : i + batch_size] for i in range(0, len(near), batch_size)]
        rng.shuffle(chunks)
        yield from chunks


def answer_loss(model: Any, batch: list[Example], pad: int) -> torch.Tensor:
    """Return the mean cross-entropy of the answers' tokens; prompts bear no loss.

    The language-model head runs at the answers' positions only: it is a fifth of the
    model, and prompts are longer than answers.
    """
    width = max(len(prompt) + len(answer) for prompt, answer in batch)
    rows = [p + a + [pad] * (width - len(p) - len(a)) for p, a in batch]
    tokens = torch.tensor(rows)
    labels = torch.full_like(tokens, -100)
    for row, (prompt, answer) in enumerate(batch):
        labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    # Padding stands on the right, where the causal mask hides it from every answer.
    first = min(len(prompt) for prompt, _ in batch) - 1
    kept = torch.arange(first, width - 1)
    logits = model(input_ids=tokens, logits_to_keep=kept, use_cache=False).logits
    wanted = labels[:, first + 1 :] != -100
    return torch.nn.functional.cross_entropy(logits[wanted].float(), labels[:, first + 1 :][wanted])


def _rate(step: int, steps: int) -> float:
    """Linear warm-up over the first 5 % of the steps, then a cosine down to zero."""
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


def _fit(model: Any, examples: list[Example], recipe: Recipe, pad: int) -> None:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: _rate(s, recipe.steps))
    started = time.monotonic()
    for step, batch in enumerate(batches(examples, recipe.batch_size, recipe.seed), start=1):
        loss = answer_loss(model, batch, pad)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == recipe.steps:
            spent = time.monotonic() - started
            print(f"step {step}/{recipe.steps} loss {loss.item():.4f} {spent:.0f} s", flush=True)


def save_adapter(model: Any, folder: Path) -> int:
    """Write the PEFT folder in bfloat16 and return the size of its weights in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model)
    weights = {name: w.detach().to(torch.bfloat16).contiguous() for name, w in state.items()}
    file = folder / "adapter_model.safetensors"
    save_file(weights, file, metadata={"format": "pt"})
    config = model.peft_config["default"]
    config.inference_mode = True
    config.save_pretrained(folder)
    _tidy_config(folder / "adapter_config.json")
    return file.stat().st_size


def _tidy_config(file: Path) -> None:
    """Name the base model by its public name, and order what PEFT keeps as a set."""
    config = json.loads(file.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = HUB_NAME
    config["target_modules"] = sorted(config["target_modules"])
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def train(task: Task, recipe: Recipe, model: str, folder: Path) -> int:
    """Train one adapter from scratch, write it to `folder` and return its size in bytes."""
    torch.manual_seed(recipe.seed)
    base, tokenizer = load_base(model)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=list(recipe.targets),
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(base, config).train()
    items = task.items("train", recipe.steps * recipe.batch_size, recipe.seed)
    examples = [(encode_prompt(tokenizer, item.prompt), encode_answer(tokenizer, item.answer)) for item in items]
    _fit(adapted, examples, recipe, pad=int(tokenizer.eos_token_id))
    return save_adapter(adapted, folder)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m adapters.samples.train", description=__doc__)
    parser.add_argument("--task", choices=sorted(TASKS), help="train only this one")
    parser.add_argument("--model", default=HUB_NAME, help="folder of the base model")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="parent folder")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Train the asked adapters; exit status 1 when one outgrows its size limit."""
    args = _arguments(argv)
    status = 0
    for name in [args.task] if args.task else sorted(TASKS):
        size = train(TASKS[name], RECIPES[name], args.model, args.out / name)
        print(f"{name}: {size} bytes in {args.out / name}")
        if size > MAX_BYTES:
            print(f"{name}: limit is {MAX_BYTES} bytes; lower the rank or the targets")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
