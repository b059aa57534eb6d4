"""Every causal language model of transformers, built small and tried (`make families`)."""
