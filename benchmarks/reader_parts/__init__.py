"""The parts of `tilestream bench reader`, each a function that gives lines of its table."""
