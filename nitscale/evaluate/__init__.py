"""How good samples are: distances between distributions of features."""
