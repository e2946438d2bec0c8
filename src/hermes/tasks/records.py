"""A file of records (JSON lines) to be worked through: reading it, batching it, and a journal that a kill cannot hurt.

What is done with a record is in the other modules of this package; `hermes.cli.batch` puts the two together.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hermes.checkpoint.partial import lock
from hermes.errors import InputError

__all__ = ["Journal", "Record", "make_batches", "read_records"]

TEXT_FIELDS = ("text", "prompt")


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One line: its text, and all that it has, which is handed through; of a bare string, its "text"."""

    index: int
    text: str
    fields: Mapping[str, Any]


def read_records(path: Path) -> tuple[list[Record], str]:
    """Records of a JSONL file, and the SHA-256 of its bytes; it is read once, so that it may be a pipe.

    Strings, or objects with "text" or "prompt"; empty lines are passed over. Raises InputError, naming the line, before
    anything is done with the others.
    """
    records: list[Record] = []
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                digest.update(line)
                if line.strip():
                    records.append(_record(line, len(records), f"{path}, line {number}"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    if not records:
        raise InputError(f"{path} has no records; give one JSON string or object a line")
    return records, digest.hexdigest()


def _record(line: bytes, index: int, place: str) -> Record:
    try:
        value = json.loads(line.decode())
        json.dumps(value, ensure_ascii=False).encode()  # as the output is going to be written
    except UnicodeDecodeError as error:
        raise InputError(f"{place}: not UTF-8 (byte {error.start + 1}); convert the file") from error
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise InputError(f"{place}: {half!r} is half a character, which no text can hold; mend the line") from error
    except RecursionError as error:
        raise InputError(f"{place}: nested too deeply; give a string, or an object of few levels") from error
    except ValueError as error:
        raise InputError(f"{place}: not JSON ({error})") from error
    fields = value if isinstance(value, dict) else {"text": value}
    text = next((fields[name] for name in TEXT_FIELDS if name in fields), None)
    if not isinstance(text, str) or not text:
        raise InputError(f'{place}: needs a string, or an object with "text" or "prompt" that is not empty')
    return Record(index=index, text=text, fields=fields)


def make_batches(
    lengths: Sequence[int], *, batch_size: int | None = None, batch_tokens: int | None = None
) -> list[list[int]]:
    """Indices in batches of records of like length, the largest batch first.

    What does not fit fails at once then, and buffers that grew from one batch to the next would fit no hole that the
    one before left in the heap: 33 batches of 2,000 tokens each a little larger made 34 MiB of activations 250 of heap.

    A batch has `batch_size` records at most, and, padded to its longest, `batch_tokens` tokens (but one record at
    least).

    **Guarantee.** Each index is in exactly one batch.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        batch = batches[-1] if batches else None
        if (
            batch is None
            or (batch_size is not None and len(batch) >= batch_size)
            or (batch_tokens is not None and (len(batch) + 1) * lengths[batch[0]] > batch_tokens)
        ):
            batches.append([index])
        else:
            batch.append(index)
    return sorted(batches, key=lambda batch: -len(batch) * lengths[batch[0]])


class Journal:
    """Results as they come, in a file beside the output that a later run goes on from: a line is [index, result].

    Args:
        output: appears when everything is done, whole; until then there is `output`.partial.
        job: whatever the results depend on; a journal of another job is refused.

    **Guarantees.** A batch of results is on disk before `add` returns. A run that is killed at any moment loses the
    batch under way and nothing else. One process at a time is at an output.

    Raises InputError if the output exists, cannot be written, or its journal belongs to another job or process.
    """

    def __init__(self, output: Path, job: Mapping[str, Any]) -> None:
        self._output = output
        self._path = output.with_name(output.name + ".partial")
        self._places: dict[int, int] = {}  # index -> where its line begins
        self._check_output()
        header = json.dumps({"job": hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()}) + "\n"
        try:
            self._file = self._path.open("a+b")
            try:
                lock(self._file.fileno(), self._path)
                self._check_output()  # another process may have ended between
                if os.fstat(self._file.fileno()).st_nlink == 0:
                    raise InputError(f"{self._path} was just removed by another process; run this again")
                self._resume(header.encode())
            except BaseException:
                self._file.close()
                raise
        except OSError as error:
            raise InputError(f"cannot write {self._path}: {error.strerror or error}") from error

    @property
    def done(self) -> frozenset[int]:
        """Indices of the records that have results."""
        return frozenset(self._places)

    def add(self, results: Iterable[tuple[int, Mapping[str, Any]]]) -> None:
        """Keep results by index. Blocking, until they are on disk."""
        for index, result in results:
            self._places[index] = self._file.tell()
            self._file.write(json.dumps([index, result], ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self, records: Iterable[Record]) -> None:
        """Write the output, each record with its result, let it appear at once, and remove the journal.

        A line has the record's index, its own fields, which may name an index of their own, and the result.
        """
        whole = self._output.with_name(self._output.name + ".whole")
        with whole.open("wb") as file:
            for record in records:
                self._file.seek(self._places[record.index])
                _, result = json.loads(self._file.readline())
                line = {"index": record.index, **record.fields, **result}
                file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        whole.replace(self._output)
        self._path.unlink()
        self._file.close()

    def _check_output(self) -> None:
        if self._output.exists():
            raise InputError(f"{self._output} exists; remove it, or name another output")

    def _resume(self, header: bytes) -> None:
        self._file.seek(0)
        first = self._file.readline()
        if not header.startswith(first):  # a kill leaves nothing of it, or its beginning
            raise InputError(
                f"{self._path} is from a run with other inputs, model or options; repeat those, or remove it"
            )
        place = len(first)
        for line in self._file:
            if not line.endswith(b"\n"):  # cut off by a kill
                break
            index, _ = json.loads(line)
            self._places[index] = place
            place += len(line)
        self._file.truncate(place if first == header else 0)
        self._file.seek(0, os.SEEK_END)
        if first != header:
            self._file.write(header)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._places:  # refused before the first batch: nothing to go on from
            self._path.unlink(missing_ok=True)
        self._file.close()
