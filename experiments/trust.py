"""What a file may name: a run directory or a configuration is data, so it can name neither code to
import nor an address to call unless the user has said so.
"""

import pathlib

from ictjax.config import EndpointConfig


def check_names(file: pathlib.Path, *, environment: str, endpoint: EndpointConfig) -> None:
    """Raises ValueError where a file names more than a registered environment and local models: an
    import path, which would be called with options of the file, or an endpoint, which would be sent
    a key from an environment variable that the file names.

    Args:
      file: where the names are from, for the message.
      environment: its name for the environment.
      endpoint: that of its actor.
    """
    if ":" in environment:
        raise ValueError(
            f"{file} names code to import as its environment, {environment!r:.200}: if you trust"
            " who wrote it, add --trust."
        )
    if endpoint.url:
        raise ValueError(
            f"{file} names an endpoint to call, {endpoint.url!r:.200}, with the key in"
            f" {endpoint.key_variable!r:.100}: if you trust who wrote it, add --trust."
        )
