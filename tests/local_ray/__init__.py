"""A package, so that its Ray, a fixture of package scope, ends before the next folder starts its own."""
