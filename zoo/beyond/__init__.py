"""Papers beyond the other fields."""
