"""What is trained on the whole model: which atoms stay, and with what scale."""
