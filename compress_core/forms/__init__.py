"""What a layer stores is a sum of parts, each of a kind that knows all about itself."""
