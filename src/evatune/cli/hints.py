"""One sentence for a call that the command line does not understand, with what was meant."""

from __future__ import annotations

from typing import Any

# What a comparison has several of, by key of a recipe → its option.
AXES = {"seed": "--seeds", "method": "--methods"}
_NO_COMMAND = "No such command"  # begins the parser's sentence for one


def sentence(error: Any) -> str:
    """Return what is wrong with a call and where to look, from the parser's error."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "evatune"
    message = _message(error, path)
    if message.startswith(_NO_COMMAND):
        return f"{_of_command(message)}; {path} --help lists the commands"
    return f"{message}; {path} --help lists the options"


def _of_command(message: str) -> str:
    """Return the parser's two sentences for a command that is none as one of ours."""
    start, _, meant = message.partition(". Did you mean ")
    names = meant.rstrip("?").replace(", ", " or ")
    hint = f" (did you mean {names}?)" if names else ""
    return start.replace(_NO_COMMAND, "no command") + hint


def _message(error: Any, path: str) -> str:
    option = getattr(error, "option_name", None)
    if option is None or not hasattr(error, "possibilities"):
        text: str = error.format_message() if hasattr(error, "format_message") else str(error)
        return " ".join(text.split()).rstrip(".")
    command = path.rpartition(" ")[2]
    setting = _setting(option) if command in ("train", "compare") else None
    if setting and not (command == "compare" and setting in AXES):
        return f"no option {option}; give a setting of the recipe as {setting}=…, without dashes"
    meant = [AXES[setting]] if setting else list(error.possibilities or ())
    return f"no option {option}" + (f" (did you mean {' or '.join(meant)}?)" if meant else "")


def _setting(option: str) -> str | None:
    """Return the key of a recipe that has the name of an option, here or in other libraries."""
    from evatune.finetune.recipe_keys import known_as, recipe_keys

    return known_as(option.lstrip("-"), [key.name for key in recipe_keys()])
