"""Asks the coordinator or node in this container how it is; the exit code is 0 if it is well.

PSYCHE_HEALTH names the address to ask. By default it is that of a coordinator; for a node with --metrics-port 9200
it is http://127.0.0.1:9200/healthz.
"""

import os
import ssl
import sys
import urllib.request


def main() -> str | None:
    """What is wrong; None if nothing is."""
    context = ssl.create_default_context()
    # A coordinator shows a certificate of its own key. Nobody stands between it and this container's loopback.
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
    try:
        opener.open(os.environ.get("PSYCHE_HEALTH", "https://127.0.0.1:8080/healthz"), timeout=8).close()
    except OSError as error:
        return str(error)
    return None


if __name__ == "__main__":
    sys.exit(main())
