"""Virtual streams: how the numbers of episodes are dealt, so that what is read lies together.

Episode n belongs to stream n mod 64, as the (n div 64)-th of it. The number of streams is fixed, so the
order of episodes knows nothing of ranks and workers; these own whole streams, and what follows within a
stream is made to lie near what came before (`order.py`).
"""

NUM_STREAMS = 64


def virtual_stream(number: int) -> tuple[int, int]:
    """(stream, position in it) of an episode."""
    position, stream = divmod(number, NUM_STREAMS)
    return stream, position
