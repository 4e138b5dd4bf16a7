"""Systems for sounds."""
