"""The client script of the fedpool engine."""

from shared import serve

import fedpool.client as flare

if __name__ == "__main__":
    serve(flare)
