"""One layer, from its weight to what it stores: tensors in, tensors out."""
