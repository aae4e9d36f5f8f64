"""What a page is made from: one module a source, which alone knows the form that the source has."""
