"""All of these need the extra ``ui``."""

import pytest

for module in ("fastapi", "gradio", "httpx", "uvicorn"):
    pytest.importorskip(module, reason="pip install 'lowvram[ui]'")
