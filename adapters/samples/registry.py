"""The three sample tasks by name. Knows nothing else about them."""

from __future__ import annotations

from adapters.samples.json_task import JSON
from adapters.samples.pirate_task import PIRATE
from adapters.samples.sql_task import SQL
from adapters.samples.task import Task

TASKS: dict[str, Task] = {task.name: task for task in (SQL, JSON, PIRATE)}
