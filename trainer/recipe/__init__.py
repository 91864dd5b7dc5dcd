"""What is trained: crops, masks, losses, networks and schedules. Knows neither Ray nor files."""
