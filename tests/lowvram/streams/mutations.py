"""Every place where one stream, or the host, is made to wait for another, and what it is without that.

``SITES`` has the calls that order something; a mutation takes one of them, or one of its arguments, out of the running
code. ``EXCEPTIONS`` are sites that order nothing by themselves.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

ROOT = Path(__file__).parents[3]
FILES = (
    "lowvram/offload/copy_engine.py",
    "lowvram/offload/pinning.py",
    "lowvram/offload/prefetch.py",
    "lowvram/offload/layers.py",
    "lowvram/denoise/kv_cache.py",
    "lowvram/decode.py",
    "lowvram/denoise/cuda_graphs.py",
)
ORDERING = {
    "wait", "settle", "now", "wait_event", "synchronize", "record", "copy_in", "copy_out", "release", "finalize",
    "wait_stream", "record_event", "record_stream", "_wait_for_copies", "CudaMoment", "_written",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Mutation:
    """``text``, which stands once in ``file``, becomes ``instead``; then ``breaks``."""

    file: str
    text: str
    instead: str
    breaks: str

    def __str__(self) -> str:
        return f"{Path(self.file).stem}-{self.breaks.replace(' ', '_')}"

    def lines(self) -> range:
        """Raises: AssertionError unless the text stands once in the file."""
        source = (ROOT / self.file).read_text()
        assert source.count(self.text) == 1, f"{self.text!r} stands {source.count(self.text)} times in {self.file}"
        first = source[: source.index(self.text)].count("\n") + 1
        return range(first, first + self.text.rstrip("\n").count("\n") + 1)

    @contextlib.contextmanager
    def made(self) -> Iterator[None]:
        """The functions of the running module have the changed code for as long."""
        module = importlib.import_module(self.file.removesuffix(".py").replace("/", "."))
        path = ROOT / self.file
        source = path.read_text()
        before, after = (
            dict(_functions(compile(text, str(path), "exec"), ""))
            for text in (source, source.replace(self.text, self.instead))
        )
        changed = [name for name in before if _differs(before[name], after[name])]
        outer = [name for name in changed if not any(name.startswith(f"{other}.") for other in changed)]
        assert outer, f"{self.text!r} changes nothing in a function"
        functions = {name: _function(module, name) for name in outer}
        try:
            for name, function in functions.items():
                function.__code__ = after[name]
            yield
        finally:
            for name, function in functions.items():
                function.__code__ = before[name]


def _functions(code: CodeType, prefix: str) -> Iterator[tuple[str, CodeType]]:
    """Functions and methods by their qualified names, without those inside of functions."""
    for inner in code.co_consts:
        if isinstance(inner, CodeType) and not inner.co_name.startswith("<"):
            name = prefix + inner.co_name
            if inner.co_flags & inspect.CO_OPTIMIZED:
                yield name, inner
            else:  # the body of a class
                yield from _functions(inner, f"{name}.")


def _differs(one: CodeType, other: CodeType) -> bool:
    """Apart from the numbers of lines."""
    if (one.co_code, one.co_names, one.co_varnames) != (other.co_code, other.co_names, other.co_varnames):
        return True
    if len(one.co_consts) != len(other.co_consts):
        return True
    for a, b in zip(one.co_consts, other.co_consts, strict=True):
        if isinstance(a, CodeType) and isinstance(b, CodeType):
            if _differs(a, b):
                return True
        elif a != b:
            return True
    return False


def _function(module: Any, name: str) -> FunctionType:
    found = module
    for part in name.split("."):
        found = inspect.getattr_static(found, part)
    found = inspect.unwrap(getattr(found, "__func__", found))
    assert isinstance(found, FunctionType), name
    return found


@dataclasses.dataclass(frozen=True)
class Site:
    """A call that orders something."""

    file: str
    function: str
    line: int
    text: str


def sites() -> list[Site]:
    return [site for file in FILES for site in _sites_of(file)]


def _sites_of(file: str) -> list[Site]:
    source = (ROOT / file).read_text()
    found: list[Site] = []

    def visit(node: ast.AST, where: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner = where
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                inner = f"{where}.{child.name}".removeprefix(".")
            if isinstance(child, ast.Call | ast.Subscript):
                called = child.func if isinstance(child, ast.Call) else child.value
                name = getattr(called, "attr", getattr(called, "id", None))
                stores = isinstance(child, ast.Call) or isinstance(child.ctx, ast.Store)
                if name in ORDERING and stores:
                    found.append(Site(file, where, child.lineno, ast.get_source_segment(source, child) or ""))
            visit(child, inner)

    visit(ast.parse(source), "")
    return found


def _list(file: str, *mutations: tuple[str, str, str]) -> list[Mutation]:
    return [Mutation(file, *mutation) for mutation in mutations]


MUTATIONS = [
    *_list(
        "lowvram/offload/copy_engine.py",
        ("        self.event.record(stream)\n", "        pass\n", "no event is ever recorded"),
        ("            self.stream.wait_event(moment.event)\n", "            pass\n", "streams wait for nothing"),
        ("            way.wait(moment)\n", "            pass\n", "copies wait for nothing"),
        ("        return CudaMoment(self.stream)\n", "        return DONE\n", "copies are taken for done at once"),
        (
            "        return CudaMoment(torch.cuda.current_stream(self.device))\n",
            "        return DONE\n",
            "computations are taken for done at once",
        ),
        (
            "            torch.cuda.current_stream(self.device).wait_event(moment.event)\n",
            "            pass\n",
            "computations wait for no copy",
        ),
        ("        torch.cuda.synchronize(self.device)\n", "        pass\n", "the host waits for nothing"),
    ),
    *_list(
        "lowvram/offload/pinning.py",
        ("                self._driver.settle()\n", "                pass\n", "pinned memory goes while copies use it"),
    ),
    *_list(
        "lowvram/offload/prefetch.py",
        ("deque((i, (engine.now(),)) for", "deque((i, ()) for", "a first fill overtakes who read the memory before"),
        (
            "        weakref.finalize(self, _wait_for_copies, engine, self._free, self._coming).atexit = False\n",
            "",
            "slots go back while copies use them",
        ),
        ("            self._engine.wait(moment)\n", "            pass\n", "a slot is used before it is filled"),
        ("(self._engine.now(), *moments)", "(*moments,)", "a fill overtakes the slot's reader"),
        ("(self._engine.now(), *moments)", "(self._engine.now(),)", "a fill overtakes the copy out of the slot"),
        ("            engine.wait(moment)\n", "            pass\n", "slots go back to computations that do not wait"),
        (
            "for _, _, moments in coming)",
            "for _, _, moments in ())",
            "slots go back while they are being filled",
        ),
        (
            "*(moments for _, moments in free)",
            "*(moments for _, moments in ())",
            "slots go back while they are copied out of",
        ),
    ),
    *_list(
        "lowvram/offload/layers.py",
        (
            "copy_in(slot[: source.numel()], source, *after)",
            "copy_in(slot[: source.numel()], source)",
            "weights overtake the slot's reader",
        ),
        ("            self._prefetcher.release(index)\n", "            pass\n", "slots are never free again"),
        (
            "self._engine.wait(self._engine.copy_in(slab, source, self._engine.now()))",
            "self._engine.copy_in(slab, source, self._engine.now())",
            "a resident layer is used before it is there",
        ),
        (
            "copy_in(slab, source, self._engine.now())",
            "copy_in(slab, source)",
            "a resident layer overtakes who read the memory before",
        ),
    ),
    *_list(
        "lowvram/denoise/kv_cache.py",
        (
            "copy_out(self._host[cell], held, self._engine.now())",
            "copy_out(self._host[cell], held)",
            "a ring leaves the device before it is written",
        ),
        (
            "self._engine.wait(self._engine.copy_out(self._host[cell], held, self._engine.now()))",
            "self._engine.copy_out(self._host[cell], held, self._engine.now())",
            "a ring's memory goes back while it is copied out of",
        ),
        (
            "slots[window.slot][0], self._engine.now())",
            "slots[window.slot][0])",
            "a block's keys go out before they are written",
        ),
        ("            self._written[cell] = moment\n", "", "a ring comes in before its last block went out"),
        (
            "            self._prefetcher.release(cell, moment)\n",
            "            self._prefetcher.release(cell)\n",
            "a slot is filled again before it went out",
        ),
        ("        self._engine.settle()\n        cell = ", "        cell = ", "the host reads a ring too early"),
        ("there, after = after, (", "there, after = (), (", "with nothing to copy in nothing is waited for"),
        (
            "(*after, self._written.get(cell, DONE))",
            "after",
            "what was written last is not waited for",
        ),
        (
            "copy_in(slab[part], self._host[cell][part], *after)",
            "copy_in(slab[part], self._host[cell][part])",
            "a ring overtakes the slot's reader",
        ),
    ),
    *_list(
        "lowvram/decode.py",
        (
            "        weakref.finalize(self, _wait_for_copies, engine, self._done).atexit = False\n",
            "",
            "the cache goes back while it is copied out of",
        ),
        (
            "        _wait_for_copies(self._engine, self._done)\n",
            "        pass\n",
            "the cache is replaced while it is copied out of",
        ),
        (
            "copy_out(host, slot, self._engine.now())]",
            "copy_out(host, slot)]",
            "the cache goes out too early",
        ),
        (
            "self._engine.wait(self._engine.copy_in(slot, kept, self._engine.now()))",
            "self._engine.copy_in(slot, kept, self._engine.now())",
            "the cache is used before it is back",
        ),
        (
            "copy_in(slot, kept, self._engine.now())",
            "copy_in(slot, kept)",
            "the cache overtakes who read its memory before",
        ),
        ("        engine.wait(moment)\n", "        pass\n", "nothing waits for the cache's copies"),
    ),
    *_list(
        "lowvram/denoise/cuda_graphs.py",
        ("        self._engine.settle()\n", "        pass\n", "graphs go while the device runs them"),
    ),
]

EXCEPTIONS = {
    ("lowvram/denoise/cuda_graphs.py", "LayerGraphs._replay", "record(operation, kernel, calls)"): "counts kernels",
    ("lowvram/denoise/kv_cache.py", "Rings.let_go", "self._engine.settle("): "between two videos, as of content",
    (
        "lowvram/denoise/kv_cache.py",
        "Rings.content",
        "self._engine.settle(",
    ): "the host waits for everything, as in snapshot; between two passes, which no work here is",
    ("lowvram/decode.py", "DecoderBackup.let_go", "self._engine.settle("): "behind before_decoding, between two videos",
    ("lowvram/offload/pinning.py", "Registry.pin", "weakref.finalize("): "memory stays pinned: nothing is early",
    (
        "lowvram/offload/pinning.py",
        "CudaDriver.settle",
        "torch.cuda.synchronize(",
    ): "the driver's own, which the fake stands for",
    ("lowvram/offload/pinning.py", "CudaDriver._enter", "torch.cuda.synchronize("): "makes a context, orders nothing",
    ("lowvram/offload/copy_engine.py", "CudaMoment.pass_on_host", "self.event.synchronize("): "see test_staged_copies",
    ("lowvram/offload/copy_engine.py", "CudaEngine.settle", "self._staging.settle("): "see test_staged_copies",
    ("lowvram/offload/copy_engine.py", "CudaEngine._copy_in", "self._staging.copy_in("): "see test_staged_copies",
    ("lowvram/offload/copy_engine.py", "CudaEngine._copy_out", "self._staging.copy_out("): "see test_staged_copies",
}
