"""Page: Gradio above the same store, queue and checks that the API has, mounted on it and never launched.

``launch`` would look for newer versions and for this machine's address; mounted, Gradio asks nobody. What its page
refers to elsewhere is held back by the policy that the guard sends.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram.serve.store import UPLOADS, uploaded

if TYPE_CHECKING:
    from fastapi import FastAPI

    from lowvram.serve.api import Api

_KEPT_S = 3600
"""How long files of the page stay that were uploaded to it: those of jobs are copies."""


def mounted(app: FastAPI, api: Api) -> FastAPI:
    """The application with the page at its root. Gradio reads its settings from the environment as it is imported: the
    first page of a process says where files of all of them go."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["GRADIO_TEMP_DIR"] = str(api.store.folder / UPLOADS)
    import gradio

    from lowvram.serve.page_layout import build

    blocks: Any = build(api, delete_cache=(_KEPT_S, _KEPT_S))
    for block in blocks.blocks.values():
        _keep_here(block, api.store.folder / UPLOADS)
    return gradio.mount_gradio_app(
        app,
        blocks,
        path="/",
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        max_file_size=api.limits.upload_bytes,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        show_error=True,
        theme=_theme(gradio),
        css=Path(__file__).with_name("page.css").read_text(encoding="utf-8"),
    )


def _keep_here(block: Any, uploads: Path) -> None:
    """Of files that a client names, a block takes those alone that it uploaded. Gradio fetches others by URL, wherever
    that is, and copies any of this machine to where they are handed out: of a page that is mounted it checks none."""
    if (taking := getattr(block, "async_move_resource_to_block_cache", None)) is None:
        return

    async def taken(source: str | Path | None) -> Any:
        return await taking(None if source is None else str(uploaded(source, uploads)))

    block.async_move_resource_to_block_cache = taken


def _theme(gradio: Any) -> Any:
    """With fonts that the machine has."""
    sans, mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    return gradio.themes.Base(primary_hue="blue", neutral_hue="slate", font=sans, font_mono=mono, text_size="sm")
