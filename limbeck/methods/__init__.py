"""The published systems, one module and one card each, in a folder a task."""
