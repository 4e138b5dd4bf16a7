"""Language models: text in, the next token out."""
