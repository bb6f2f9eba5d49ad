"""Uploads: a form of several parts, written to a folder as it comes, with limits of its own for each part.

Starlette's own reader spools files of any size to the folder of temporary files before anybody is asked; this one
stops at the byte that is too many, whether the length was said before or not.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Collection
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from lowvram.serve.errors import Refused
from lowvram.serve.limits import FIELD_BYTES, MIB, Limits

if TYPE_CHECKING:
    from typing_extensions import Self  # of typing from Python 3.11 on

_FORM = b"multipart/form-data"
_EXPECTED = "expected a form (multipart/form-data) with image, audio and settings, as curl -F sends it"
_MOST_FIELDS = 64


class Form:
    """Takes the bytes of a form; those of ``files`` go to the paths named, other fields are text in ``fields``. Files
    that are not ``needed`` need not come.

    Raises:
        Refused: (400) no form, or a damaged one; (413) a part beyond its limit; (422) a part that is not known.
    """

    def __init__(self, boundary: bytes, files: dict[str, Path], limits: Limits, needed: Collection[str]):
        self.fields: dict[str, str] = {}
        self._files, self._limits, self._needed = files, limits, needed
        self._open: dict[str, IO[bytes]] = {}
        self._name, self._size, self._field_bytes, self._parts = "", 0, 0, 0
        self._header, self._value, self._text = bytearray(), bytearray(), bytearray()
        self._ended = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin,
                    "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
                    "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
                    "on_header_end": self._header_end,
                    "on_headers_finished": self._headers_finished,
                    "on_part_data": self._data,
                    "on_part_end": self._part_end,
                    "on_end": self._end,
                },
            )
        except FormParserError as error:
            raise Refused(400, f"the form's boundary cannot be used ({error}); {_EXPECTED}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._open.values():
            file.close()

    def write(self, data: bytes) -> None:
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise Refused(400, f"the form is damaged ({error}); {_EXPECTED}") from error

    def finish(self) -> None:
        """Raises: Refused: (400) it breaks off; (422) a file that is needed is missing, or any is empty."""
        if not self._ended:
            raise Refused(400, f"the form breaks off before its end; {_EXPECTED}")
        for name in self._files:
            if name not in self._open:
                if name in self._needed:
                    raise Refused(422, f"{name} is missing; {_EXPECTED}")
            elif self._open[name].tell() == 0:
                without = "" if name in self._needed else ", or one without it"
                raise Refused(422, f"{name} is empty, 0 bytes; {_EXPECTED}{without}")

    def _begin(self) -> None:
        self._name, self._size, self._parts = "", 0, self._parts + 1
        self._text.clear()
        if self._parts > _MOST_FIELDS:
            raise Refused(413, f"the form has more than {_MOST_FIELDS} parts; {_EXPECTED}")

    def _header_end(self) -> None:
        if bytes(self._header).lower() == b"content-disposition":
            _, options = parse_options_header(bytes(self._value))
            self._name = options.get(b"name", b"").decode("utf-8", errors="replace")
        self._header.clear()
        self._value.clear()

    def _headers_finished(self) -> None:
        name = self._name
        if not name or name in self._open or name in self.fields:
            raise Refused(422, f"a part of the form is called {name[:40]!r}, or comes twice; {_EXPECTED}")
        if name in self._files:
            self._open[name] = self._files[name].open("xb")

    def _data(self, data: bytes, start: int, end: int) -> None:
        self._size += end - start
        if self._name in self._open:
            if self._size > (most := self._limits.upload_bytes):
                raise Refused(413, f"{self._name} is larger than {most / MIB:g} MiB, the most that is taken; send less")
            self._open[self._name].write(data[start:end])
            return
        self._field_bytes += end - start
        if self._field_bytes > FIELD_BYTES:
            raise Refused(413, f"the form's fields are larger than {FIELD_BYTES // 1024} KiB together; send less")
        self._text.extend(data[start:end])

    def _part_end(self) -> None:
        if self._name in self._open:
            self._open[self._name].flush()
            return
        try:
            self.fields[self._name] = self._text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise Refused(422, f"{self._name[:40]!r} is no text in UTF-8; send it as UTF-8") from error

    def _end(self) -> None:
        self._ended = True


async def receive_form(
    content_type: str | None,
    chunks: AsyncIterator[bytes],
    files: dict[str, Path],
    limits: Limits,
    *,
    needed: Collection[str],
) -> dict[str, str]:
    """Write a form's files to where ``files`` says, by the part's name; those that are not ``needed`` need not be in
    it. Returns its other fields.

    Raises:
        Refused: as of ``Form``; (415) another content type; (408) too slow.
    """
    kind, options = parse_options_header(content_type)
    if kind != _FORM or not options.get(b"boundary"):
        raise Refused(415, f"the content type is {(content_type or 'none')[:60]!r}; {_EXPECTED}")
    begin = time.monotonic()
    with Form(options[b"boundary"], files, limits, needed) as form:
        async with contextlib.aclosing(_in_time(chunks, limits)) as timely:
            async for chunk in timely:
                form.write(chunk)
                if time.monotonic() - begin > limits.upload_s:
                    raise Refused(408, f"the upload takes longer than {limits.upload_s:g} s; send less")
        form.finish()
        return form.fields


async def _in_time(chunks: AsyncIterator[bytes], limits: Limits) -> AsyncGenerator[bytes, None]:
    while True:
        try:
            yield await asyncio.wait_for(chunks.__anext__(), limits.idle_s)
        except StopAsyncIteration:
            return
        except asyncio.TimeoutError as error:  # another class in Python 3.10
            raise Refused(408, f"no byte came for {limits.idle_s:g} s; send the form without a pause") from error
