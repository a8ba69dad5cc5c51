"""When this process began, as near as its first import can tell. Imports nothing heavy, so import it first."""

import time

BEGAN = time.monotonic()  # seconds
