"""Where an adapter that is asked for and not known may be: a template such as `hf://org/{name}` or `/srv/{name}`.

Knows nothing of what is allowed; what comes out is checked as any source is.
"""

import re

_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class SourceTemplate:
    """A template that does not hold {name} exactly once raises ValueError."""

    def __init__(self, template: str) -> None:
        if template.count("{name}") != 1:
            raise ValueError(f"the source template {template!r} must hold {{name}} exactly once")
        self._template = template

    def source_for(self, name: str) -> str | None:
        """None when a part of the name is not plain letters, digits and `. _ -`: such a name is not looked for."""
        if not all(_PLAIN.fullmatch(part) and ".." not in part for part in name.split("/")):
            return None
        return self._template.replace("{name}", name)
