"""Files that are whole or absent, and words for messages."""
