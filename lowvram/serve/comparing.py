"""Comparison of two jobs' videos, as ``lowvram compare`` makes it, into a page that is kept."""

from __future__ import annotations

import threading
from pathlib import Path

import pydantic

from lowvram.compare.comparison import compare
from lowvram.compare.page import write_page
from lowvram.serve.errors import Refused
from lowvram.serve.jobs import DONE
from lowvram.serve.store import COMPARED, Store
from lowvram_kernels.errors import LowvramError


class Pair(pydantic.BaseModel):
    """Ids of two jobs; ``b`` is the baseline."""

    model_config = pydantic.ConfigDict(extra="forbid")

    a: str
    b: str


class Comparer:
    """Pages are made one at a time, and once."""

    def __init__(self, store: Store):
        self._store, self._lock = store, threading.Lock()

    def page(self, a: str, b: str) -> Path:
        """The page's file; the first time it takes seconds.

        Raises:
            Refused: (404) a job that is not there; (409) one that is not done; (422) runs that cannot be compared.
        """
        reports = [self._report(name) for name in (a, b)]
        page = self._store.folder / COMPARED / f"{a}-{b}.html"
        with self._lock:
            if not page.is_file():
                try:
                    write_page(compare(*reports), page)
                except LowvramError as error:
                    said = str(error).replace(f"{self._store.folder}/", "")
                    raise Refused(422, said) from error
        return page

    def _report(self, name: str) -> Path:
        job, report = self._store.job(name), self._store.place(name).outputs.report
        if job.state != DONE or report is None:
            raise Refused(409, f"job {name} is {job.state}; expected two that are done")
        return report
