"""The client script of the NVFlare engine."""

import nvflare.client as flare
from shared import serve

if __name__ == "__main__":
    serve(flare)
