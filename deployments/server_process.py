"""The process of a private Prefect server: serves on the loopback until its standard input ends.

Run as `python -m fedpool.deployments.server_process PORT`. Its parent holds the other end of the standard input, so that the
server ends with it, however the parent ends.
"""

import os
import signal
import sys
import threading

import uvicorn


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)


def main(port: int) -> None:
    """Serve Prefect's API and UI on 127.0.0.1."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    uvicorn.run(
        "prefect.server.api.server:create_app", factory=True, host="127.0.0.1", port=port, log_level="warning", lifespan="on"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]))
