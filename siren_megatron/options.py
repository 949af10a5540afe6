"""How an option is declared: a dataclass field with its help, choices and bounds. Standard library only."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

REQUIRED = dataclasses.MISSING


def option(
    default: Any,
    help: str,
    *,
    type: type | None = None,
    choices: Sequence[str] | None = None,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    several: bool = False,
):
    """A dataclass field that is also a command-line option.

    Args:
        default: default value; `REQUIRED` for a required option.
        help: meaning, unit and sentinel values.
        type: the option's type where the default does not tell it (a default of None).
        choices: allowed values.
        several: one or more values: `--flag A B`; the field is a tuple (or None). The bounds hold for each.
        minimum, above, maximum: bounds; `minimum` and `maximum` are allowed values, `above` is not.
    """
    metadata = {
        "help": help,
        "type": type or (str if default in (None, REQUIRED) else default.__class__),
        "choices": choices,
        "minimum": minimum,
        "above": above,
        "maximum": maximum,
        "several": several,
    }
    return dataclasses.field(default=default, metadata=metadata)


def flag(name: str) -> str:
    """`rollout_batch_size` -> `--rollout-batch-size`."""
    return "--" + name.replace("_", "-")
