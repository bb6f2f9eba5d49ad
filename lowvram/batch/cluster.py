"""Workers on the nodes of a Ray cluster: an actor a card, or a node where none has cards. Needs the extra ``ray``.

Ray decides nothing here: actors are put on their nodes, never restarted by it, and their calls are never repeated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import socket
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

from lowvram.batch.jobs import Job
from lowvram.batch.spread import Event
from lowvram.batch.worker import Orders, Worker
from lowvram_kernels.errors import ConfigError, DistributedError

_CONNECT_S = 5.0
# How a client of gRPC begins; whoever speaks it answers with settings of its own (RFC 9113, 3.4).
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_SETTINGS = 4
_ADVICE = "; check the address, or start one: ray start --head"
_STORE_BYTES = 100 << 20  # the store of a cluster of our own: reports alone pass through it


class RayPool:
    """A ``Pool`` of a cluster that is connected. ``most``: workers at one time, None for one a card or node;
    ``cards``: whether a worker takes a card, where there are any."""

    def __init__(self, orders: Orders, *, most: int | None, cards: bool) -> None:
        self._orders, self._most, self._cards = orders, most, cards
        self._nodes: dict[str, dict[str, Any]] = {}
        self._actors: dict[str, Any] = {}
        self._calls: dict[Any, str] = {}
        self._places: dict[str, str] = {}

    def places(self) -> dict[str, str]:
        """As of ``Pool``: a node's identity and a number on it; names of nodes."""
        import ray

        self._nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        cards = self._cards and any(_cards(node) for node in self._nodes.values())
        counts = {key: _cards(node) if cards else 1 for key, node in self._nodes.items()}
        if self._most is not None and not cards:  # several on a node share its processor
            every = list(counts)
            counts = Counter(every[number % len(every)] for number in range(self._most)) if every else {}
        numbers = range(max(counts.values(), default=0))  # one on each node first
        found = [(f"{key}/{number}", key) for number in numbers for key, count in counts.items() if number < count]
        self._places = {place: self._name(key) for place, key in found[: self._most]}
        return self._places

    def _name(self, key: str) -> str:
        names = Counter(node["NodeManagerHostname"] for node in self._nodes.values())
        name = str(self._nodes[key]["NodeManagerHostname"])
        return name if names[name] == 1 else f"{name} ({key[:8]})"

    def start(self, place: str) -> None:
        """As of ``Pool``."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        key = place.partition("/")[0]
        node = self._nodes[key]
        cards = self._cards and _cards(node) > 0
        cpus = int(node["Resources"].get("CPU", 0))
        sharing = _cards(node) if cards else sum(each.startswith(f"{key}/") for each in self._places)
        options: dict[str, Any] = {
            "num_cpus": min(1, cpus) if cards else min(1.0, cpus / max(1, sharing)),
            "num_gpus": 1 if cards else 0,
            "max_restarts": 0,
            "max_task_retries": 0,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(key, soft=False),
        }
        actor: Any = ray.remote(Worker).options(**options).remote(
            self._orders, self._places[place], max(1, cpus // max(1, sharing))
        )  # fmt: skip
        self._actors[place] = actor
        self._calls[actor.open.remote()] = place

    def give(self, place: str, job: Job, *, again: bool) -> None:
        """As of ``Pool``."""
        self._calls[self._actors[place].make.remote(_absolute(job), again=again)] = place

    def wait(self, seconds: float) -> list[Event]:
        """As of ``Pool``."""
        import ray

        done, _ = ray.wait(list(self._calls), timeout=seconds)
        return [self._event(call) for call in done]

    def _event(self, call: Any) -> Event:
        import ray

        place = self._calls.pop(call)
        try:
            kind, words, report = ray.get(call)
        except ray.exceptions.RayError as error:
            with contextlib.suppress(ray.exceptions.RayError, ValueError):
                ray.kill(self._actors.pop(place))  # what is out of reach may be alive still
            return Event(place=place, kind="died", words=_first_line(error))
        return Event(place=place, kind=kind, words=words, report=report)


def _absolute(job: Job) -> Job:
    """With whole paths: a worker has another working directory."""
    assert job.request is not None
    assert job.video is not None
    return dataclasses.replace(job, request=job.request.absolute(), video=job.video.absolute())


def _cards(node: dict[str, Any]) -> int:
    return int(node["Resources"].get("GPU", 0))


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


@contextlib.contextmanager
def connected(address: str) -> Iterator[None]:
    """With the cluster at HOST:PORT, that of this machine ("auto"), or one made for as long as this lasts ("local").

    Raises:
        ConfigError: no such address, or the extra is not installed.
        DistributedError: no cluster there.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # read when it is imported, and by what it starts
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # two nodes that say the same are both heard
    if address == "local":
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # which keeps it on the loopback device everywhere
    try:
        import ray
    except ImportError as error:
        raise ConfigError("--ray needs Ray, which is not installed; install lowvram[ray]") from error
    own: dict[str, Any] = {}
    if address == "local":
        own = {"include_dashboard": False, "_node_ip_address": "127.0.0.1", "object_store_memory": _STORE_BYTES}
    elif address == "auto":
        address = _found()
    if address != "local":
        _reach(address)
    try:
        ray.init(address=address, log_to_driver=True, logging_level=logging.ERROR, **own)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise DistributedError(
            f"--ray {address}: no cluster ({_first_line(error)}); check the address, or start one: ray start --head"
        ) from error
    try:
        with contextlib.redirect_stdout(sys.stderr):  # where Ray prints of itself, among results
            yield
    finally:
        ray.shutdown()  # which ends the actors, too


def _found() -> str:
    from ray._private import services

    try:
        found = services.get_ray_address_from_environment("auto", None)
    except ConnectionError:
        found = ""
    if not found or found == "auto":
        raise DistributedError(
            "--ray auto: no Ray cluster runs on this machine; start one: ray start --head; or give local"
        )
    return str(found)


def _reach(address: str) -> None:
    """Whether anybody listens, and speaks gRPC: Ray itself would try for many minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536 or "/" in host:
        raise ConfigError(f"--ray is {address!r}; expected HOST:PORT of a cluster's head, auto or local")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S) as connection:
            if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
                connection.sendall(_PREFACE)
                if connection.recv(9)[3:4] != bytes([_SETTINGS]):
                    raise OSError("something else than Ray listens")
    except OSError as error:
        said = error.strerror or error
        raise DistributedError(
            f"--ray {address}: no cluster answers there ({said}); check the address, or start one: ray start --head"
        ) from error
