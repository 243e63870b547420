"""Models that recommend items to users."""
