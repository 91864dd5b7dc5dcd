"""From readers to ranks, through Ray Data: the stream, its segments, and what is told of them."""
