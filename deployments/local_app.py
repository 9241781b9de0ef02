"""What a server on this machine puts before Prefect's app: it answers only to this machine's names,
and a page signs a browser in.

A web page whose name is made to point to this machine (DNS rebinding) counts as the server's own
page in a browser, but its requests still have the page's name in their `Host` header.
"""

import base64
import hashlib

from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import HTMLResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from fedpool.deployments.access import SIGN_IN
from fedpool.tasks.prefect_internals import UI_PASSWORD_KEY

_NAMES = ("127.0.0.1", "localhost")

# Prefect's UI takes no password from a link. It keeps what you type in the browser's storage for
# its origin, where another page of that origin can put it too. The password follows the link's #,
# so it is never sent or logged, and the page is the same for everyone.
_SCRIPT = f"""
const password = location.hash.slice(1);
if (password) localStorage.setItem("{UI_PASSWORD_KEY}", btoa(password));
location.replace("/");
"""
_PAGE = f"<!doctype html><meta charset='utf-8'><title>Signing in</title><script>{_SCRIPT}</script>"
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; "
    f"script-src 'sha256-{base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()}'",
}


def local_app(app: ASGIApp) -> ASGIApp:
    """Prefect's app behind both."""
    page = HTMLResponse(_PAGE, headers=_HEADERS)

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        is_page = scope["type"] == "http" and scope["path"] == SIGN_IN
        await (page if is_page else app)(scope, receive, send)

    return TrustedHostMiddleware(answer, allowed_hosts=_NAMES, www_redirect=False)
