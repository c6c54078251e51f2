"""Waiting for another process without guessing how long it takes."""
import time


def eventually(condition, what, seconds=20):
    """Call condition until it returns something true, and return that.

    AssertionError with the text what if that takes longer than a slow machine may need.
    """
    end = time.monotonic() + seconds
    while True:
        result = condition()
        if result:
            return result
        assert time.monotonic() < end, 'not within %s s: %s' % (seconds, what)
        time.sleep(0.01)
