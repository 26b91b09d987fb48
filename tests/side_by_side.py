"""Two hosts that are threads of this process, for tests of what they say to each other."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

from ictjax.hosts import Hosts


def side_by_side(body, exchange=None):
    """What two hosts, which are threads here, raise in `body`; None where they raise nothing."""
    meeting, said = threading.Barrier(2, timeout=5), [None, None]

    class Thread(Hosts):
        def _everyone(self, message):
            said[self.index] = json.loads(json.dumps(message))
            meeting.wait()
            answers = list(said)
            meeting.wait()
            return answers

    with ThreadPoolExecutor(2) as threads:
        hosts = [
            Thread(index=i, count=2, exchange=exchange and (lambda i=i: exchange(i)))
            for i in (0, 1)
        ]
        return [future.exception() for future in [threads.submit(body, one) for one in hosts]]
