"""Networks: tensors in, tensors out. They know nothing of files, maps or training."""
