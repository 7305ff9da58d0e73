"""What only the makers of the book need."""
