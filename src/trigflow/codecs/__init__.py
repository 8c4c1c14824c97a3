"""Between stored data and x0, and between x0 and what a person gets to see."""
