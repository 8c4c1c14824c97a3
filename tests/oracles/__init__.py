"""Data distributions for which the whole process is known in closed form."""
