"""The scale of every module of an adapter, s = lora_alpha / r or lora_alpha / √r, from fields of adapter_config.json.

No regular expression from the file is run, and target_modules is not resolved: the keys of the weights say what is
targeted. Which other fields are served, and by what, is recipe.py's. Knows nothing of tensors or of the base.
"""

import json
import math
from dataclasses import dataclass

from adapters.config_values import CONFIG_NAME as CONFIG_NAME
from adapters.config_values import Fields, declared, flag, listed, number, rank, table
from adapters.errors import AdapterRefused, RefusalCode
from adapters.name_patterns import PatternTable
from adapters.untrusted_json import shown

MAX_CONFIG_BYTES = 1024 * 1024
MAX_SCALE = 1024.0
"""|alpha/r| past this is a broken file: published adapters stay under 128."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRAConfig:
    """What the file says about scale: s = lora_alpha / r, or lora_alpha / √r with use_rslora, per module."""

    r: int
    lora_alpha: float
    use_rslora: bool = False
    rank_pattern: PatternTable[int] = PatternTable()
    alpha_pattern: PatternTable[float] = PatternTable()
    target_modules: tuple[str, ...] = ()  # as listed; () when absent or an expression
    base_model: str | None = None  # what the file declares, made printable; a claim, not a fact

    @classmethod
    def of(cls, fields: Fields) -> "LoRAConfig":
        """From a config whose other fields somebody else has judged. Raises AdapterRefused naming the field."""
        return cls(
            r=rank("r", fields.get("r")),
            lora_alpha=number("lora_alpha", fields.get("lora_alpha")),
            use_rslora=flag("use_rslora", fields.get("use_rslora")),
            rank_pattern=PatternTable.parse(
                {key: rank(f"rank_pattern[{shown(key)}]", value) for key, value in table(fields, "rank_pattern")},
                field="rank_pattern",
            ),
            alpha_pattern=PatternTable.parse(
                {key: number(f"alpha_pattern[{shown(key)}]", value) for key, value in table(fields, "alpha_pattern")},
                field="alpha_pattern",
            ),
            target_modules=listed(fields.get("target_modules")),
            base_model=declared(fields.get("base_model_name_or_path")),
        )

    @property
    def features(self) -> tuple[str, ...]:
        """What goes beyond one rank and one alpha for all modules."""
        found = {
            "rslora": self.use_rslora,
            "rank_pattern": bool(self.rank_pattern.entries),
            "alpha_pattern": bool(self.alpha_pattern.entries),
        }
        return tuple(name for name, is_found in found.items() if is_found)

    def rank_of(self, module: str) -> int:
        return self.rank_pattern.lookup(module, self.r)

    def scale_of(self, module: str) -> float:
        """s of a module, by the name the file calls it. Raises AdapterRefused when |s| is past MAX_SCALE."""
        lora_rank, alpha = self.rank_of(module), self.alpha_pattern.lookup(module, self.lora_alpha)
        scale = alpha / (math.sqrt(lora_rank) if self.use_rslora else lora_rank)
        if abs(scale) > MAX_SCALE:
            raise AdapterRefused(
                RefusalCode.UNSUPPORTED,
                f"the scale of {shown(module)} is {scale:g}, past ±{MAX_SCALE:g}",
                "Check lora_alpha, r and use_rslora",
                feature=f"lora_alpha={alpha:g}",
            )
        return scale

    def canonical(self) -> bytes:
        """The fields that change the mathematics, one spelling for one meaning: the config's part of the version."""
        fields = {
            "alpha_pattern": self.alpha_pattern.to_json(float),
            "lora_alpha": float(self.lora_alpha),
            "r": self.r,
            "rank_pattern": self.rank_pattern.to_json(int),
            "use_rslora": self.use_rslora,
        }
        return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii")
