"""What classes are called, how they are numbered, and one's from another's."""
