"""What every command line shares: presets and methods, and errors as one line. Imports nothing that takes long."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Rows = Mapping[str, Mapping[str, Any]]
Call = Callable[[], None]


def start(
    main: Callable[..., None],
    presets: Rows | None = None,
    arguments: Sequence[str] | None = None,
    methods: Rows | None = None,
) -> None:
    """Call ``main`` with the command line. ``--preset NAME`` stands for the flags of a row of ``presets``, ``--method
    NAME`` for those of a row of ``methods``. Of what both set and flags beside them, the method wins over the preset
    and a flag over both, in whatever order they stand. A mistake of the user or a fault of a disk ends in one line and
    status 1."""
    tables = {"preset": presets or {}, "method": methods or {}}

    def parse(given: list[str]) -> Call:
        import tyro  # only a command line needs it, so that recipes can be imported where it is not installed

        # Every flag has its --no-flag: a preset, and who takes it, may want either.
        call: Call = tyro.cli(later(main), args=_with_rows(given, tables), config=(tyro.conf.OmitArgPrefixes,))
        return call

    parse_and_call(parse, arguments)


def parse_and_call(parse: Callable[[list[str]], Call], arguments: Sequence[str] | None = None) -> None:
    """``parse`` gives what is called then; errors of both are one line. Under torchrun, all processes do the same, and
    what all of them have to say the first one says."""
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(level=logging.ERROR if rank else logging.INFO, format="%(message)s")
    try:
        with _together() as together:
            with together():
                call = _parsed(parse, list(sys.argv[1:] if arguments is None else arguments))
            call()
    except (ValueError, OSError) as error:
        if rank and getattr(error, "others_say_it", False):
            sys.exit(1)
        sys.exit(f"error: rank {rank}: {error}" if rank else f"error: {error}")


@contextlib.contextmanager
def _together() -> Iterator[Callable[[], contextlib.AbstractContextManager[None]]]:
    """Under torchrun, in a block of all processes, the means to have their errors in common."""
    if "WORLD_SIZE" not in os.environ:
        yield contextlib.nullcontext
        return
    from gan import rendezvous  # which takes a second to import

    with rendezvous.started() as ranks:
        yield ranks.together


def _parsed(parse: Callable[[list[str]], Call], given: list[str]) -> Call:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parse(given)
    except SystemExit as ended:
        if ended.code and said.getvalue():
            raise ValueError(_one_line(said.getvalue())) from ended
        raise


def later(main: Callable[..., None]) -> Callable[..., Call]:
    """``main`` with its signature, that gives what calls it: what it prints is not the parser's."""

    @functools.wraps(main)
    def parsed(*args: Any, **kwargs: Any) -> Call:
        return lambda: main(*args, **kwargs)

    return parsed


def _with_rows(given: list[str], tables: Mapping[str, Rows]) -> list[str]:
    """The flags of the rows that are named, table by table, then those given, without the names: of two the last one
    counts."""
    of_rows: list[str] = []
    for table, rows in tables.items():
        name, given = _taken(given, f"--{table}")
        if name is None:
            continue
        if name not in rows:
            raise ValueError(f"{table} must be one of {', '.join(rows) or 'none here'}, got {name!r}")
        of_rows += flags(rows[name])
    return of_rows + given


def flags(fields: Mapping[str, Any]) -> list[str]:
    """The command line that sets these fields of a config."""
    found: list[str] = []
    for field, value in fields.items():
        flag = field.replace("_", "-")
        found += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return found


def _taken(given: list[str], option: str) -> tuple[str | None, list[str]]:
    """The last value of an option, None where it is not there, and the arguments without that one."""
    found = [i for i, x in enumerate(given) if x == option or x.startswith(f"{option}=")]
    if not found:
        return None, given
    at = found[-1]
    if "=" in given[at]:
        return given[at].partition("=")[2], given[:at] + given[at + 1 :]
    return (given[at + 1 : at + 2] or [""])[0], given[:at] + given[at + 2 :]


def _one_line(text: str) -> str:
    """What a box of the parser says."""
    words = re.sub(r"[╭╮╰╯│─]+", " ", text).split("For full helptext")[0]
    return " ".join(words.split()) or "bad command line"
