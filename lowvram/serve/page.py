"""Page: Gradio above the same store, queue and checks that the API has, mounted on it and never launched.

``launch`` would look for newer versions and for this machine's address; mounted, Gradio asks nobody. What its page
refers to elsewhere is held back by the policy that the guard sends.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowvram.serve.store import UPLOADS

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


def _theme(gradio: Any) -> Any:
    """With fonts that the machine has."""
    sans, mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    return gradio.themes.Base(primary_hue="blue", neutral_hue="slate", font=sans, font_mono=mono, text_size="sm")
