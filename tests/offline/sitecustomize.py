"""Every Python process that finds this on its path refuses the network, and writes down who asked for it."""

import os
import sys

EVENTS = {
    "http.client.connect", "socket.connect", "socket.getaddrinfo", "socket.gethostbyaddr", "socket.gethostbyname",
    "socket.sendmsg", "socket.sendto", "urllib.Request",
}  # fmt: skip


def refuse(event, arguments):
    if event in EVENTS:
        # Written down, too: who asks may go on in silence after the exception.
        with open(os.environ["ATTNKERN_TEST_NETWORK"], "a", encoding="utf-8") as log:
            log.write(f"{event}{arguments[-2:]}\n")
        raise OSError(f"no network here: {event}")


sys.addaudithook(refuse)
