"""What only the makers of the book need: the exporter and the care of the execution cache."""
