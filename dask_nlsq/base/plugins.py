"""Plugins that a fit brings to a scheduler, which works without them."""

import logging

from distributed import Client
from distributed.diagnostics.plugin import SchedulerPlugin

logger = logging.getLogger("dask_nlsq")

# what a missing or changed part of Dask, bokeh or the scheduler's installation raises
ABSENT = (ImportError, AttributeError, LookupError, TypeError, ValueError, OSError, RuntimeError)


def install(client: Client, plugin: SchedulerPlugin) -> bool:
    """Bring a plugin to the scheduler of ``client``; whether that worked."""
    try:
        client.register_plugin(plugin)
    except ABSENT as err:  # such as a scheduler without this package, or one that takes no plugins
        logger.warning("the scheduler does not take the plugin %s: %s: %s", type(plugin).__name__, type(err).__name__, err)
        return False
    return True
