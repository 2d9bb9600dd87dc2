"""Makes Python processes that have this folder on their path refuse and log every use of the network."""

import os
import sys

EVENTS = {
    "http.client.connect", "socket.connect", "socket.getaddrinfo", "socket.gethostbyaddr", "socket.gethostbyname",
    "socket.sendmsg", "socket.sendto", "urllib.Request",
}  # fmt: skip


def refuse(event, arguments):
    if event in EVENTS:
        # Also logged, because the program may ignore the exception.
        with open(os.environ["ATTNKERN_TEST_NETWORK"], "a", encoding="utf-8") as log:
            log.write(f"{event}{arguments[-2:]}\n")
        raise OSError(f"no network here: {event}")


sys.addaudithook(refuse)
