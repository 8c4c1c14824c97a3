"""One file for each family of denoisers."""
