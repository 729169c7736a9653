"""How the command line tells what went wrong, and with which exit code it ends.

    error: recipe.toml: 1 problem in the recipe        exit 2   the input is wrong (`UserError`)
    hint: ...                                          exit 1   the run failed (`RunError`)
                                                       exit 130 interrupted

All of it goes to stderr, in colour only on a terminal and never by colour alone, without credentials and with
nothing that a terminal would obey. Any other exception is a bug of ours and keeps its traceback.
"""

import functools
import os
import sys
from collections.abc import Callable
from typing import ParamSpec

import typer

from petractl.errors import Problem, RecipeError, RunError, UserError, lack_of_memory, refusal
from petractl.tracking.masking import mask_credentials
from petractl.tracking.terminal import harmless

EXIT_RUN_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

_STYLES = {"error": "\033[1;31m", "warning": "\033[1;33m", "hint": "\033[36m"}
_RESET = "\033[0m"

P = ParamSpec("P")


def guarded(body: Callable[P, None]) -> Callable[P, None]:
    """Wrap a command so that its errors become messages and exit codes."""

    @functools.wraps(body)
    def command(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            body(*args, **kwargs)
            sys.stdout.flush()
        except (UserError, RunError) as error:
            show_error(error)
            raise typer.Exit(EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_RUN_FAILED) from None
        except KeyboardInterrupt:
            sys.stderr.write("interrupted\n")
            raise typer.Exit(EXIT_INTERRUPTED) from None
        except BrokenPipeError:
            # The reader is gone: let the interpreter's last flush of stdout go nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise typer.Exit(EXIT_BROKEN_PIPE) from None
        except OSError as error:
            words = refusal(error)
            if not words:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            _write("error", words)
            raise typer.Exit(EXIT_RUN_FAILED) from None
        except (MemoryError, RuntimeError) as error:
            words = lack_of_memory(error)
            if not words:
                raise
            _write("error", f"out of memory: {words}")
            _write("hint", "make the net, the images or data.batch_size smaller")
            raise typer.Exit(EXIT_RUN_FAILED) from None

    return command


def show_error(error: UserError | RunError) -> None:
    """Write an error to stderr, a recipe's problems one by one."""
    place = f"{error.where}: " if error.where else ""
    if isinstance(error, RecipeError):
        _write("error", f"{place}{error.what.splitlines()[0]}")
        for problem in error.problems:
            _write_problem(problem)
    else:
        _write("error", f"{place}{error.what}")
    if error.hint:
        _write("hint", error.hint)


def show_warning(problem: Problem) -> None:
    """Write a warning to stderr."""
    _write("warning", f"{problem.key}: {problem.what}" if problem.key else problem.what)
    if problem.hint:
        _write("hint", problem.hint)


def write_out(text: str) -> None:
    """Write data to stdout as it is, but for what a terminal would obey."""
    sys.stdout.write(harmless(text if text.endswith("\n") else f"{text}\n"))


def wants_colour() -> bool:
    """Return whether stderr takes colours."""
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _write_problem(problem: Problem) -> None:
    sys.stderr.write(f"  {_safe(f'{problem.key}: {problem.what}' if problem.key else problem.what)}\n")
    if problem.hint:
        _write("hint", problem.hint, indent="    ")


def _write(label: str, message: str, *, indent: str = "") -> None:
    head = f"{_STYLES[label]}{label}:{_RESET}" if wants_colour() else f"{label}:"
    sys.stderr.write(f"{indent}{head} {_safe(message)}\n")


def _safe(message: str) -> str:
    return harmless(mask_credentials(message))
