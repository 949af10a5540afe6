"""Options of prompts and rewards, and what contradicts what. Standard library only."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from siren_megatron.data.prompts import PROMPT_FIELD, validate_prompt_file
from siren_megatron.data.tokenizer import check_tokenizer_path, sentencepiece_file
from siren_megatron.options import REQUIRED, option


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Where prompts come from, how they are rendered, and what grades the responses.

    One path as `prompt_data` stands for a tuple of one, and `reward` is "math" where nothing names another.
    """

    prompt_data: tuple[Path, ...] = option(
        REQUIRED, "JSONL or .parquet file(s) of prompts and answers", type=Path, several=True
    )
    prompt_weights: tuple[float, ...] | None = option(
        None,
        "share of each --prompt-data file in the prompts, in any unit; default: their numbers of prompts",
        type=float,
        above=0,
        several=True,
    )
    prompt_key: str | None = option(None, "field of the prompt; default: problem, question or prompt")
    prompt_answer_key: str | None = option(None, "field of the answer; default: answer or solution")
    prompt_system: str | None = option(None, "system message of the chat template")
    prompt_chat_template: bool | None = option(
        None, "apply the tokenizer's chat template; default: where it has one", type=bool
    )
    prompt_template: str | None = option(
        None,
        "plain text instead of a chat template, with {prompt} where the prompt goes; \\n is a line break "
        "(and \\\\n the two characters)",
    )
    tokenizer: Path | None = option(
        None, "tokenizer directory or SentencePiece .model file; default: --hf-checkpoint's own", type=Path
    )
    reward: str | None = option(
        None, "reward function; default: math", choices=("countdown", "exact", "math", "rewrite")
    )
    reward_function: str | None = option(
        None, "own reward instead, path.py:name, called as name(response, answer) -> float"
    )
    reward_num_workers: int = option(1, "processes that compute rewards", minimum=1)
    reward_time_limit: float = option(5.0, "seconds for one response's reward", above=0)

    def __post_init__(self):
        paths, weights = self.prompt_data, self.prompt_weights
        paths = (paths,) if isinstance(paths, str | Path) else paths
        object.__setattr__(self, "prompt_data", tuple(Path(path) for path in paths))
        if weights is not None:
            object.__setattr__(self, "prompt_weights", tuple(weights))
        if self.reward is None and self.reward_function is None:
            object.__setattr__(self, "reward", "math")

    @property
    def reward_name(self) -> str:
        """The reward as :class:`siren_megatron.rewards.pool.RewardPool` takes it."""
        if self.reward_function is None:
            return self.reward
        path, _, name = self.reward_function.rpartition(":")
        return f"{Path(path).resolve()}:{name}"

    @property
    def template_text(self) -> str | None:
        r"""`--prompt-template` with its line breaks: ``\n`` as a shell passes it is one."""
        if self.prompt_template is None:
            return None
        return re.sub(r"\\(\\?)n", lambda found: r"\n" if found[1] else "\n", self.prompt_template)


def check_data(data: DataOptions) -> None:
    """Refuse data options that are wrong alone or together; prompt files are read, rewards are not imported.

    Raises:
        ValueError: one line that names the option, or both that contradict each other.
    """
    check_data_rendering(data)
    _check_mixture(data)
    if data.reward_function is not None:
        if data.reward is not None:
            raise ValueError(
                f"--reward {data.reward} and --reward-function {data.reward_function} contradict each other"
            )
        check_reward_function(data.reward_function)
    for path in data.prompt_data:
        validate_prompt_file(path, prompt_key=data.prompt_key, answer_key=data.prompt_answer_key)


def check_data_rendering(data: DataOptions) -> None:
    """Refuse contradictory templates and tokenizers; raises ValueError."""
    template, system, chat = data.prompt_template, data.prompt_system, data.prompt_chat_template
    if template is not None:
        if PROMPT_FIELD not in template:
            raise ValueError(f"--prompt-template {template!r} holds no {PROMPT_FIELD}")
        if system is not None:
            raise ValueError(
                "--prompt-template and --prompt-system contradict each other: no chat is rendered"
            )
        if chat:
            raise ValueError("--prompt-template and --prompt-chat-template contradict each other")
    if system is not None and chat is False:
        raise ValueError("--prompt-system needs the chat template that --no-prompt-chat-template turns off")
    if data.tokenizer is not None:
        check_tokenizer_path(data.tokenizer)
        if sentencepiece_file(data.tokenizer) is not None:
            for wanted, name in ((system is not None, "--prompt-system"), (chat, "--prompt-chat-template")):
                if wanted:
                    raise ValueError(
                        f"{name} contradicts --tokenizer {data.tokenizer}: "
                        "a SentencePiece model has no chat template"
                    )


def _check_mixture(data: DataOptions) -> None:
    paths, weights = data.prompt_data, data.prompt_weights
    if not paths:
        raise ValueError("--prompt-data names no file")
    if weights is not None and len(weights) != len(paths):
        raise ValueError(
            f"--prompt-weights has {len(weights)} number(s) for the {len(paths)} file(s) of --prompt-data"
        )
    seen = set()
    for path in paths:
        if path.resolve() in seen:
            raise ValueError(f"--prompt-data names {path} twice: give it a larger --prompt-weights instead")
        seen.add(path.resolve())


def check_reward_function(spec: str, *, flag: str = "--reward-function") -> None:
    """See that a file defines a function at its top level, without running any of it.

    Args:
        spec: ``path.py:name``.
        flag: the option, for the messages.

    Raises:
        ValueError: no such file, not Python, the name is not defined, or cannot take (response, answer).
    """
    path_text, _, name = spec.rpartition(":")
    if not path_text.endswith(".py") or not name.isidentifier():
        raise ValueError(f"{flag} {spec}: not of the form path.py:name")
    try:
        tree = ast.parse(Path(path_text).read_bytes(), filename=path_text)
    except OSError as error:
        raise ValueError(f"{flag} {spec}: {error.strerror or error}") from error
    except SyntaxError as error:
        raise ValueError(f"{flag} {spec}: line {error.lineno}: not Python: {error.msg}") from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"{flag} {spec}: not Python: {' '.join(str(error).split())[:300]}") from error
    found = [node for bound, node in _top_level_names(tree.body) if bound == name]
    if not found:
        raise ValueError(f"{flag} {spec}: the file defines no {name} at its top level")
    node = found[-1]
    if isinstance(node, ast.AsyncFunctionDef):
        raise ValueError(f"{flag} {spec}: {name} is async, a reward is a plain function")
    # A decorator may change what a function takes.
    if isinstance(node, ast.FunctionDef) and not node.decorator_list and not _takes_two(node.args):
        raise ValueError(f"{flag} {spec}: {name} cannot be called as {name}(response, answer)")


def _top_level_names(body: list[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    """(name, statement) of what a module binds, also in `if` and `try`; `import *` is not seen."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name.partition(".")[0], node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if node.value else []
            for target in targets:
                for part in ast.walk(target):
                    if isinstance(part, ast.Name):
                        yield part.id, node
        else:
            for block in ("body", "orelse", "finalbody"):
                yield from _top_level_names(getattr(node, block, []))
            for handler in getattr(node, "handlers", []):
                yield from _top_level_names(handler.body)


def _takes_two(arguments: ast.arguments) -> bool:
    positional = len(arguments.posonlyargs) + len(arguments.args)
    required = positional - len(arguments.defaults)
    keywords_needed = any(default is None for default in arguments.kw_defaults)
    return required <= 2 and (positional >= 2 or arguments.vararg is not None) and not keywords_needed
