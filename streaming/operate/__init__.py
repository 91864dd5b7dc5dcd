"""For whoever runs it: checks of machine, storage and cluster, how many readers a training needs, what it costs."""
