"""From sample indices to pixels: the reader."""
