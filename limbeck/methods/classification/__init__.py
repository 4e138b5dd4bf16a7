"""Classification with labels for everything."""
