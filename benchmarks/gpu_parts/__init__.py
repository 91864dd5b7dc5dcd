"""What `tilestream bench gpu` checks and measures."""
