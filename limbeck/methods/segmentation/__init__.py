"""Systems for pictures with a class for every pixel."""
