"""Video recognition."""
