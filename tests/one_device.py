"""The environment of a process with one device, which compiles as the tests do."""

import os
import re


def one_device() -> dict[str, str]:
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
    return os.environ | {"XLA_FLAGS": flags}
