"""Each kernel against the best there is: one module an op, whose `rows()` measures and returns its table."""
