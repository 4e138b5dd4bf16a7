"""Classification with few labels and many unlabelled samples."""
