"""A real language model of 135M weights that acts and reflects: what its adapters are taught."""
