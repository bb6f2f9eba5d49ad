"""Who may ask: names of the host, other sites, tokens."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from lowvram.serve.guard import Access
from lowvram.serve.queue import WorkQueue
from tests.lowvram.serve.fakes import (
    FORM,
    PICTURE,
    client_of,
    untouched,
)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 421), ({"host": "127.0.0.1.evil.example:7860"}, 421), ({"host": ""}, 421),
        ({"host": "192.168.0.7:7860"}, 421), ({"host": "localhost:9999"}, 200), ({"host": "[::1]:7860"}, 200),
        ({"origin": "http://evil.example"}, 403), ({"origin": "null"}, 403), ({"origin": "http://127.0.0.1:8000"}, 403),
        ({"origin": "http://127.0.0.1:7860"}, 200), ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, 200), ({"sec-fetch-site": "same-origin"}, 200),
        ({"sec-fetch-site": "none"}, 200), ({"sec-fetch-site": "same-site"}, 403),
    ],
    ids=str,
)  # fmt: skip
def test_who_may_ask(client: TestClient, headers: dict[str, str], status: int):
    answer = client.get("/api/jobs", headers=headers)
    assert answer.status_code == status
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy


def test_a_post_of_another_site_does_nothing(client: TestClient, queue: WorkQueue, sound: bytes):
    files = {"image": PICTURE, "audio": sound}
    for headers in ({"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}):
        assert client.post("/api/jobs", files=files, data=FORM, headers=headers).status_code == 403
    assert untouched(queue)


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/api/jobs", {}, 401), ("/api/jobs", {"authorization": "Bearer secret-token"}, 200),
        ("/api/jobs", {"authorization": "bearer  secret-token "}, 200),
        ("/api/jobs", {"authorization": "Basic secret-token"}, 401),
        ("/api/jobs", {"authorization": "Bearer wrong"}, 401), ("/api/jobs", {"authorization": "Bearer é"}, 401),
        ("/api/jobs?token=wrong", {}, 401), ("/api/jobs?token=", {}, 401), ("/api/jobs", {"cookie": "lowvram=x"}, 401),
        ("/api/jobs", {"cookie": "lowvram=secret-token"}, 401), ("/", {}, 401), ("/gradio_api/info", {}, 401),
        ("/api/docs", {}, 401), ("/api/openapi.json", {}, 401), ("/gradio_api/file=/etc/passwd", {}, 401),
    ],
    ids=str,
)  # fmt: skip
def test_token(queue: WorkQueue, path: str, headers: dict[str, str], status: int):
    raw = {name: value.encode("utf-8") for name, value in headers.items()}
    with client_of(queue, Access(token="secret-token", hosts=None)) as client:
        assert client.get(path, headers=raw, follow_redirects=False).status_code == status


def test_token_in_the_address_becomes_a_cookie(queue: WorkQueue):
    with client_of(queue, Access(token="secret-token", hosts=None)) as client:
        answer = client.get("/api/jobs?a=b%20c&token=secret-token", follow_redirects=False)
        assert (answer.status_code, answer.headers["location"]) == (303, "/api/jobs?a=b+c")
        assert "HttpOnly" in answer.headers["set-cookie"]
        assert "secret-token" not in answer.headers["set-cookie"]
        assert client.get("/api/jobs").status_code == 200
        away = client.get("//evil.example/?token=secret-token", follow_redirects=False)
        assert away.headers.get("location", "/").startswith("/")
        assert not away.headers.get("location", "/").startswith("//")
