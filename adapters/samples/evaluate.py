"""Score the sample adapters on held-out items, the base model beside each adapter.

`python -m adapters.samples.evaluate` prints the scores as a Markdown table; with
`--compare` it prints what the base model and every adapter answer to the same prompts.
Knows PEFT and the shipped folders; it trains nothing. Decoding is greedy.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from peft import PeftModel

from adapters.samples.chat import HUB_NAME, load_base, reply_all
from adapters.samples.registry import TASKS
from adapters.samples.task import Item, Task

HELD_OUT_COUNT = 120
HELD_OUT_SEED = 20

# Neither in the training data nor drawn by its generators.
COMPARED_PROMPTS = {
    "sql": (
        "Write one SQLite query.\n"
        "Table: penguins(id, island, weight, age)\n"
        "Question: What is the average weight for each island in penguins?"
    ),
    "json": (
        "Extract as JSON with keys guest, city, nights, date (YYYY-MM-DD).\n"
        "Text: Hi, this is Nora Lind. I would like to stay 3 nights in Ljubljana, from March 9, 2027."
    ),
    "pirate": "What is a library?",
}


def load_adapters(model: str, folder: Path, names: list[str]) -> tuple[Any, Any]:
    """Load the base model with the named adapter folders on top, none of them merged."""
    base, tokenizer = load_base(model)
    for name in names:
        if not (folder / name / "adapter_config.json").is_file():
            raise FileNotFoundError(
                f"no adapter_config.json in {folder / name}: train it first with "
                f"python -m adapters.samples.train --task {name} --out {folder}"
            )
    adapted = PeftModel.from_pretrained(base, folder / names[0], adapter_name=names[0])
    for name in names[1:]:
        adapted.load_adapter(folder / name, adapter_name=name)
    return adapted.eval(), tokenizer


def replies_of(adapted: Any, tokenizer: Any, adapter: str | None, prompts: list[str], max_new_tokens: int) -> list[str]:
    """Answer the prompts with one adapter, or with the bare base model for None."""
    if adapter is None:
        with adapted.disable_adapter():
            return reply_all(adapted, tokenizer, prompts, max_new_tokens)
    adapted.set_adapter(adapter)
    return reply_all(adapted, tokenizer, prompts, max_new_tokens)


def mean_scores(task: Task, items: list[Item], replies: list[str]) -> dict[str, float]:
    """Average every metric of a task over its items."""
    scored = [task.score(item, reply) for item, reply in zip(items, replies, strict=True)]
    return {metric: sum(s[metric] for s in scored) / len(scored) for metric in scored[0]}


def _print_scores(adapted: Any, tokenizer: Any, task: Task, count: int, misses: int) -> None:
    items = task.items("held-out", count, HELD_OUT_SEED)
    prompts = [item.prompt for item in items]
    limit = task.max_new_tokens
    ours = replies_of(adapted, tokenizer, task.name, prompts, limit)
    base = replies_of(adapted, tokenizer, None, prompts, limit)
    of_base, of_adapter = mean_scores(task, items, base), mean_scores(task, items, ours)
    for metric, value in of_adapter.items():
        print(f"| {task.name} | {metric} | {count} | {of_base[metric]:.3f} | {value:.3f} |", flush=True)
    missed = [pair for pair in zip(items, ours, strict=True) if _headline(task, *pair) < 1]
    for item, reply in missed[:misses]:
        print(f"missed: {item.prompt!r}\n  wanted {item.answer!r}\n  got {reply!r}", file=sys.stderr)


def _headline(task: Task, item: Item, reply: str) -> float:
    return next(iter(task.score(item, reply).values()))


def _print_comparison(adapted: Any, tokenizer: Any, names: list[str]) -> None:
    prompts = [COMPARED_PROMPTS[name] for name in names]
    limit = max(TASKS[name].max_new_tokens for name in names)
    answers = {adapter: replies_of(adapted, tokenizer, adapter, prompts, limit) for adapter in (None, *names)}
    for index, prompt in enumerate(prompts):
        print(f"\nprompt:\n{prompt}\n")
        for adapter, replies in answers.items():
            print(f"{adapter or 'base'}:\n{replies[index]}\n")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m adapters.samples.evaluate", description=__doc__)
    parser.add_argument("--task", choices=sorted(TASKS), help="evaluate only this one")
    parser.add_argument("--model", default=HUB_NAME, help="folder of the base model")
    parser.add_argument("--adapters", type=Path, default=Path(__file__).parent, help="their parent folder")
    parser.add_argument("--count", type=int, default=HELD_OUT_COUNT, help="held-out items per task")
    parser.add_argument("--misses", type=int, default=0, help="also print this many of an adapter's misses")
    parser.add_argument("--compare", action="store_true", help="print answers side by side, no scores")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Print the scores, or the answers side by side."""
    args = _arguments(argv)
    names = [args.task] if args.task else list(TASKS)
    adapted, tokenizer = load_adapters(args.model, args.adapters, names)
    if args.compare:
        _print_comparison(adapted, tokenizer, names)
        return 0
    print("| adapter | metric | held-out items | base | adapter |\n|---|---|---:|---:|---:|")
    for name in names:
        _print_scores(adapted, tokenizer, TASKS[name], args.count, args.misses)
    return 0


if __name__ == "__main__":
    sys.exit(main())
