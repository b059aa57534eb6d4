"""Ways to compress a layer by what it keeps of its entries, with or without factors beside them."""
