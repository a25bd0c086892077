"""What a run writes down, and what in it asks for a look."""
