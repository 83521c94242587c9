"""Where log lines go: the console, a JSONL file, TensorBoard, W&B. One rank writes.

    with open_log(places, out, rank=rank, start=resumed_step, num_steps=steps) as log:
        log.write(meter.line(step, lr))

A resumed run leaves each curve as if it had never stopped: lines after the step that it goes on
from are dropped.

    out/log.jsonl       one line a log, LogLine's fields and `time`
    out/tensorboard/    events
    out/wandb-id        which run of W&B this is
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from pixart_rt.errors import BackendError, DataError
from pixart_rt.files import replacing
from pixart_rt.stderr_console import stderr
from pixart_rt.training.metrics import LogLine
from pixart_rt.training.run_settings import Place

JSONL, EVENTS, WANDB_ID = "log.jsonl", "tensorboard", "wandb-id"


class Writer(Protocol):
    """One place."""

    def write(self, line: LogLine) -> None: ...

    def close(self) -> None: ...


class Log:
    """All places of a run; none on ranks other than 0."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self.writers = tuple(writers)

    def write(self, line: LogLine) -> None:
        for writer in self.writers:
            writer.write(line)


@contextmanager
def open_log(
    places: Collection[Place],
    out: Path,
    *,
    rank: int = 0,
    start: int = 0,
    num_steps: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Iterator[Log]:
    """Open every place and close it again, also when the run fails.

    start: steps that are done already; lines after it are dropped. num_steps: of the run, for the
    console. settings: what W&B shows with the curves. Raises BackendError for a place whose
    package is missing, DataError for a log.jsonl that is damaged.
    """
    with ExitStack() as stack:
        writers: list[Writer] = []
        for place in Place if rank == 0 else ():
            if place in places:
                writers.append(_open(place, Path(out), start, num_steps, settings or {}))
                stack.callback(writers[-1].close)
        yield Log(writers)


def _open(
    place: Place, out: Path, start: int, num_steps: int | None, settings: Mapping[str, Any]
) -> Writer:
    if place is Place.CONSOLE:
        return ConsoleWriter(num_steps)
    out.mkdir(parents=True, exist_ok=True)
    if place is Place.JSONL:
        return JsonlWriter(out / JSONL, start)
    if place is Place.TENSORBOARD:
        return TensorBoardWriter(out / EVENTS, start)
    return WandbWriter(out, settings)


class ConsoleWriter:
    """A line on stderr, above a running bar."""

    def __init__(self, num_steps: int | None = None, console: Console | None = None) -> None:
        self.num_steps = num_steps
        self.console = console or stderr()

    def write(self, line: LogLine) -> None:
        self.console.print(describe(line, self.num_steps), markup=False, soft_wrap=True)

    def close(self) -> None:
        """Nothing is held."""


def describe(line: LogLine, num_steps: int | None = None) -> str:
    """A log line for people; what is not known is left out."""
    of = "" if num_steps is None else f"/{num_steps}"
    quarters = " ".join(_number(each) for each in line.by_quarter.get("loss", ()))
    shares = (("MFU", line.mfu), ("HFU", line.hfu), ("waits for data", line.data_stall),
              ("communication", line.communication), ("clipped", line.clipped))  # fmt: skip
    words = [
        f"step {line.step}{of}",
        f"loss {_number(line.loss)} ({quarters})" if quarters else f"loss {_number(line.loss)}",
        f"{line.images_per_second:.4g} img/s",
        f"{line.tokens_per_second:.4g} tokens/s",
        *(f"{name} {100 * share:.1f} %" for name, share in shares if share is not None),
        f"{line.memory / 1e9:.2f} GB",
        f"lr {line.lr:.3g}",
        f"norm {_number(line.grad_norm)}",
        *([f"skipped {line.skipped}"] if line.skipped else []),
    ]
    return "  ".join(words)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


class JsonlWriter:
    """Appends; every line is in the file when write returns."""

    def __init__(self, path: Path, start: int = 0) -> None:
        _drop_after(path, start)
        self._file = path.open("a", encoding="utf-8")

    def write(self, line: LogLine) -> None:
        record = {"time": datetime.now(UTC).isoformat(timespec="seconds"), **line.to_dict()}
        self._file.write(json.dumps(_finite(record), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a log.jsonl; a last line that a kill cut short is left out.

    Raises DataError where another line is no record.
    """
    *whole, _torn = path.read_text(encoding="utf-8").split("\n")
    records = []
    for number, text in enumerate(whole, start=1):
        try:
            record = json.loads(text)
            if not isinstance(record.get("step"), int):
                raise ValueError("it has no step")
        except (ValueError, AttributeError) as error:
            raise DataError(
                f"{path} line {number} is no log line ({error}); move the file away"
            ) from error
        records.append(record)
    return records


def _drop_after(path: Path, start: int) -> None:
    """Rewrite the file without lines of steps after `start`, and without a torn last one."""
    if not path.exists():
        return
    kept = [record for record in read_lines(path) if record["step"] <= start]
    with replacing(path) as aside:
        aside.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")


def _finite(value: Any) -> Any:
    """JSON has no NaN: null in its place."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def scalars(line: LogLine) -> dict[str, float]:
    """What is known of a line as single numbers: `mse/quarter-1` to -4 for the terms."""
    values = line.to_dict()
    del values["step"]
    by_quarter: dict[str, tuple[float | None, ...]] = values.pop("by_quarter")
    for name, quarters in by_quarter.items():
        values |= {f"{name}/quarter-{n}": each for n, each in enumerate(quarters, start=1)}
    return {name: float(value) for name, value in values.items() if value is not None}


class TensorBoardWriter:
    """Events by torch.utils.tensorboard."""

    def __init__(self, folder: Path, start: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise BackendError(
                f"log to tensorboard was requested, but it cannot be imported ({error}); "
                "pip install 'pixart_rt[tensorboard]', or leave it out"
            ) from error
        # TensorBoard hides what earlier event files have at purge_step and after it.
        self._events = SummaryWriter(str(folder), purge_step=start + 1)

    def write(self, line: LogLine) -> None:
        for name, value in scalars(line).items():
            self._events.add_scalar(name, value, line.step)
        self._events.flush()

    def close(self) -> None:
        self._events.close()


class WandbWriter:
    """A run of Weights & Biases, resumed with the training.

    Its history cannot be shortened: after a resume it ignores steps that it has already, so its
    curve keeps the first run's lines until the second has passed them.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise BackendError(
                f"log to wandb was requested, but it cannot be imported ({error}); pip install "
                "wandb, or leave it out"
            ) from error
        self._run = wandb.init(
            project="pixart_rt", dir=str(out), id=_run_id(out / WANDB_ID), resume="allow",
            config=dict(settings),
        )  # fmt: skip

    def write(self, line: LogLine) -> None:
        self._run.log(scalars(line), step=line.step)

    def close(self) -> None:
        self._run.finish()


def _run_id(path: Path) -> str:
    """The name of this run, made up once."""
    if not path.is_file():
        with replacing(path) as aside:
            aside.write_text(secrets.token_hex(8), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
